"""A compiled RASP program as a network whose edges can be masked: no norm, no causal mask, relu.

Sequences start with BOS and have no padding: attention has no mask, so rows of one batch are of one length. The outputs
are the columns of the unembedding: one for each value of a categorical program, a single number for a numerical one.
Shapes: B rows, T tokens with BOS, A answer positions, d width, H heads, V outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.files import atomic_folder
from models.edge_graph import EdgeGraph
from models.edge_network import EdgeNetwork, WholeRun
from models.rasp import Value
from models.tracr_compiler import CompiledProgram
from models.tracr_parts import BOS

MODEL_TYPE = "tracr"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class TracrNetwork(EdgeNetwork):
    """The embeddings of tokens and of positions are always writers."""

    causal = False

    def __init__(
        self, program: CompiledProgram, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.program, self.device, self.dtype = program, torch.device(device), dtype
        self.weights = {name: torch.tensor(x, device=device, dtype=dtype) for name, x in program.weights.items()}
        num_layers, num_heads, self.width, self.key_size = program.weights["query"].shape
        self.num_outputs = program.weights["unembedding"].shape[1]
        self.graph = EdgeGraph(num_layers, num_heads, num_heads, ("token_embeds", "pos_embeds"))
        self._ids = {value: number for number, value in enumerate(program.vocabulary)}

    # ---- parts ----

    def embeddings(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.program.max_length + 1:
            raise ConfigError(
                f"tokens: {tokens.shape[1] - 1} are more than the {self.program.max_length} that the program is "
                "compiled for; compile it with a greater --max-length"
            )
        by_token = self.weights["tokens"][tokens]
        by_place = self.weights["positions"][: tokens.shape[1]]
        return torch.stack([by_token, by_place.expand_as(by_token)])

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        query, key, value, output = (self.weights[name][layer, :, None] for name in ("query", "key", "value", "output"))
        scores = (queries @ query) @ (keys @ key).mT / math.sqrt(self.key_size)
        return scores.softmax(-1) @ (values @ value) @ output

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        return (x @ self.weights["first"][layer]).relu() @ self.weights["second"][layer]

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.weights["unembedding"]

    def run(self, tokens: Tensor, positions: Tensor, keep_writers: bool = False) -> WholeRun:
        writers = list(self.embeddings(tokens))
        x = writers[0] + writers[1]
        residual = [x]
        for layer in range(self.graph.num_layers):
            state = x.expand(self.graph.num_heads, *x.shape)
            heads = self.attend(layer, state, state, state)
            x = x + heads.sum(0)
            residual.append(x)
            added = self.mlp(layer, x)
            x = x + added
            residual.append(x)
            writers += [*heads, added]
        logits = self.logits(x.gather(1, positions.unsqueeze(-1).expand(-1, -1, self.width)))
        return WholeRun(logits, torch.stack(writers), residual) if keep_writers else WholeRun(logits)

    # ---- sequences ----

    def encode(self, sequences: Sequence[Sequence[Value]]) -> Tensor:
        """Sequences of one length, without BOS -> token ids [B, T] with it. Raises ConfigError for a foreign token, for
        more tokens than the program is compiled for, and for different lengths."""
        lengths = {len(sequence) for sequence in sequences}
        if len(lengths) != 1 or not 1 <= max(lengths) <= self.program.max_length:
            raise ConfigError(
                f"sequences: must all be of one length from 1 to {self.program.max_length}, not {sorted(lengths)}"
            )
        foreign = {value for sequence in sequences for value in sequence if value not in self._ids}
        if foreign:
            raise ConfigError(f"sequences: {min(foreign, key=str)!r} is not in {list(self.program.vocabulary)}")
        rows = [[self._ids[BOS], *(self._ids[value] for value in sequence)] for sequence in sequences]
        return torch.tensor(rows, device=self.device)

    def decode(self, logits: Tensor) -> list[list[Value | None]]:
        """[B, A, V] -> values [B][A]; None where a categorical program has none."""
        if self.program.outputs is None:
            return logits[..., 0].tolist()
        best, places = logits.max(-1)
        found = zip(best.tolist(), places.tolist(), strict=True)
        names = self.program.outputs
        return [[names[v] if top > 0.5 else None for top, v in zip(*row, strict=True)] for row in found]

    def __call__(self, sequences: Sequence[Sequence[Value]]) -> list[list[Value | None]]:
        """The program's values at each place of the sequences, as the network finds them."""
        tokens = self.encode(sequences)
        places = torch.arange(1, tokens.shape[1], device=self.device).expand(len(tokens), -1)
        return self.decode(self.run(tokens, places).logits)

    # ---- on disk ----

    def save(self, folder: str | Path, program: str = "") -> None:
        """Write config.json and model.safetensors. Raises ConfigError where there is such a folder already."""
        try:
            with atomic_folder(folder) as path:
                (path / WEIGHTS).write_bytes(save(self.program.weights))
                (path / CONFIG).write_text(json.dumps(self._config(program), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror or error}; choose another folder") from None

    def _config(self, program: str) -> dict[str, Any]:
        compiled, graph = self.program, self.graph
        return {
            "model_type": MODEL_TYPE,
            "program": program,
            "num_layers": graph.num_layers,
            "num_heads": graph.num_heads,
            "width": self.width,
            "key_size": self.key_size,
            "mlp_width": compiled.weights["first"].shape[2],
            "max_length": compiled.max_length,
            "vocabulary": compiled.vocabulary,
            "outputs": compiled.outputs,
            "labels": compiled.labels,
        }

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Raises ConfigError, which names the folder, where it holds no compiled program."""
        try:
            config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
            return cls(_read(config, load_file(Path(folder) / WEIGHTS)), device, dtype)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"{folder}: no compiled program ({text}); write one with `groundswell tracr`") from None


def _read(config: dict[str, Any], weights: dict[str, np.ndarray]) -> CompiledProgram:
    """Raises KeyError, TypeError or ValueError where the parts do not fit each other."""
    outputs = config["outputs"]
    compiled = CompiledProgram(
        vocabulary=tuple(config["vocabulary"]),
        max_length=config["max_length"],
        outputs=None if outputs is None else tuple(outputs),
        labels=tuple(config["labels"]),
        weights=weights,
    )
    num_layers, heads, width, key_size = (config[name] for name in ("num_layers", "num_heads", "width", "key_size"))
    hidden, size = config["mlp_width"], (num_layers, heads, width, key_size)
    shapes = {
        "tokens": (len(compiled.vocabulary), width),
        "positions": (compiled.max_length + 1, width),
        "query": size,
        "key": size,
        "value": size,
        "output": (num_layers, heads, key_size, width),
        "first": (num_layers, width, hidden),
        "second": (num_layers, hidden, width),
        "unembedding": (width, 1 if outputs is None else len(outputs)),
    }
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ValueError(f"{name} has shape {weights[name].shape}, not {shape}")
    return compiled
