"""Reading folders in parts: what is read, what is refused, and that rows cost rows only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from groundswell.config import ConfigError
from models.weight_files import WeightFiles

NAMES = ["model.embed_tokens.weight", "model.norm.weight"]


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {"model.embed_tokens.weight": torch.arange(20.0).view(5, 4), "model.norm.weight": torch.ones(4)}


def write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, folder / f"model-{number}.safetensors")
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("sharded", [False, True])
def test_whole_and_in_parts(sharded: bool, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    if sharded:
        write_shards(tensors, tmp_path)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path, NAMES)
    for name, tensor in tensors.items():
        assert files.shape(name) == tuple(tensor.shape)
        assert torch.equal(files.read(name), tensor)
        for rows in (
            slice(1, 3),
            slice(2, None),
            slice(-2, None),
            slice(3, 99),
            slice(4, 4),
            slice(9, 12),
            slice(3, 1),
        ):
            assert torch.equal(files.read(name, rows), tensor[rows]), rows


def test_what_is_read_is_the_readers_own(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path, NAMES)
    files.read(NAMES[0]).fill_(-1.0)
    assert torch.equal(files.read(NAMES[0]), tensors[NAMES[0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_kinds_of_float(dtype: torch.dtype, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    read = WeightFiles(tmp_path, NAMES).read(NAMES[0])
    assert read.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(read.float(), tensors[NAMES[0]])


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


def test_prefixes_that_releases_leave_out_or_add(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    for number, stored in enumerate([renamed(tensors, "model.", ""), renamed(tensors, "model.", "model.model.")]):
        (tmp_path / str(number)).mkdir()
        save_file(stored, tmp_path / str(number) / "model.safetensors")
        assert torch.equal(WeightFiles(tmp_path / str(number), NAMES).read(NAMES[0]), tensors[NAMES[0]])


def test_buffers_and_a_tied_head_may_be_stored(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    more = ["h.0.attn.bias", "transformer.h.1.attn.masked_bias", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    save_file(tensors | {name: torch.ones(1) for name in [*more, "lm_head.weight"]}, tmp_path / "model.safetensors")
    WeightFiles(tmp_path, NAMES)


def refused(folder: Path, *parts: str, names: list[str] = NAMES, read: bool = False) -> None:
    with pytest.raises(ConfigError) as caught:
        files = WeightFiles(folder, names)
        for name in names if read else ():
            files.read(name)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(folder), *parts):
        assert part in message


def test_what_is_missing_or_too_much_is_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    refused(tmp_path, "no model.safetensors", "save_pretrained")
    (tmp_path / "pytorch_model.bin").touch()
    refused(tmp_path, "pytorch_model.bin", "convert it")
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "lm_head.weight is missing", names=[*NAMES, "lm_head.weight"])
    refused(tmp_path, "model.norm.weight is not part of the model", names=NAMES[:1])


def test_damaged_files(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    refused(tmp_path, "model.safetensors", "damaged")
    save_file({name: tensor.long() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    refused(tmp_path, "int64", "floating-point", read=True)
    (tmp_path / "model.safetensors").unlink()
    write_shards(tensors, tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    refused(tmp_path, "model-1.safetensors", "copy the whole folder", read=True)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(NAMES, "../other.safetensors")}))
    refused(tmp_path, "outside of its folder")
    for text in ("{}", "[]", "not JSON", '{"weight_map": 3}'):
        index.write_text(text)
        refused(tmp_path, "has no weight_map")


READ_SOME = """
import re, sys
from models.weight_files import WeightFiles

def peak():  # of this process alone; getrusage begins with what the parent had
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1])

files = WeightFiles(sys.argv[1], ["big.weight"])
files.read("big.weight", slice(0, 1))
for rows in (slice(512, 528), slice(None)):
    before = peak()
    files.read("big.weight", rows)
    print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_rows_cost_rows(tmp_path: Path) -> None:
    """An eighth of the tensor's size is far above 1/64, and far below all of it."""
    tensor = torch.ones(1024, 16 * 1024)  # 64 MiB
    save_file({"big.weight": tensor}, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", READ_SOME, str(tmp_path)]
    part, whole = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    size = tensor.numel() * 4 // 1024  # kB
    assert int(part) < size / 8
    assert int(whole) > size / 2
