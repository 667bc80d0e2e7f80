import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment
from groundswell.config import ConfigError
from groundswell.experiment import ParameterGroup
from groundswell.training.flat import FlatParameters, PackedAdamW, initial_row
from groundswell.training.pack import Member, parameter_specs
from models.decoder import Decoder
from models.edge_masked import EDGES, NODES, EdgeMasked
from models.edge_masks import binary_circuit, load_edges
from models.edge_objective import EdgePruning
from models.edge_original import load_original
from models.objectives import AnswerLoss
from tests.models.edge_golden import FOLDER, arrays, gpt2_graph, write_network
from tests.models.edge_pairs import RandomPairs

FORMS = ("reference", "fast")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return write_network("gpt2", tmp_path_factory.mktemp("network"))


@pytest.fixture(params=FORMS)
def model(gpt2, request):
    return EdgeMasked(path=str(gpt2), form=request.param)


def random_parameters(model, num_runs, spread=3.0):
    source = torch.Generator().manual_seed(0)
    return {
        spec.name: torch.randn(num_runs, *spec.shape, generator=source) * spread for spec in model.parameters(61, 16)
    }


def batch(model, num_runs=None):
    """One batch of the task that all runs share, or a copy each."""
    split = RandomPairs(num_examples=5).build().train
    return [x.expand(num_runs or 1, *x.shape) for x in (split.tokens, split.positions)]


def test_untouched_masks_leave_the_network_as_it_is(model):
    tokens, positions = batch(model)
    parameters = {spec.name: torch.full((1, *spec.shape), spec.init_value) for spec in model.parameters(61, 16)}
    found = model.answer_logits(parameters, tokens, positions)
    torch.testing.assert_close(found, model.whole_logits(tokens, positions), atol=3e-4, rtol=0)


def test_runs_of_a_pack_equal_runs_alone(model):
    parameters, (tokens, positions) = random_parameters(model, 3), batch(model, 3)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    drawn, even = model.answer_logits(parameters, tokens, positions, generators), None
    even = model.answer_logits(parameters, tokens.contiguous(), positions.contiguous())
    torch.testing.assert_close(even, model.answer_logits(parameters, tokens, positions), atol=1e-5, rtol=1e-4)
    for run in range(3):
        own = {name: tensor[run : run + 1] for name, tensor in parameters.items()}
        alone = model.answer_logits(own, tokens[:1], positions[:1], [torch.Generator().manual_seed(run)])
        torch.testing.assert_close(alone[0], drawn[run], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            model.answer_logits(own, tokens[:1], positions[:1])[0], even[run], atol=1e-5, rtol=1e-4
        )
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)


def test_zero_ablation_reads_no_corrupted_tokens(gpt2):
    tokens, positions = batch(None)
    half = tokens[..., : tokens.shape[-1] // 2]
    for form in FORMS:
        with_pairs = EdgeMasked(path=str(gpt2), ablation="zero", form=form)
        alone = EdgeMasked(path=str(gpt2), ablation="zero", pairs=False, form=form)
        parameters = random_parameters(alone, 1)
        found = alone.answer_logits(parameters, half, positions)
        torch.testing.assert_close(found, with_pairs.answer_logits(parameters, tokens, positions))
        assert not torch.allclose(found, alone.whole_logits(half, positions), atol=1e-2)


def test_masks_are_float32_whatever_the_network_computes_in(gpt2):
    exact, rough = (EdgeMasked(path=str(gpt2), dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert rough.frozen("cpu").dtype == torch.bfloat16
    parameters, (tokens, positions) = random_parameters(exact, 1), batch(exact)
    edges, nodes = rough.sample(parameters, [torch.Generator().manual_seed(0)])
    assert edges.dtype == nodes.dtype == torch.float32
    edges.requires_grad_()
    logits = rough.masked_logits(edges, nodes, tokens, positions)
    torch.testing.assert_close(logits.float(), exact.masked_logits(edges, nodes, tokens, positions), atol=0.1, rtol=0.1)
    logits.float().sum().backward()
    assert edges.grad.dtype == torch.float32
    assert edges.grad.isfinite().all()


def test_every_parameter_of_a_fresh_run_is_set(gpt2):
    """The published code leaves masks that the folder lacks uninitialised."""
    row = Member.create(experiment(gpt2), torch.device("cpu")).initial_row()
    edges, nodes = gpt2_graph("emb").num_edges, gpt2_graph("emb").num_writers
    masks = row[row > 5]
    assert len(masks) == edges + nodes
    assert (masks - 10).abs().max() < 0.06
    assert masks.std() == pytest.approx(0.01, rel=0.2)
    assert (row[row <= 5] == 0).all()  # multipliers, and gaps


def test_a_folder_comes_back(gpt2, tmp_path):
    model = EdgeMasked(path=str(gpt2))
    parameters = {name: tensor[0] for name, tensor in random_parameters(model, 1).items()}
    model.save_folder(parameters, tmp_path / "saved", ("a", "b"))
    back = model.load_folder(tmp_path / "saved", 61, 16)
    assert back.keys() == parameters.keys()
    assert all(torch.equal(back[name], parameters[name]) for name in parameters)
    circuit = binary_circuit(model, {name: tensor[None] for name, tensor in parameters.items()})
    assert 0 < circuit.num_edges < circuit.graph.num_edges
    assert load_edges(tmp_path / "saved" / "edges.json", circuit.graph).edges == circuit.edges


def test_a_damaged_folder_is_refused(gpt2, tmp_path):
    model = EdgeMasked(path=str(gpt2))
    parameters = {name: tensor[0] for name, tensor in random_parameters(model, 1).items()}
    model.save_folder(parameters, tmp_path, ())
    tensors = load_file(tmp_path / "model.safetensors")
    for change, message in (
        ({NODES: None}, "tensor masks.nodes is missing"),
        ({EDGES: tensors[EDGES][:-1]}, r"masks.edges is \[301\], the model needs \[302\]"),
        ({"multipliers.edges": torch.tensor([0.0, float("nan")])}, "multipliers.edges is not finite"),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ConfigError, match=message):
            model.load_folder(tmp_path, 61, 16)
    with pytest.raises(ConfigError, match="model_type 'gpt2' has no edge masks"):
        model.load_folder(gpt2, 61, 16)


def test_a_published_checkpoint_is_read(gpt2, tmp_path):
    prefix = "gp_emb_node/final/"
    names = {k[len(prefix) :]: v for k, v in arrays("gpt2_tiny_train").items() if k.startswith(prefix)}
    weights = load_file(FOLDER / "gpt2_tiny_weights.safetensors")
    save_file({f"transformer.{k}": v for k, v in names.items()} | weights, tmp_path / "model.safetensors")
    found = load_original(tmp_path, gpt2_graph("emb"))
    specs = {spec.name: spec.shape for spec in EdgeMasked(path=str(gpt2)).parameters(61, 16)}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == specs
    assert found["multipliers.edges"].tolist() == [float(names[f"sparsity_lambda_edges_{p}"]) for p in (1, 2)]
    with pytest.raises(ConfigError, match="masks for"):
        load_original(tmp_path, gpt2_graph("noemb"))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"has no 0\.q_read_log_alphas"):
        load_original(tmp_path, gpt2_graph("emb"))


def experiment(path, **model):
    return Experiment(
        task=RandomPairs(),
        model=EdgeMasked(path=str(path), **model),
        objective=EdgePruning(target=0.9, warmup_steps=8),
        optimizer=AdamW(
            lr=0.5, weight_decay=0.01, groups=(ParameterGroup(match="multipliers", lr=0.5, ascent=True),)
        ),
        budget=Budget(steps=12, batch_size=4),
        metrics_every=4,
        evaluation=Evaluation(schedule=Every(every=4)),
        checkpointing=Checkpointing(schedule=Every(every=4)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.groups": ()}, "multipliers.edges must climb; add a group with match=multipliers, ascent=true"),
        (
            {"objective.node_loss": True, "optimizer.groups": [{"match": "multipliers.edges", "ascent": True}]},
            "multipliers.nodes must climb",
        ),
        ({"task.pairs": False}, "model.pairs is true: task RandomPairs has clean inputs only"),
        ({"model.pairs": False}, "model.ablation: corrupted needs a corrupted input"),
        ({"model.pairs": False, "model.ablation": "zero"}, "task RandomPairs has pairs"),
        ({"objective.target": -0.1}, "objective.target"),
        ({"objective.target": 2.5}, "objective.target"),
        (
            {"objective.schedule": "logarithmic", "objective.target": 1.02},
            "objective.target: 1.02 does not go with schedule",
        ),
    ],
)
def test_users_mistakes(gpt2, changes, message):
    with pytest.raises(ConfigError, match=message):
        experiment(gpt2).with_overrides(changes)


def test_rates_of_groups_differ_within_a_pack(gpt2):
    one = experiment(gpt2)
    other = one.with_overrides({"optimizer.groups": [{"match": "multipliers", "lr": 0.1, "ascent": True}]})
    assert one.pack_key() == other.pack_key()
    frozen = {"optimizer.groups": [*other.optimizer.groups, ParameterGroup(match="masks.nodes", frozen=True)]}
    assert one.pack_key() != one.with_overrides(frozen).pack_key()
    joined = {"optimizer.decay_all": True}  # neighbours of equal settings then are one tensor
    assert one.with_overrides(joined).pack_key() != other.with_overrides(joined).pack_key()
    specs = parameter_specs(one)
    settings = [one.optimizer, other.optimizer]
    together = FlatParameters(specs, torch.ones(2, len(initial_row(specs, torch.Generator()))))
    optimizer = PackedAdamW(together, settings, 10)
    together.grad.fill_(1.0)
    optimizer.step()
    for row, own in enumerate(settings):
        alone = FlatParameters(specs, torch.ones_like(together.flat[:1]))
        single = PackedAdamW(alone, [own], 10)
        alone.grad.fill_(1.0)
        single.step()
        torch.testing.assert_close(together.flat[row].detach(), alone.flat[0].detach())
    climbed = together.views["multipliers.edges"][:, 0]
    assert climbed[0] > climbed[1] > 1


def test_a_network_of_another_machine_fails_when_the_run_starts(gpt2):
    elsewhere = experiment(gpt2).with_overrides({"model.path": "nowhere"})
    with pytest.raises(ConfigError, match="nowhere"):
        parameter_specs(elsewhere)


def test_a_folder_without_a_masked_form_is_refused(gpt2, tmp_path):
    write_network("gpt2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(ConfigError, match="mamba"):
        experiment(gpt2).with_overrides({"model.path": str(tmp_path)})


def test_edge_pruning_needs_edge_masks(gpt2):
    with pytest.raises(ConfigError, match="Decoder has none; use EdgeMasked"):
        experiment(gpt2).with_overrides({"model": Decoder(width=16, num_heads=2)})


def test_ordinary_objectives_train_masks_too(gpt2):
    one = experiment(gpt2)
    split = one.task.build().train.select(slice(0, 4))
    shared = type(split)(*(x[None] for x in (split.tokens, split.positions, split.targets)))
    parameters = {k: v.requires_grad_() for k, v in random_parameters(one.model, 1).items()}
    loss, _ = AnswerLoss().loss(one.model, parameters, shared, one.task.build().answer, [torch.Generator()])
    loss.sum().backward()
    assert parameters[EDGES].grad.any()
