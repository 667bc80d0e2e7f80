"""transformers' networks as models: names, equal logits in every form, folders to and fro, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from networks import LENGTH, VOCAB_SIZE, batch, filled, group_of_one, leaves, weights
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from groundswell.config import ConfigError
from groundswell.protocols import Task
from models import transformers_folder
from models.decoder import Decoder
from models.transformers_model import TransformersModel
from tasks.modular_arithmetic import ModularArithmetic

LLAMA = TransformersModel(num_layers=2, num_heads=4, num_kv_heads=2, width=16, num_positions=8)
GPT2 = TransformersModel(architecture="gpt2", num_layers=2, num_heads=2, width=8, num_positions=8)
VARIANTS = {
    "llama": LLAMA,
    "llama, tied": LLAMA.with_overrides({"tied_head": True, "num_kv_heads": None}),
    "llama, eager": LLAMA.with_overrides({"attention": "eager"}),
    "gpt2": GPT2,
    "gpt2, untied": GPT2.with_overrides({"tied_head": False}),
    "gpt2, eager": GPT2.with_overrides({"attention": "eager", "mlp_width": 12}),
}
TIED = [VARIANTS[name] for name in ("llama, tied", "gpt2", "gpt2, eager")]
VOCABULARY = tuple(f"<e_{n}>" for n in range(VOCAB_SIZE))


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> TransformersModel:
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


def released(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, **fields) -> Path:
    """A folder as transformers writes it, with random weights that are large enough to tell networks apart."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 8,
    }  # fmt: skip
    if model_type == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 8}
    shared = {"vocab_size": VOCAB_SIZE + 3, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(sizes | shared | fields))
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def their_logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokens, positions, _ = batch()
    with torch.no_grad():
        logits = theirs(tokens).logits
    return logits.gather(1, positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


def our_logits(model: TransformersModel, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    tokens, positions, _ = batch()
    return model.answer_logits({n: t.unsqueeze(0) for n, t in parameters.items()}, tokens[None], positions[None])[0]


# ---- parameters and forms of the network ----


def test_specs_are_the_networks_parameters(model: TransformersModel) -> None:
    specs = {spec.name: spec for spec in model.parameters(VOCAB_SIZE, LENGTH)}
    network = model.network(VOCAB_SIZE, LENGTH)
    parameters = dict(network.named_parameters())
    assert list(parameters) == list(specs)
    assert all(tuple(p.shape) == specs[name].shape and p.is_meta for name, p in parameters.items())
    assert not any(buffer.is_meta for buffer in network.buffers())
    assert len(network.blocks) == model.num_layers
    for name, spec in specs.items():
        if len(spec.shape) == 2:
            scaled = name.endswith("c_proj.weight")
            assert spec.decayed and spec.init_std == pytest.approx(0.02 / math.sqrt(4) if scaled else 0.02)
        else:
            assert not spec.decayed and spec.init_std is None and spec.init_value == float(not name.endswith("bias"))
    assert ("lm_head.weight" in specs) == (model not in TIED)


def test_llama_sizes() -> None:
    shapes = {spec.name: spec.shape for spec in LLAMA.parameters(VOCAB_SIZE, LENGTH)}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (VOCAB_SIZE, 16)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (8, 16)
    assert shapes["model.layers.1.mlp.up_proj.weight"] == (48, 16)  # 8/3 * 16 = 42.7
    config = LLAMA.with_overrides({"rope_theta": 5e5}).config(VOCAB_SIZE)
    assert config.rope_parameters["rope_theta"] == 5e5


def test_initial_weights_are_spread_as_in_transformers() -> None:
    """The specs say what transformers' own initialisation draws."""
    from transformers import AutoModelForCausalLM

    for model in (LLAMA, GPT2):
        wide = model.with_overrides({"width": 64, "init_std": 0.05})
        torch.manual_seed(0)
        theirs = dict(AutoModelForCausalLM.from_config(wide.config(500)).named_parameters())
        for spec in wide.parameters(500, LENGTH):
            if spec.init_std is None:
                assert (theirs[spec.name] == spec.init_value).all()
            else:
                assert theirs[spec.name].std().item() == pytest.approx(spec.init_std, rel=0.1), spec.name


def assert_same(model: TransformersModel, network: torch.nn.Module) -> None:
    parameters = leaves(model, weights(model))
    tokens, positions, factors = batch()
    expected = model.answer_logits(parameters, tokens[None], positions[None])[0]
    (expected * factors).sum().backward()
    logits = network(tokens, positions)
    (logits * factors).sum().backward()
    assert torch.equal(logits, expected)
    for name, parameter in network.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        assert torch.equal(grad, parameters[name].grad[0]), name


def test_the_network_equals_the_pure_function(model: TransformersModel) -> None:
    network = filled(model, weights(model))
    assert_same(model, network)
    embedding = next(network.parameters())
    assert (network.get_submodule("lm_head").weight is embedding) == (model in TIED)


@pytest.mark.parametrize("recompute", [False, True])
def test_sharded(model: TransformersModel, recompute: bool, group: None) -> None:
    network = filled(model, weights(model))
    mesh = init_device_mesh("cpu", (1,))
    for block in network.blocks:
        if recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    assert_same(model, network)


def test_blocks_and_head_are_called_as_modules(model: TransformersModel) -> None:
    network = filled(model, weights(model))
    shapes: list[tuple[int, ...]] = []
    for module in [*network.blocks, network.get_submodule("lm_head")]:
        module.register_forward_hook(lambda *args: shapes.append(tuple(args[-1].shape)))
    tokens, positions, _ = batch()
    network(tokens, positions)
    assert shapes == [(3, LENGTH, model.width)] * model.num_layers + [(3, 4, VOCAB_SIZE)]


def test_autocast(model: TransformersModel) -> None:
    network = filled(model, weights(model))
    tokens, positions, factors = batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(tokens, positions)
    (logits.float() * factors).sum().backward()
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), network(tokens, positions), atol=0.1, rtol=0.1)


def test_half_precision_keeps_the_rotary_frequencies() -> None:
    network = filled(LLAMA, weights(LLAMA))
    exact = {name: buffer.clone() for name, buffer in network.named_buffers()}
    torch.nn.Sequential(network).bfloat16()
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert exact and all(torch.equal(buffer, exact[name]) for name, buffer in network.named_buffers())


def test_a_pack_is_its_runs(model: TransformersModel) -> None:
    one = weights(model)
    two = {name: tensor * 1.5 for name, tensor in one.items()}
    tokens, positions, _ = batch()
    packed = model.answer_logits(
        {name: torch.stack([one[name], two[name]]) for name in one},
        torch.stack([tokens, tokens.flip(0)]),
        torch.stack([positions, positions.flip(0)]),
    )
    assert torch.equal(packed[0], our_logits(model, one))
    assert torch.equal(packed[1].flip(0), our_logits(model, two))


def test_what_follows_a_position_does_not_matter(model: TransformersModel) -> None:
    """So right padding needs no mask."""
    tokens, _, _ = batch()
    other = tokens.clone()
    other[:, 3:] = 0
    positions = torch.arange(3).expand(3, -1)
    parameters = {name: tensor.unsqueeze(0) for name, tensor in weights(model).items()}
    logits = [model.answer_logits(parameters, x[None], positions[None]) for x in (tokens, other)]
    torch.testing.assert_close(*logits)


def test_gpt2_equals_our_decoder() -> None:
    decoder = Decoder(num_layers=2, num_heads=2, width=8, num_positions=8)
    values = weights(decoder, torch.float64)
    parameters = {name: tensor.unsqueeze(0) for name, tensor in values.items()}
    tokens, positions, _ = batch()
    theirs = GPT2.answer_logits(parameters, tokens[None], positions[None])
    torch.testing.assert_close(theirs, decoder.answer_logits(parameters, tokens[None], positions[None]))


def test_flops(model: TransformersModel) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    if model.attention == "sdpa":  # the counter does not know the fused kernel of CPUs
        model = model.with_overrides({"attention": "eager"})
    network = filled(model, weights(model))
    tokens, positions, _ = batch()
    with FlopCounterMode(display=False) as counter:
        network(tokens, positions)
    assert counter.get_total_flops() == len(tokens) * model.flops_per_example(VOCAB_SIZE, LENGTH, 4)


# ---- folders ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transformers_loads_what_we_save(model: TransformersModel, dtype: torch.dtype, tmp_path: Path) -> None:
    values = weights(model, dtype)
    rows = {name: torch.stack([tensor, tensor])[1] for name, tensor in values.items()}  # views, as in a pack
    model.save_folder(rows, tmp_path, VOCABULARY)
    torch.testing.assert_close(their_logits(tmp_path, dtype), our_logits(model, values), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "vocabulary.json").read_text()) == list(VOCABULARY)
    loaded = model.load_folder(tmp_path, VOCAB_SIZE, LENGTH)
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[name], value) and loaded[name].dtype == dtype for name, value in values.items())
    assert TransformersModel(path=str(tmp_path)).initial_weights(VOCAB_SIZE, LENGTH) is not None


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_released_folders(model_type: str, tied: bool, tmp_path: Path) -> None:
    folder = released(tmp_path / "base", model_type, tie_word_embeddings=tied)
    (folder / "tokenizer.json").write_text("{}")
    model = TransformersModel(path=str(folder))
    reader = model.initial_weights(VOCAB_SIZE, LENGTH)
    assert reader is not None
    values = {spec.name: reader.read(spec.name) for spec in model.parameters(VOCAB_SIZE, LENGTH)}
    assert torch.equal(our_logits(model, values), their_logits(folder))
    model.save_folder(values, tmp_path / "saved", VOCABULARY)
    assert torch.equal(their_logits(tmp_path / "saved"), their_logits(folder))
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    assert model.load_folder(tmp_path / "saved", VOCAB_SIZE, LENGTH).keys() == values.keys()


def test_scaled_rotary_frequencies_of_a_folder(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4,
    }  # fmt: skip
    folder = released(tmp_path, rope_parameters=scaling)
    model = TransformersModel(path=str(folder))
    assert torch.equal(our_logits(model, model.load_folder(folder, VOCAB_SIZE, LENGTH)), their_logits(folder))


def test_a_folder_in_half_precision_with_dropout_and_a_padding_token(tmp_path: Path) -> None:
    folder = released(tmp_path, dtype=torch.bfloat16, attention_dropout=0.5, pad_token_id=1)
    model = TransformersModel(path=str(folder))
    values = model.load_folder(folder, VOCAB_SIZE, LENGTH)
    assert {value.dtype for value in values.values()} == {torch.float32}
    values["model.embed_tokens.weight"][1] = 0.1  # zero as released
    network = filled(model, values)
    tokens, positions, _ = batch()
    first = network(torch.ones_like(tokens), positions)
    assert torch.equal(first, network(torch.ones_like(tokens), positions))
    first.square().sum().backward()
    assert next(network.parameters()).grad[1].abs().max() > 0


def test_configuration_only(tmp_path: Path) -> None:
    folder = released(tmp_path)
    (folder / "model.safetensors").unlink()
    model = TransformersModel(path=str(folder), pretrained=False)
    assert model.initial_weights(VOCAB_SIZE, LENGTH) is None
    specs = model.parameters(VOCAB_SIZE, LENGTH)
    assert specs[0].shape == (VOCAB_SIZE + 3, 16) and specs[0].init_std == 0.3
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        TransformersModel(path=str(folder)).initial_weights(VOCAB_SIZE, LENGTH)


def test_large_networks_are_written_in_shards(tmp_path: Path) -> None:
    values = weights(LLAMA)
    row = torch.cat([value.flatten() for value in values.values()])  # one buffer, as a pack's row
    pieces = row.split([value.numel() for value in values.values()])
    views = {name: piece.view_as(value) for (name, value), piece in zip(values.items(), pieces, strict=True)}
    config = LLAMA.config(VOCAB_SIZE).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    transformers_folder.write(tmp_path, config, views, VOCABULARY, None, shard_bytes=4_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3 and all(shard.stat().st_size < 6_000 for shard in shards)
    assert all(torch.equal(LLAMA.load_folder(tmp_path, VOCAB_SIZE, LENGTH)[name], values[name]) for name in values)
    torch.testing.assert_close(their_logits(tmp_path), our_logits(LLAMA, values))


# ---- mistakes ----


def refused(folder: Path, model: TransformersModel, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model.load_folder(folder, VOCAB_SIZE, LENGTH)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(folder), *parts):
        assert part in message


def test_other_networks_are_refused(tmp_path: Path) -> None:
    LLAMA.save_folder(weights(LLAMA), tmp_path, VOCABULARY)
    for field, value, name in (
        ("rope_theta", 5e5, "rope_parameters"),
        ("num_layers", 3, "num_hidden_layers"),
        ("num_kv_heads", 4, "num_key_value_heads"),
        ("tied_head", True, "tie_word_embeddings"),
        ("architecture", "gpt2", "config.json"),
    ):
        others = {field: value} | ({"num_kv_heads": None} if value == "gpt2" else {})
        refused(tmp_path, LLAMA.with_overrides(others), name)
    tensors = load_file(tmp_path / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, LLAMA, "model.norm.weight is missing")
    save_file(tensors | {"model.norm.weight": norm[:3]}, tmp_path / "model.safetensors")
    refused(tmp_path, LLAMA, "model.norm.weight is [3], the model needs [16]")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused(tmp_path, LLAMA, "model_type 'bert' is not supported", "llama")


def test_too_many_tokens_for_the_embedding(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="20 tokens for 19 embedding rows"):
        LLAMA.save_folder(weights(LLAMA), tmp_path, [*VOCABULARY, "<more>"])


def test_check_against_the_task(tmp_path: Path) -> None:
    task: Task = ModularArithmetic(modulus=13)
    LLAMA.check(task)
    with pytest.raises(ValueError, match=r"^model\.num_positions: 1 positions are less than the task's"):
        LLAMA.with_overrides({"num_positions": 1}).check(task)
    folder = released(tmp_path)
    TransformersModel(path=str(folder)).check(task)
    with pytest.raises(ValueError, match=r"^model\.path: the network has 22 tokens, the task"):
        TransformersModel(path=str(folder)).check(ModularArithmetic(modulus=31))
    with pytest.raises(ValueError, match=r"nowhere/config\.json"):
        TransformersModel(path=str(tmp_path / "nowhere")).check(task)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1}))
    with pytest.raises(ValueError, match=r"^model\.path: 1 positions"):
        TransformersModel(path=str(folder)).check(task)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(ValueError, match="quantized"):
        TransformersModel(path=str(folder)).check(task)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 10}, "num_heads 4 does not divide width 10"),
        ({"width": 12}, "rotary"),
        ({"num_kv_heads": 3}, "num_kv_heads: 3 does not divide num_heads 4"),
        ({"architecture": "gpt2", "num_kv_heads": 2}, "num_kv_heads: is a field of llama"),
        ({"path": "folder", "num_layers": 3}, "num_layers: is decided by the folder"),
    ],
)
def test_fields_that_do_not_fit(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformersModel.from_dict(fields)
