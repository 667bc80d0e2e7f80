"""Folders: the exchange with transformers, round trips of what only we can express, and what wrong folders say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundswell.config import ConfigError
from models.decoder import Decoder

VOCABULARY = tuple(f"<e_{n}>" for n in range(19))
SMALL = Decoder(num_layers=2, num_heads=2, width=8)
TOKENS = torch.randint(19, (3, 6), generator=torch.Generator().manual_seed(0))


def weights(decoder: Decoder, dtype: torch.dtype = torch.float32, length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    specs = decoder.parameters(len(VOCABULARY), length)
    return {s.name: (s.init_value + 0.1 * torch.randn(s.shape, generator=generator)).to(dtype) for s in specs}


def our_logits(decoder: Decoder, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    return decoder.logits({name: tensor.unsqueeze(0) for name, tensor in parameters.items()}, TOKENS.unsqueeze(0))[0]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tied_head": False},
        {"activation": "relu", "mlp_width": 12},
        {"activation": "gelu", "num_positions": 9, "num_layers": 1},
    ],
)
def test_transformers_loads_what_we_save(fields: dict, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    decoder = SMALL.with_overrides(fields)
    parameters = weights(decoder, torch.float64)
    decoder.save_folder(parameters, tmp_path, VOCABULARY)
    theirs, report = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert set(report["missing_keys"]) <= ({"lm_head.weight"} if decoder.tied_head else set())
    with torch.no_grad():
        result = theirs.eval()(TOKENS, output_hidden_states=True)
    torch.testing.assert_close(our_logits(decoder, parameters), result.logits, atol=1e-10, rtol=1e-10)
    states = decoder.hidden_states({name: t.unsqueeze(0) for name, t in parameters.items()}, TOKENS.unsqueeze(0))[0]
    torch.testing.assert_close(states, torch.stack(result.hidden_states), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", [True, False])
def test_we_load_what_transformers_saves(dtype: torch.dtype, prefix: bool, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=19, n_positions=11, n_embd=8, n_layer=2, n_head=4, n_inner=20, activation_function="gelu"
    )
    theirs = GPT2LMHeadModel(config).to(dtype)
    (theirs if prefix else theirs.transformer).save_pretrained(tmp_path)
    decoder = Decoder.from_huggingface(tmp_path)
    assert (decoder.num_heads, decoder.mlp_width, decoder.num_positions, decoder.dropout) == (4, 20, 11, 0.1)
    parameters = decoder.load_folder(tmp_path, 19, 6)
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float32}
    with torch.no_grad():
        expected = theirs.float().eval()(TOKENS).logits
    torch.testing.assert_close(our_logits(decoder, parameters), expected, atol=1e-5, rtol=1e-5)


def test_sharded_folders_and_stored_causal_masks(tmp_path: Path) -> None:
    SMALL.save_folder(weights(SMALL), tmp_path, VOCABULARY)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 6, 6)  # what old releases stored beside the weights
    names = sorted(tensors)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    loaded = SMALL.load_folder(tmp_path, 19, 6)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights(SMALL).items())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layer_norm": False},
        {"num_recurrences": 2, "re_embed": True, "re_embed_temperature": 2.0},
        {"tied_head": False},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(fields: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    decoder = SMALL.with_overrides({"init_scale": 2.0, **fields})
    parameters = weights(decoder, dtype)
    packed_view = {name: torch.stack([tensor, tensor])[1] for name, tensor in parameters.items()}
    decoder.save_folder(packed_view, tmp_path / "new", VOCABULARY)
    assert sorted(os.listdir(tmp_path / "new")) == ["config.json", "model.safetensors", "vocabulary.json"]
    assert json.loads((tmp_path / "new/vocabulary.json").read_text()) == list(VOCABULARY)
    loaded = decoder.load_folder(tmp_path / "new", 19, 6)
    assert loaded.keys() == parameters.keys()
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == dtype for name, tensor in parameters.items())
    assert Decoder.from_huggingface(tmp_path / "new") == decoder.with_overrides({"num_positions": 6})
    config = json.loads((tmp_path / "new/config.json").read_text())
    plain = fields in ({}, {"tied_head": False})
    assert config["architectures"] == (["GPT2LMHeadModel"] if plain else ["models.decoder.Decoder"])


def test_transformers_refuses_what_gpt2_cannot_express(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    looped = SMALL.with_overrides({"num_recurrences": 2})
    looped.save_folder(weights(looped), tmp_path, VOCABULARY)
    with pytest.raises(ValueError, match="groundswell_decoder"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_folder_is_replaced_as_a_whole_file(tmp_path: Path) -> None:
    SMALL.save_folder(weights(SMALL), tmp_path, VOCABULARY)
    changed = {name: tensor + 1 for name, tensor in weights(SMALL).items()}
    SMALL.save_folder(changed, tmp_path, VOCABULARY)
    loaded = SMALL.load_folder(tmp_path, 19, 6)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in changed.items())
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "vocabulary.json"]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 3}, r"config\.json: num_layers is 2 there and 3 in the model; set model\.num_layers=2"),
        ({"num_heads": 4}, "num_heads is 2 there and 4"),
        ({"activation": "relu"}, "activation is gelu_new there and relu"),
        ({"layer_norm": False}, "layer_norm is True there and False"),
        ({"num_recurrences": 2}, "num_recurrences is 1 there and 2"),
        ({"width": 16}, r"model\.safetensors: transformer\.wte\.weight is \[19, 8\], the model needs \[19, 16\]"),
        ({"mlp_width": 40}, r"mlp\.c_fc\.weight is \[8, 32\], the model needs \[8, 40\]"),
        ({"num_positions": 8}, r"transformer\.wpe\.weight is \[6, 8\], the model needs \[8, 8\]"),
    ],
)
def test_another_network_is_refused(fields: dict, message: str, tmp_path: Path) -> None:
    SMALL.save_folder(weights(SMALL), tmp_path, VOCABULARY)
    with pytest.raises(ConfigError, match=message):
        SMALL.with_overrides(fields).load_folder(tmp_path, 19, 6)


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: No such file"):
        SMALL.load_folder(tmp_path, 19, 6)
    SMALL.save_folder(weights(SMALL), tmp_path, VOCABULARY)
    path = tmp_path / "model.safetensors"
    with pytest.raises(ConfigError, match=r"wte\.weight is \[19, 8\], the model needs \[20, 8\]"):
        SMALL.load_folder(tmp_path, 20, 6)
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if "ln_f.bias" not in name}, path)
    with pytest.raises(ConfigError, match=r"transformer\.ln_f\.bias is missing"):
        SMALL.load_folder(tmp_path, 19, 6)
    save_file({**tensors, "transformer.extra": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match=r"transformer\.extra is not part of the model"):
        SMALL.load_folder(tmp_path, 19, 6)
    save_file({**tensors, "lm_head.weight": torch.zeros(19, 8)}, path)
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs from the token embedding"):
        SMALL.load_folder(tmp_path, 19, 6)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"model\.safetensors: cannot be read .* damaged"):
        SMALL.load_folder(tmp_path, 19, 6)
    path.unlink()
    with pytest.raises(ConfigError, match="safetensors only"):
        SMALL.load_folder(tmp_path, 19, 6)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        SMALL.load_folder(tmp_path, 19, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 is not supported; only 1e-05"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"activation_function": "silu"}, "activation_function 'silu' is not supported"),
        ({"attn_pdrop": 0.3}, "must be equal"),
        ({"n_head": None}, "num_heads: Input should be a valid integer"),
        ({"n_layer": ...}, "has no field 'n_layer'"),
    ],
)
def test_other_gpt2_configurations_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    SMALL.save_folder(weights(SMALL), tmp_path, VOCABULARY)
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), **change}
    del config["groundswell"]
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    with pytest.raises(ConfigError, match=message):
        Decoder.from_huggingface(tmp_path)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="20 tokens for 19 embedding rows"):
        SMALL.save_folder(weights(SMALL), tmp_path, (*VOCABULARY, "<more>"))
    assert not any(tmp_path.iterdir())
