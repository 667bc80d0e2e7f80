"""Networks taken apart: against recorded states of the published code, our decoder and transformers' families."""

import json

import pytest
import torch
from edge_golden import arrays, write_network
from edge_networks import LENGTH, VARIANTS, VOCAB_SIZE, decoder, inputs, network, weights
from safetensors.torch import load_file, save_file

from groundswell.config import ConfigError
from models.decoder import Decoder
from models.edge_loading import load_edge_network

TAGS = ("emb", "noemb")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tag", TAGS)
def test_writers_and_logits_are_those_recorded(family, tag, tmp_path):
    recorded = arrays(f"{family}_tiny_cases")
    loaded = load_edge_network(write_network(family, tmp_path), tag == "emb")
    for run, ids in (("clean", "input_ids"), ("corr", "corr_input_ids")):
        tokens = recorded[ids].long()
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        whole = loaded.run(tokens, positions, keep_writers=True)
        states = recorded.get(f"{tag}/exact_full/{run}_writer_states")
        if states is not None:
            torch.testing.assert_close(whole.writers, states, atol=2e-5, rtol=1e-4)
        if run == "clean":
            expected = recorded["hf_clean_logits"]
            torch.testing.assert_close(whole.logits, expected, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(loaded.run(tokens, positions).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_decoder(variant):
    model, parts = decoder(variant), network(variant, True)
    tokens, _, positions = (x[0] for x in inputs(1))
    expected = model.answer_logits({n: w[None] for n, w in weights(model).items()}, tokens[None], positions[None])[0]
    for keep in (False, True):
        torch.testing.assert_close(parts.run(tokens, positions, keep).logits, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mask_embeddings", [True, False])
def test_parts_add_up_to_the_run(variant, mask_embeddings):
    parts = network(variant, mask_embeddings)
    tokens, _, positions = (x[0] for x in inputs(1))
    whole = parts.run(tokens, positions, keep_writers=True)
    graph = parts.graph
    assert whole.writers.shape == (graph.num_writers, *tokens.shape, parts.width)
    for layer in range(graph.num_layers):
        stream = whole.residual[2 * layer]
        start, heads = graph.writers_before(layer), graph.num_heads
        every = stream.expand(heads, *stream.shape)
        torch.testing.assert_close(parts.attend(layer, every, every, every), whole.writers[start : start + heads])
        few = every.gather(2, positions[None, :, :, None].expand(heads, -1, -1, parts.width))
        at_answers = whole.writers[start : start + heads].gather(2, positions[None, :, :, None].expand_as(few))
        torch.testing.assert_close(parts.attend(layer, few, every, every, positions), at_answers)
        torch.testing.assert_close(parts.mlp(layer, whole.residual[2 * layer + 1]), whole.writers[start + heads])
    total = whole.writers.sum(0)
    if not mask_embeddings:
        total = total + parts.embeddings(tokens).sum(0)
    torch.testing.assert_close(total, whole.residual[-1])


def test_a_folder_of_ours_loads_in_the_dtype_asked_for(tmp_path):
    model = decoder("rotary")
    stored = {name: value.bfloat16() for name, value in weights(model).items()}
    model.save_folder(stored, tmp_path, [str(token) for token in range(VOCAB_SIZE)])
    loaded = load_edge_network(tmp_path, dtype=torch.float64)
    assert loaded.graph.embeddings == ("tok_embeds",)
    tokens, _, positions = (x[0] for x in inputs(1))
    packed = {name: value.double()[None] for name, value in stored.items()}
    expected = model.answer_logits(packed, tokens[None], positions[None])[0]
    torch.testing.assert_close(loaded.run(tokens, positions).logits, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_llamas_of_other_families_equal_transformers(family, tmp_path):
    import transformers

    names = {"mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config}
    config = names[family](
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=family == "qwen2",
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    theirs.save_pretrained(tmp_path)
    tokens = inputs(1)[0][0]
    with torch.no_grad():
        expected = theirs(tokens).logits
    every = torch.arange(LENGTH).expand_as(tokens)
    torch.testing.assert_close(load_edge_network(tmp_path).run(tokens, every).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "bert"}, "model_type 'bert' has no masked form"), ({"hidden_act": "relu"}, "hidden_act 'relu'")],
)
def test_networks_without_a_masked_form(change, message, tmp_path):
    write_network("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        load_edge_network(tmp_path)


def test_re_embedding_has_no_masked_form(tmp_path):
    model = Decoder(num_layers=1, num_heads=2, width=16, num_recurrences=2, re_embed=True)
    model.save_folder(weights(model, torch.float32), tmp_path, [str(token) for token in range(VOCAB_SIZE)])
    with pytest.raises(ConfigError, match="re_embed has no masked form"):
        load_edge_network(tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    write_network("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is missing"):
        load_edge_network(tmp_path)


def test_too_long_a_sequence():
    with pytest.raises(ConfigError, match=f"sequences have {LENGTH + 1} tokens, the network takes {LENGTH}"):
        network("gpt2", True).embeddings(torch.zeros(1, LENGTH + 1, dtype=torch.long))
