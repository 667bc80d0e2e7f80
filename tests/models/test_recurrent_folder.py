"""Folders of recurrent decoders: ours go round, published checkpoints are read, others are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recurrent_variants import LENGTH, SMALL, VARIANTS, VOCAB_SIZE, rows, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundswell.config import ConfigError
from models.recurrent import RecurrentDecoder
from models.recurrent_original import fields_of_config, from_state_dict

GOLDEN = Path(__file__).parents[1] / "golden" / "arithmetic"
VOCABULARY = [f"t{index}" for index in range(VOCAB_SIZE)]


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> RecurrentDecoder:
    return SMALL.with_overrides(VARIANTS[request.param])


def test_round_trip(model: RecurrentDecoder, tmp_path: Path) -> None:
    values = {name: value[0] for name, value in weights(model).items()}
    model.save_folder(values, tmp_path, VOCABULARY)
    assert json.loads((tmp_path / "vocabulary.json").read_text()) == VOCABULARY
    found = model.load_folder(tmp_path, VOCAB_SIZE, LENGTH)
    assert found.keys() == values.keys() and all(torch.equal(found[name], values[name]) for name in values)


def test_other_networks_are_refused(tmp_path: Path) -> None:
    values = {name: value[0] for name, value in weights(SMALL).items()}
    SMALL.save_folder(values, tmp_path, VOCABULARY)
    SMALL.with_overrides({"num_recurrences": 5, "abacus_max_offset": 2}).load_folder(tmp_path, VOCAB_SIZE, LENGTH)
    for fields, message in (
        ({"num_heads": 4}, "num_heads is 2 there and 4 in the model; set model.num_heads=2"),
        ({"mlp_width": 16}, "mlp_width is 12 there and 16 in the model"),
        ({"initial_state": "zero"}, "initial_state is embed there and zero in the model"),
    ):
        with pytest.raises(ConfigError, match=message):
            SMALL.with_overrides(fields).load_folder(tmp_path, VOCAB_SIZE, LENGTH)
    with pytest.raises(ConfigError, match=r"embedding.token.weight is \[19, 8\], the model needs \[20, 8\]"):
        SMALL.load_folder(tmp_path, 20, LENGTH)
    with pytest.raises(ConfigError, match="21 tokens for 19 embedding rows"):
        SMALL.save_folder(values, tmp_path, [*VOCABULARY, "a", "b"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="model_type 'gpt2' is no recurrent decoder"):
        SMALL.load_folder(tmp_path, VOCAB_SIZE, LENGTH)


# ---- published checkpoints ----


def published(name: str, folder: Path, file: str, compiled: bool) -> dict[str, Any]:
    """A checkpoint folder as the published code writes it, from a recording; names with what torch.compile leaves."""
    arch = json.loads((GOLDEN / f"{name}.json").read_text())["arch"]
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    stored: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.startswith("sd."):
            theirs = key.removeprefix("sd.")
            if compiled:
                theirs = theirs.replace("recurrent_block.", "recurrent_block._orig_mod.")
                theirs = (
                    theirs.replace(".layers.0.", "._orig_mod.layers.0.") if "recurrent_blocks" in theirs else theirs
                )
            stored[theirs] = value.clone()
    (folder / "model_config.json").write_text(json.dumps(arch))
    if file.endswith(".pth"):
        torch.save(stored, folder / file)
    else:
        save_file(stored, folder / file)
    return arch


@pytest.mark.parametrize("name", ["rec_abacus_fire", "rec_skip_abacus", "rec_tied", "std_rope"])
@pytest.mark.parametrize("file", ["state_dict.pth", "model.safetensors"])
@pytest.mark.parametrize("compiled", [False, True])
def test_published_checkpoints(name: str, file: str, compiled: bool, tmp_path: Path) -> None:
    arch = published(name, tmp_path, file, compiled)
    model = RecurrentDecoder.from_original(tmp_path)
    assert model == RecurrentDecoder.from_dict(fields_of_config(arch))
    assert model.width == 16 and model.num_positions == 128
    found = model.load_folder(tmp_path, VOCAB_SIZE, LENGTH)
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    stored = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    specs = model.parameters(VOCAB_SIZE, LENGTH)
    expected = from_state_dict(model, stored, specs, arch["attention"]["type"] == "self-attention")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    logits = model.logits({key: value[None] for key, value in found.items()}, rows()[0])
    assert torch.isfinite(logits).all()


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_config.json: No such file .* give a checkpoint folder"):
        RecurrentDecoder.from_original(tmp_path)
    config = tmp_path / "model_config.json"
    config.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        RecurrentDecoder.from_original(tmp_path)
    config.write_text(json.dumps({"embedding": {}}))
    with pytest.raises(ConfigError, match="not a configuration of the published code"):
        RecurrentDecoder.from_original(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sub_normalization": True}, "sub_normalization is not supported"),
        ({"nonlin": "Tanh"}, "nonlin=Tanh is not supported"),
        ({"use_bias": True}, "they must be equal here"),
        ({"norm": "BatchNorm1d"}, "norm=BatchNorm1d is not supported; known: LayerNorm"),
    ],
)
def test_published_settings_that_are_not_computed_here(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    arch = published("rec_abacus", tmp_path, "state_dict.pth", False)
    (tmp_path / "model_config.json").write_text(json.dumps(arch | change))
    with pytest.raises(ConfigError, match=message):
        RecurrentDecoder.from_original(tmp_path)


def test_damaged_weights(tmp_path: Path) -> None:
    published("rec_abacus", tmp_path, "state_dict.pth", False)
    model = RecurrentDecoder.from_original(tmp_path)
    with pytest.raises(ConfigError, match="tensor decoder.weight is missing"):
        model.load_folder(_without(tmp_path, "decoder.weight"), VOCAB_SIZE, LENGTH)
    (tmp_path / "state_dict.pth").write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match=r"state_dict.pth: cannot be read"):
        model.load_folder(tmp_path, VOCAB_SIZE, LENGTH)
    (tmp_path / "state_dict.pth").unlink()
    with pytest.raises(ConfigError, match=r"has neither model.safetensors nor state_dict.pth"):
        model.load_folder(tmp_path, VOCAB_SIZE, LENGTH)
    with pytest.raises(ConfigError, match="num_layers is 2 there and 3 in the model"):
        model.with_overrides({"num_layers": 3}).load_folder(tmp_path, VOCAB_SIZE, LENGTH)


def _without(folder: Path, name: str) -> Path:
    """The checkpoint, one tensor short."""
    stored = torch.load(folder / "state_dict.pth", weights_only=True)
    del stored[name]
    torch.save(stored, folder / "state_dict.pth")
    return folder


def test_checkpoints_that_could_run_code_are_not_unpickled(tmp_path: Path) -> None:
    published("rec_abacus", tmp_path, "state_dict.pth", False)
    torch.save({"decoder.weight": Path("/")}, tmp_path / "state_dict.pth")
    with pytest.raises(ConfigError, match=r"state_dict.pth: cannot be read"):
        RecurrentDecoder.from_original(tmp_path).load_folder(tmp_path, VOCAB_SIZE, LENGTH)
