"""Safetensors folders read tensor by tensor, or rows of one: what a network that is spread over workers starts from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from groundswell.config import ConfigError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PREFIXES = ("transformer.", "model.")  # of a causal network's decoder: base models are released without them
# Not parameters: causal masks of old GPT-2 releases and rotary frequencies of old Llama releases.
_BUFFER = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.(original_)?inv_freq$")
_HEAD = "lm_head.weight"  # a tied head may be stored too


class WeightFiles:
    """A folder's tensors under a network's names. Files are opened on first use and nothing is kept.

    `names`: the network's parameters, a tied one once. Raises ConfigError, which names folder and tensor, where one is
    missing or where the folder has a tensor that the network has no place for.
    """

    def __init__(self, folder: str | Path, names: Iterable[str]) -> None:
        self.folder = Path(folder)
        self._open: dict[Path, Any] = {}
        unused = dict(self._files)
        self._keys: dict[str, str] = {}  # network's name -> name in the file
        for name in names:
            key = next((key for key in _spellings(name) if key in unused), None)
            if key is None:
                raise ConfigError(f"{self.folder}: tensor {name} is missing; the folder holds another network")
            self._keys[name] = key
            del unused[key]
        for key, path in unused.items():
            if not (_BUFFER.search(key) or key == _HEAD):
                raise ConfigError(f"{path}: tensor {key} is not part of the model; the folder holds another network")

    def path(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._files[self._keys[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor; its values are not read."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """`rows` of dimension 0 (step 1), float32 (float64 stays). Only their bytes are read.

        Raises ConfigError for a damaged file and for a tensor that is not of floating point.
        """
        stored = self._slice(name)
        start, stop, _ = rows.indices(stored.get_shape()[0])
        try:
            tensor = stored[start : max(start, stop)]
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self.path(name)}: {name} cannot be read ({error}); the file is damaged") from None
        if not tensor.is_floating_point():
            raise ConfigError(f"{self.path(name)}: {name} is {tensor.dtype}; only floating-point weights can be loaded")
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return tensor.to(dtype, copy=True)  # what safetensors gives shares memory with later reads

    def _slice(self, name: str) -> Any:
        return self._file(self.path(name)).get_slice(self._keys[name])

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                reason = "copy the whole folder" if not path.exists() else "the file is damaged; copy it again"
                raise ConfigError(f"{path}: cannot be read ({error}); {reason}") from None
        return self._open[path]

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Name in the file -> file."""
        single, index = self.folder / WEIGHTS, self.folder / INDEX
        if single.exists():
            return dict.fromkeys(self._file(single).keys(), single)
        if index.exists():
            return {key: self.folder / file for key, file in _weight_map(index).items()}
        if next(self.folder.glob("pytorch_model*.bin"), None):
            raise ConfigError(
                f"{self.folder}: has pytorch_model.bin only, and pickles can run code; convert it where you trust it: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
            )
        raise ConfigError(f"{self.folder}: no {WEIGHTS} and no {INDEX}; give a folder that save_pretrained wrote")


def _spellings(name: str) -> list[str]:
    """The name itself, without a prefix, and with one."""
    shorter = [name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)]
    return [name, *shorter, *(prefix + name for prefix in PREFIXES)]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        inside = all(Path(file).name == file for file in files.values())  # never a path out of the folder
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: has no weight_map ({error!r}); copy the file again") from None
    if not inside:
        raise ConfigError(f"{index}: names files outside of its folder; copy the whole folder again")
    return files
