"""Shared by tests of the recurrent decoder: its variants at a small size, rows of numbers, and random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.recurrent import RecurrentDecoder

VOCAB_SIZE, LENGTH = 19, 9
SMALL = RecurrentDecoder(
    num_layers=2, num_recurrences=2, width=8, num_heads=2, mlp_width=12, num_positions=24, abacus_max_offset=6
)
VARIANTS: dict[str, dict[str, Any]] = {
    "looped abacus": {},
    "standard": {"num_recurrences": 1},
    "skip": {"num_recurrences": 1, "inject_every_layer": True},
    "looped skip": {"inject_every_layer": True},
    "one layer": {"num_layers": 1, "num_recurrences": 3},
    "learned": {"position_encoding": "learned"},
    "no positions": {"position_encoding": None},
    "sinusoidal": {"position_encoding": "sinusoidal"},
    "scaled sinusoidal": {"position_encoding": "scaled_sinusoidal"},
    "fire": {"attention_positions": "fire", "position_encoding": "null"},
    "abacus, random fire": {"attention_positions": "fire", "fire_max_length": 20},
    "rotary": {"attention_positions": "rotary"},
    "rotary pairs": {"attention_positions": "rotary_interleaved"},
    "linear injection, unit state, pre": {"input_injection": "linear", "initial_state": "unit", "norm_scheme": "pre"},
    "ffn injection, normal state, sandwich": {
        "input_injection": "ffn",
        "initial_state": "normal",
        "norm_scheme": "sandwich",
    },
    "ffn injection everywhere": {"input_injection": "ffn", "inject_every_layer": True},
    "no injection": {"input_injection": "none", "initial_state": "input"},
    "input state": {"initial_state": "input"},
    "zero state, deepnorm": {"initial_state": "zero", "norm_scheme": "deepnorm"},
    "shaped, rms": {"norm_scheme": "shaped", "norm": "rms_norm"},
    "simple, scale norm": {"norm_scheme": "simple", "norm": "scale_norm"},
    "biases, linear head": {"biases": True, "head": "linear", "activation": "gelu"},
    "no head, no adapter": {"head": "identity", "output_adapter": False, "activation": "relu_glu"},
    "narrow embedding": {"embedding_width": 6},
    "tied": {"tied_head": True},
    "tied, narrow embedding": {"tied_head": True, "embedding_width": 6},
    "more in evaluation": {"num_recurrences_in_eval": 3},
}


def weights(
    model: RecurrentDecoder, num_runs: int = 1, seed: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """As trained ones might be: nothing is zero, norms differ from one."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for spec in model.parameters(VOCAB_SIZE, LENGTH):
        noise = torch.randn(num_runs, *spec.shape, generator=generator, dtype=dtype)
        found[spec.name] = spec.init_value + (0.5 if spec.decayed else 0.1) * noise
    return found


def rows(batch_size: int = 4, num_runs: int = 1, seed: int = 2) -> tuple[Tensor, Tensor]:
    """tokens [K, B, T] of numbers and signs with padding, positions [K, B, A] of answers, some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 18, (num_runs, batch_size, LENGTH), generator=generator)
    ends = torch.randint(5, LENGTH + 1, (num_runs, batch_size, 1), generator=generator)
    tokens[torch.arange(LENGTH) >= ends] = 0
    positions = torch.minimum(torch.arange(3, 7).expand(num_runs, batch_size, -1), ends - 1)
    return tokens, positions


def generators(num_runs: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(31 + run) for run in range(num_runs)]
