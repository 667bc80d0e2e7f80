"""DeepSpeed's training states (ZeRO stages 1, 2, 3), read without DeepSpeed and without the workers that wrote them.

Written against DeepSpeed 0.19.8 (deepspeed.checkpoint.ds_to_universal reads the same files). Each worker has saved its
part of every flat group of tensors, float32 weights and moments. Stages 1 and 2 cut a group anywhere and note where its
tensors lie (`param_slice_mappings`). Stage 3 cuts every tensor in equal, padded parts, and lays these end to end.
Files are mapped, so that tensors take memory only while they are used.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundswell.scaling.portable import MOMENTS, Pieces
from groundswell.scaling.states import damaged

PREFIX = "network."  # of the network's tensors in the module that DeepSpeed wraps
_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")


@dataclass
class Fragment:
    """Stands in for DeepSpeed's: where a tensor's elements lie in a worker's part of a flat group."""

    numel: int
    start: int


class Ignored:
    """Stands in for DeepSpeed's loss scaler, which is of no use with float32 and bfloat16."""


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
]


def read(state: Path, num_workers: int) -> tuple[dict[str, Pieces], int]:
    """-> all tensors (weights/NAME, exp_avg/NAME, exp_avg_sq/NAME), updates so far. `state`: what save_checkpoint has
    written. Raises ConfigError for a folder that is not whole."""
    optimizers = _load_all(state, "optim", num_workers)
    try:
        parts = [values["optimizer_state_dict"] for values in optimizers]
        if parts[0]["zero_stage"] == 3:
            tensors = _stage_3(parts, _load_all(state, "model", num_workers))
            step = _step(part["optimizer_state_dict"] for part in parts)
        else:
            tensors = _stages_1_and_2(parts, _load(state / "mp_rank_00_model_states.pt"))
            step = _step(part["base_optimizer_state"] for part in parts)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise damaged(state, f"{type(error).__name__}: {error}") from None
    for name, pieces in tensors.items():
        found = sum(piece.numel() for piece in pieces.pieces)
        if found != prod(pieces.shape):
            raise damaged(state, f"{name} has {found} elements, not {prod(pieces.shape)}")
    return tensors, step


def _load(path: Path) -> dict[str, Any]:
    """Nothing but tensors, plain values and the stand-ins is unpickled."""
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise damaged(path, str(error).partition("\n")[0][:200]) from None


def _load_all(state: Path, kind: str, num_workers: int) -> list[dict[str, Any]]:
    """One file a worker, in order."""
    paths = {int(m[1]): path for path in state.iterdir() if (m := _FILE.fullmatch(path.name)) and m[2] == kind}
    if sorted(paths) != list(range(num_workers)):
        raise damaged(state, f"{num_workers} workers have saved it, and {len(paths)} files of {kind} states are there")
    return [_load(paths[rank]) for rank in range(num_workers)]


def _step(states: Any) -> int:
    """Updates so far, 0 before the first. Raises ValueError where the flat groups differ."""
    steps = {int(group["step"]) for state in states for group in state["state"].values()}
    if len(steps) > 1:
        raise ValueError(f"parts of different steps: {sorted(steps)}")
    return steps.pop() if steps else 0


def _flat(state: Mapping[int, Mapping[str, Tensor]], group: int, weights: Tensor) -> dict[str, Tensor]:
    """A worker's part of one flat group, weights and moments. Before the first update there are no moments yet."""
    moments = {key: state[group][key] if group in state else torch.zeros_like(weights) for key in MOMENTS}
    return {"weights": weights, **moments}


def _stages_1_and_2(parts: list[dict[str, Any]], model: dict[str, Any]) -> dict[str, Pieces]:
    shapes = {name: tuple(tensor.shape) for name, tensor in model["module"].items()}
    pieces: dict[str, list[Tensor]] = {}
    for part in parts:
        state = part["base_optimizer_state"]["state"]
        for group, weights in enumerate(part["single_partition_of_fp32_groups"]):
            for kind, flat in _flat(state, group, weights).items():
                for name, place in part["param_slice_mappings"][group].items():
                    piece = flat.narrow(0, place.start, place.numel)
                    pieces.setdefault(_key(kind, name), []).append(piece)
    found = {_key("weights", name): [tensor.flatten()] for name, tensor in model["module"].items()} | pieces
    plain = {_key(kind, name): shape for name, shape in shapes.items() for kind in ("weights", *MOMENTS)}
    return {key: Pieces(plain[key], values) for key, values in found.items()}


def _stage_3(parts: list[dict[str, Any]], models: list[dict[str, Any]]) -> dict[str, Pieces]:
    tensors: dict[str, Pieces] = {}
    for group, shapes in enumerate(models[0]["param_shapes"]):
        flats = [_flat(part["optimizer_state_dict"]["state"], group, part["fp32_flat_groups"][group]) for part in parts]
        start = 0
        for name, shape in shapes.items():
            each = -(-prod(shape) // len(parts))
            for kind in ("weights", *MOMENTS):
                padded = [flat[kind].narrow(0, start, each) for flat in flats]
                tensors[_key(kind, name)] = Pieces(tuple(shape), _without_padding(padded, prod(shape)))
            start += each
    for name, shape in (models[0]["frozen_param_shapes"] or {}).items():
        padded = [model["frozen_param_fragments"][name].flatten() for model in models]
        tensors[_key("weights", name)] = Pieces(tuple(shape), _without_padding(padded, prod(shape)))
    return tensors


def _without_padding(padded: list[Tensor], size: int) -> list[Tensor]:
    """The first `size` elements of parts that lie end to end."""
    starts = [sum(len(part) for part in padded[:rank]) for rank in range(len(padded))]
    return [part[: max(0, size - start)] for part, start in zip(padded, starts, strict=True)]


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name.removeprefix(PREFIX)}"
