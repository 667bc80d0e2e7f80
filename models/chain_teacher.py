"""The frozen teacher of an implicit chain of thought: from a folder to states, kept from one visit to the next.

Shapes: K runs, B rows, T tokens, L layers, d width.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from groundswell import stages
from groundswell.config import ConfigError
from groundswell.protocols import Parameters
from models import chain_original, huggingface
from models.chain_states import Subset, extract_states
from models.decoder import Decoder

CHUNK_ON_GPU = 32  # rows that are computed together, always so many


class Outline(NamedTuple):
    """What a network in a folder is, its weights apart."""

    decoder: Decoder
    vocab_size: int


def read_outline(folder: Path) -> Outline:
    """Of a checkpoint of ours, a GPT-2 of Hugging Face or a released folder. Raises ConfigError for any other."""
    if chain_original.is_original(folder):
        return Outline(*chain_original.decoder_of(folder))
    decoder = Decoder.from_huggingface(folder)
    if decoder.num_recurrences > 1:
        raise ConfigError(f"{folder}: a looped decoder has no state of its own for each layer; give another one")
    return Outline(decoder, int(huggingface.read_config(folder)["vocab_size"]))


def _read_parameters(folder: Path, outline: Outline) -> dict[str, Tensor]:
    decoder, vocab_size = outline
    if not chain_original.is_original(folder):
        return decoder.load_folder(folder, vocab_size, decoder.num_positions or 0)
    specs = decoder.parameters(vocab_size, 0)
    stored = chain_original.StateDict(folder, [spec.name for spec in specs])
    return {spec.name: stored.read(spec.name) for spec in specs}


class Teacher:
    """A frozen decoder on one device, and the states of the training examples that it has read."""

    def __init__(self, decoder: Decoder, parameters: Parameters) -> None:
        """`parameters` [1, *shape]."""
        self.decoder, self.parameters = decoder, parameters
        self._kept: dict[Subset, StateCache] = {}

    @torch.no_grad()
    def states(self, tokens: Tensor, places: Tensor, subset: Subset = "diagonal", budget: int = 0) -> Tensor:
        """tokens [K, B, T], places [K, B, L] -> states [K, B, L, d]. With a `budget` in bytes they are kept as far as
        it goes. Rows that all runs share are computed once.

        Raises ConfigError where the tokens are more than the teacher has positions.
        """
        table = self.parameters.get("transformer.wpe.weight")
        if table is not None and tokens.shape[-1] > table.shape[1]:
            raise ConfigError(
                f"model.teacher: has {table.shape[1]} positions, the rows {tokens.shape[-1]} tokens; give a teacher of "
                "this task"
            )
        num_runs = len(tokens)
        if tokens.stride(0) == 0:
            tokens, places = tokens[:1], places[:1]
        rows, where = tokens.flatten(0, 1), places.flatten(0, 1)
        if budget:
            if subset not in self._kept:
                self._kept[subset] = StateCache(self, subset)
            found = self._kept[subset].states(rows, where, budget)
        else:
            found = self.compute(rows, where, subset)
        return found.unflatten(0, (len(tokens), -1)).expand(num_runs, -1, -1, -1)

    def compute(self, rows: Tensor, places: Tensor, subset: Subset) -> Tensor:
        """rows [N, T], places [N, L] -> states [N, L, d]."""
        return extract_states(self.decoder, self.parameters, rows[None], places[None], subset)[0]


class StateCache:
    """States by row. One that is not there is computed alone, or on a GPU in a chunk of a fixed shape: so it does not
    depend on the batch that it first comes in, and a run that was killed goes on as if it had not been."""

    def __init__(self, teacher: Teacher, subset: Subset) -> None:
        self.teacher, self.subset = teacher, subset
        self._index: dict[bytes, int] = {}
        self._store: Tensor | None = None  # [capacity, L, d], grows by doubling

    @property
    def num_bytes(self) -> int:
        return 0 if self._store is None else self._store.nbytes

    def states(self, rows: Tensor, places: Tensor, budget: int) -> Tensor:
        """rows [N, T], places [N, L] -> [N, L, d]. One exchange with the device."""
        joined = torch.cat([rows, places], 1).cpu().numpy()
        keys = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in joined]
        missing = {key: number for number, key in enumerate(keys) if key not in self._index}
        if not missing:
            return self._read(keys)
        numbers = torch.tensor(list(missing.values()), device=rows.device)
        found = dict(zip(missing, self._compute(rows[numbers], places[numbers]), strict=True))
        states = torch.stack([found[key] if key in found else self._read([key])[0] for key in keys])
        self._keep(found, budget)
        return states

    def _read(self, keys: Sequence[bytes]) -> Tensor:
        assert self._store is not None
        return self._store[torch.tensor([self._index[key] for key in keys], device=self._store.device)]

    def _compute(self, rows: Tensor, places: Tensor) -> Tensor:
        size = CHUNK_ON_GPU if rows.is_cuda else 1
        count = len(rows)
        if count % size:  # the last row again
            rows, places = (torch.cat([x, x[-1:].expand(size - count % size, -1)]) for x in (rows, places))
        chunks = zip(rows.split(size), places.split(size), strict=True)
        return torch.cat([self.teacher.compute(*chunk, self.subset) for chunk in chunks])[:count]

    def _keep(self, found: dict[bytes, Tensor], budget: int) -> None:
        """As many as there is room for."""
        one, start = next(iter(found.values())), len(self._index)
        if self._store is None:
            self._store = one.new_empty(0, *one.shape)
        room = budget // one.nbytes
        new = list(found)[: max(0, room - start)]
        if start + len(new) > len(self._store):
            larger = one.new_empty(min(room, max(2 * len(self._store), start + len(new))), *one.shape)
            larger[:start] = self._store[:start]
            self._store = larger
        for number, key in enumerate(new, start):
            self._store[number], self._index[key] = found[key], number


def changed(folder: Path) -> int:
    """When the folder was written, so that one that is written again is read again."""
    config = folder / huggingface.CONFIG
    return config.stat().st_mtime_ns if config.exists() else 0


def teacher_in(path: str, device: torch.device) -> Teacher:
    """The network in a folder on a device; one copy serves all models of this process. Raises ConfigError."""
    if not path:
        raise ConfigError("model.teacher: no folder is given; set it to a checkpoint of the teacher")
    folder = stages.resolve(path)
    if not folder.exists():
        raise ConfigError(f"model.teacher: {path} does not exist; give a checkpoint folder of the trained teacher")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _load(folder, changed(folder), str(device))


@functools.lru_cache(maxsize=4)
def _load(folder: Path, changed_ns: int, device: str) -> Teacher:
    outline = read_outline(folder)
    parameters = _read_parameters(folder, outline)
    return Teacher(outline.decoder, {name: tensor[None].to(device) for name, tensor in parameters.items()})


@functools.lru_cache(maxsize=64)
def _outline(folder: Path, changed_ns: int) -> Outline:
    return read_outline(folder)


def teacher_outline(path: str) -> Outline:
    folder = stages.resolve(path)
    return _outline(folder, changed(folder))
