"""Checkpoint folders of the published code, in and out."""

import json

import chain_golden as golden
import pytest
import torch

from groundswell.config import ConfigError
from models import chain_original
from models.chain_teacher import read_outline, teacher_in
from models.decoder import Decoder

CPU = torch.device("cpu")


def test_a_released_teacher(tmp_path):
    folder = golden.write_released("teacher", tmp_path / "checkpoint_0")
    outline = read_outline(folder)
    assert outline.vocab_size == 122
    assert outline.decoder.with_overrides({"init_std": 0.2}) == golden.decoder().with_overrides({"mlp_width": None})
    loaded = teacher_in(str(folder), CPU)
    assert loaded.parameters.keys() == golden.tensors("teacher").keys()
    batch = golden.hidden_batch("mult4")
    states = golden.student(folder).taught(batch.tokens, batch.positions).states[0].transpose(0, 1)
    torch.testing.assert_close(states, golden.array("mult4", "states/diagonal_dynamic"), atol=1e-5, rtol=1e-4)


def test_a_released_pair_is_coupled(tmp_path):
    folders = {
        "student_folder": str(golden.write_released("student", tmp_path / "student" / "checkpoint_6")),
        "emulator_folder": str(golden.write_released("emulator_k5", tmp_path / "emulator" / "checkpoint_5")),
    }
    model = golden.coupled(5, **folders)
    start = model.initial_weights(122, 160)
    parameters = {spec.name: start.read(spec.name)[None] for spec in model.parameters(122, 160)}
    batch = golden.none_batch("gsm8k")
    positions = golden.every_position(batch.tokens, batch.positions[..., 0])
    logits = model.answer_logits(parameters, batch.tokens, positions)[0]
    recorded = golden.array("gsm8k", "coupled_k5/logits").gather(1, positions[0][..., None].expand_as(logits))
    torch.testing.assert_close(logits, recorded, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"model\.softmax_temperature is 0\.1, in .* it is 0\.05"):
        model.with_overrides({"softmax_temperature": 0.1}).initial_weights(122, 160)
    with pytest.raises(ConfigError, match=r"tensor mixture_components\.weight is missing|is not part of the model"):
        model.with_overrides({"student_folder": folders["emulator_folder"]}).initial_weights(122, 160)


@pytest.mark.parametrize("network", ["teacher", "student", "emulator_k1", "emulator_k5"])
def test_written_as_it_was_read(network, tmp_path):
    read = golden.write_released(network, tmp_path / "read")
    tensors = chain_original.read_tensors(read)
    weights = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
    settings = {"mixture_size": 5, "softmax_temperature": 0.05} if network.startswith("emulator") else {}
    chain_original.write_original(tmp_path / "written", weights, str(tmp_path / "base"), settings)
    stored = torch.load(read / "state_dict.bin", weights_only=True)
    written = torch.load(tmp_path / "written" / "state_dict.bin", weights_only=True)
    expected = {name for name in stored if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    assert written.keys() == expected and all(torch.equal(written[name], stored[name]) for name in expected)
    config = json.loads((tmp_path / "written" / "config.json").read_text())
    assert config == {"base_model": str(tmp_path / "base"), "tokenizer_name": "gpt2", **settings}
    assert read_outline(tmp_path / "written") == read_outline(read)


def test_released_sizes_are_known_by_name(tmp_path):
    decoder = Decoder(num_layers=1, num_heads=2, width=128, num_positions=8)
    weights = {spec.name: torch.zeros(spec.shape) for spec in decoder.parameters(11, 8)}
    chain_original.write_original(tmp_path, weights, "gpt2-medium")
    assert read_outline(tmp_path).decoder.num_heads == 2


def test_folders_that_cannot_be_read(tmp_path):
    folder = golden.write_released("student", tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_model": "elsewhere"}))
    with pytest.raises(ConfigError, match="base_model 'elsewhere' is no local folder; it decides the number of heads"):
        read_outline(folder)
    (folder / "state_dict.bin").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"state_dict\.bin: cannot be read"):
        read_outline(folder)


def test_an_untied_head_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="tied heads only"):
        chain_original.write_original(tmp_path, {"lm_head.weight": torch.zeros(1)}, "gpt2")


def test_checkpoints_of_ours_are_exported(tmp_path):
    base = str(golden.write_base(tmp_path / "base"))
    vocabulary = [str(token) for token in range(122)]
    pair = {name: value.detach()[0] for name, value in golden.coupled_parameters(5).items()}
    golden.coupled(5).save_folder(pair, tmp_path / "coupled", vocabulary)
    chain_original.export_checkpoint(golden.write_teacher(tmp_path / "ours"), tmp_path / "teacher", base)
    chain_original.export_checkpoint(tmp_path / "coupled", tmp_path / "pair", base)
    for network, folder in (("teacher", "teacher"), ("student", "pair/student"), ("emulator_k5", "pair/emulator")):
        expected = golden.write_released(network, tmp_path / "expected" / network)
        found, wanted = (chain_original.read_tensors(path) for path in (tmp_path / folder, expected))
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        settings = json.loads((tmp_path / folder / "config.json").read_text())
        assert settings == json.loads((expected / "config.json").read_text()) | {"base_model": base}
