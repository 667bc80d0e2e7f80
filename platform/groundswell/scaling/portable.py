"""A training state as whole tensors, which any number of workers can read.

`<state>/portable/tensors-00001-of-00002.safetensors` hold `weights/<name>`, and for each trained tensor AdamW's moments
`exp_avg/<name>` and `exp_avg_sq/<name>`, all float32; `optimizer_step` is the number of updates so far.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.files import atomic_folder
from groundswell.scaling.states import damaged

FOLDER = "portable"
MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW calls them
STEP = "optimizer_step"
FILE_BYTES = 4 * 2**30  # as much of the state as is held in memory at a time


@dataclass(frozen=True)
class Pieces:
    """A tensor as the workers have saved it."""

    shape: tuple[int, ...]
    pieces: Sequence[Tensor]  # flat, in order; together all elements

    @property
    def num_bytes(self) -> int:
        return 4 * prod(self.shape)

    def whole(self) -> Tensor:
        """[*shape] float32."""
        return torch.cat([piece.float() for piece in self.pieces]).reshape(self.shape)


def is_portable(state: Path) -> bool:
    """Is the folder there with all its files?"""
    names = [path.stem for path in (state / FOLDER).glob("tensors-*-of-*.safetensors")]
    return bool(names) and len(names) == int(names[0].rpartition("-")[2])


def write(state: Path, tensors: Mapping[str, Pieces], optimizer_step: int, file_bytes: int = FILE_BYTES) -> None:
    """Add the folder to a training state: whole, or not at all. Raises ConfigError where it cannot be written."""
    step = Pieces((), [torch.tensor([optimizer_step])])
    files = list(_files({**tensors, STEP: step}.items(), file_bytes))
    try:
        with atomic_folder(state / FOLDER) as folder:
            for number, members in enumerate(files, 1):
                path = folder / f"tensors-{number:05d}-of-{len(files):05d}.safetensors"
                save_file({name: pieces.whole() for name, pieces in members.items()}, path)
    except (OSError, SafetensorError) as error:
        size = sum(pieces.num_bytes for pieces in tensors.values()) / 2**20
        raise ConfigError(
            f"{state}: cannot write {size:.0f} MiB ({error}); the state is as it was: make room, and convert it again"
        ) from None


def _files(tensors: Iterable[tuple[str, Pieces]], file_bytes: int) -> Iterator[dict[str, Pieces]]:
    """What goes into each file: up to so many bytes, or a single larger tensor."""
    members: dict[str, Pieces] = {}
    size = 0
    for name, pieces in tensors:
        if members and size + pieces.num_bytes > file_bytes:
            yield members
            members, size = {}, 0
        members[name] = pieces
        size += pieces.num_bytes
    yield members


class Reader:
    """Reads one tensor at a time, from files that stay open: a context manager."""

    def __init__(self, state: Path) -> None:
        """Raises ConfigError for a folder that is not whole."""
        self.state = state
        self._open = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        paths = sorted((state / FOLDER).glob("tensors-*.safetensors"))
        try:
            for path in paths:
                file = self._open.enter_context(safe_open(path, "pt"))
                self._files |= dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError) as error:
            self._open.close()
            raise damaged(path, error) from None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """[*shape] float32. Raises ConfigError for a tensor that is not there or has another shape."""
        file = self._files.get(name)
        if file is None:
            raise damaged(self.state / FOLDER, f"{name} is missing")
        tensor = file.get_tensor(name)
        if tuple(tensor.shape) != tuple(shape):
            raise damaged(self.state / FOLDER, f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}")
        return tensor

    def optimizer_step(self) -> int:
        return int(self.read(STEP, ()))
