"""Edge masks over a tiny Llama, spread over workers."""

import pytest
import torch
from networks import group_of_one

from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment
from groundswell.config import ConfigError
from groundswell.experiment import ParameterGroup
from groundswell.protocols import Split
from groundswell.scaling.engines import engine_class
from groundswell.scaling.network import build_network
from groundswell.training.flat import FlatParameters, PackedAdamW, initial_row
from groundswell.training.pack import build_dataset, parameter_specs
from groundswell.training.sampler import generator
from models.edge_masked import EdgeMasked
from models.edge_objective import EdgePruning
from tests.groundswell.scaling.test_equal_science import assert_equal_science, curves
from tests.groundswell.scaling.workers import run_workers
from tests.models.edge_golden import write_network
from tests.models.edge_pairs import RandomPairs

STRATEGIES = {
    "ddp": {"scaling.strategy": "ddp"},
    "fsdp": {"scaling.strategy": "fsdp"},
    "zero_2": {"scaling.strategy": "deepspeed", "scaling.zero_stage": 2},
    "zero_3": {"scaling.strategy": "deepspeed", "scaling.zero_stage": 3},
}


@pytest.fixture
def pruning(tmp_path) -> Experiment:
    folder = write_network("llama", tmp_path / "network")
    return Experiment(
        task=RandomPairs(size=53),
        model=EdgeMasked(path=str(folder), mask_embeddings=False, init_log_alpha=3.0),
        objective=EdgePruning(target=1.1, warmup_steps=6),
        optimizer=AdamW(
            lr=0.4, weight_decay=0.01, warmup_steps=2, groups=(ParameterGroup(match="multipliers", ascent=True),)
        ),
        budget=Budget(steps=6, batch_size=8),
        metrics_every=1,
        evaluation=Evaluation(schedule=Every(every=3)),
        checkpointing=Checkpointing(schedule=Every(every=3)),
    )


def in_a_pack(experiment, batch, answer, updates):
    """loss and metrics of each update, with the optimizer of packs."""
    specs = parameter_specs(experiment)
    parameters = FlatParameters(specs, initial_row(specs, generator(experiment.seed, "init"))[None])
    optimizer = PackedAdamW(parameters, [experiment.optimizer], updates)
    for update in range(updates):
        scheduled = {k: torch.tensor([v]) for k, v in experiment.objective.scheduled(update, updates).items()}
        parameters.grad.zero_()
        source = torch.Generator().manual_seed(update)
        loss, metrics = experiment.objective.loss(
            experiment.model, parameters.views, batch, answer, [source], scheduled
        )
        loss.sum().backward()
        factor = experiment.optimizer.lr_factor(update, updates)
        optimizer.step()
        yield factor, {name: float(value.detach()) for name, value in {"loss": loss, **metrics}.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "zero" in name else name for name in STRATEGIES]
)
def test_an_engine_computes_what_a_pack_does(pruning, name, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # DeepSpeed asks for it
    experiment = pruning.with_overrides(STRATEGIES[name])
    dataset = build_dataset(experiment)
    rows = dataset.train.select(slice(0, 8))
    batch = Split(rows.tokens[None], rows.positions[None], rows.targets[None])
    with group_of_one(tmp_path):
        engine = engine_class(experiment.scaling.strategy)(experiment, dataset.answer, torch.device("cpu"), 1)
        for update, (factor, expected) in enumerate(in_a_pack(experiment, batch, dataset.answer, 4)):
            engine.step_module.schedule(update, 4, torch.device("cpu"))
            found = engine.update([(batch, torch.ones(()))], factor, torch.Generator().manual_seed(update))
            assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, abs=1e-4), update
        weights = engine.full_weights()
        assert weights["masks.edges"].dtype == torch.float32
        assert weights["masks.edges"].shape == (162,)
        assert engine.evaluate(batch)["exact_match"].shape == (8,)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_workers_equal_one(pruning, make_run, name):
    folders = []
    for workers in (1, 2):
        spread = pruning.with_overrides(STRATEGIES[name] | {"scaling.num_workers": workers})
        folders.append(make_run(spread, f"workers-{workers}"))
        run_workers(folders[-1], workers)
        assert folders[-1].status().state == "finished"
    assert_equal_science(*folders, tolerance=2e-4)
    last = curves(folders[0])[6]
    assert last["train/target"] == pytest.approx(1.1 * 5 / 6, abs=1e-5)
    assert last["train/lambda_2"] > 0


def test_masks_are_never_rounded(pruning):
    for strategy in ("fsdp", "deepspeed"):
        rough = {"scaling.strategy": strategy, "scaling.precision": "bf16", "scaling.num_workers": 2}
        with pytest.raises(ConfigError, match=f"{strategy} would round what EdgeMasked trains"):
            build_network(pruning.with_overrides(rough))
