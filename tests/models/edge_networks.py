"""Small random networks of all kinds that edge masks know, in float64, and inputs for them."""

import torch
from torch import Tensor

from models import edge_gpt2
from models.decoder import Decoder
from models.edge_network import EdgeNetwork

VOCAB_SIZE, LENGTH = 19, 9
VARIANTS = {
    "gpt2": {},
    "one layer": {"num_layers": 1},
    "rotary": {"position_encoding": "rotary", "rotary_dim": 4},
    "no positions": {"position_encoding": "null", "activation": "gelu"},
    "no norm": {"layer_norm": False, "activation": "relu"},
    "looped": {"num_recurrences": 2, "tied_head": False},
}


def decoder(variant: str) -> Decoder:
    return Decoder(**({"num_layers": 2, "num_heads": 2, "width": 16} | VARIANTS[variant]))


def weights(model: Decoder, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    specs = model.parameters(VOCAB_SIZE, LENGTH)
    return {s.name: (s.init_value + 0.3 * torch.randn(s.shape, generator=generator)).to(dtype) for s in specs}


def network(variant: str, mask_embeddings: bool) -> EdgeNetwork:
    model = decoder(variant)
    return edge_gpt2.from_tensors(model, weights(model), mask_embeddings)


def inputs(copies: int, prefix: int = 0, batch: int = 3, answers: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """clean and corrupted tokens [copies, B, T], the same up to `prefix`, and positions [copies, B, A] before the end,
    some of them inside of the prefix."""
    generator = torch.Generator().manual_seed(2)
    clean, corrupted = torch.randint(VOCAB_SIZE, (2, copies, batch, LENGTH), generator=generator).unbind()
    corrupted[..., :prefix] = clean[..., :prefix]
    positions = torch.randint(1, LENGTH - 2, (copies, batch, answers), generator=generator)
    positions[0, 0, 0] = LENGTH - 3
    return clean, corrupted, positions
