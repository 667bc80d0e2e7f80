"""Pruning compiled programs finds their known circuits: the task is kept exactly with no more edges than greedy removal
leaves (11 and 7)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analysis.edge_greedy import same_answers
from groundswell import AdamW, Budget, Experiment
from groundswell.experiment import ParameterGroup
from groundswell.protocols import Split
from groundswell.training.pack import Member, Pack
from models.edge_masked import EdgeMasked
from models.edge_masks import Circuit, binary_circuit
from models.edge_objective import EdgePruning
from models.edge_reference import masked_logits
from models.tracr_compiler import compile_program
from models.tracr_network import TracrNetwork
from models.tracr_programs import PROGRAMS
from tasks.tracr_tasks import TracrProportion, TracrReverse

CPU = torch.device("cpu")


def written(name: str, folder: Path) -> EdgeMasked:
    program = PROGRAMS[name]
    TracrNetwork(compile_program(program.expression, program.vocabulary, program.max_length)).save(folder / name)
    return EdgeMasked(path=str(folder / name), ablation="zero", pairs=False)


def optimizer(lr: float, multiplier_lr: float, warmup_steps: int, *groups: ParameterGroup) -> AdamW:
    """Plain AdamW, all masks at one rate."""
    climb = ParameterGroup(match="multipliers", lr=multiplier_lr, ascent=True)
    return AdamW(
        lr=lr,
        weight_decay=0.01,
        decay_all=True,
        warmup_steps=warmup_steps,
        schedule="linear",
        groups=(*groups, climb),
    )


def reverse(folder: Path) -> list[Experiment]:
    still = ParameterGroup(match="multipliers.nodes", frozen=True)
    base = Experiment(
        task=TracrReverse(pairs=False),
        model=written("reverse", folder),
        objective=EdgePruning(target=1.02, warmup_steps=5_900, token_reduction="sum"),
        optimizer=optimizer(0.03, 0.001, 1_500, still),
        budget=Budget(steps=6_000, batch_size=16),
    )
    # not every seed ends well: what a mask breaks in saturated attention has almost no gradient to come back by
    return [base.with_overrides({"seed": seed}) for seed in (0, 1)]


def xproportion(folder: Path) -> list[Experiment]:
    one = Experiment(
        task=TracrProportion(pairs=False),
        model=written("xproportion", folder),
        objective=EdgePruning(target=0.92, node_target=0.4, node_loss=True, warmup_steps=640, answer_space="positions"),
        optimizer=optimizer(1.0, 0.0001, 96),
        budget=Budget(steps=720, batch_size=16),
        seed=42,
    )
    return [one]


def pruned(experiments: list[Experiment]) -> list[tuple[Circuit, float]]:
    """The runs' circuits, and on which part of all sequences each answers as the whole network does."""
    pack = Pack([Member.create(experiment, CPU) for experiment in experiments])
    pack.train(experiments[0].budget.steps)
    model, data = pack.model, pack.members[0].dataset.train
    assert isinstance(model, EdgeMasked)
    assert isinstance(data, Split)
    network = model.frozen(CPU)
    whole, found = network.run(data.tokens, data.positions).logits, []
    for row in range(len(experiments)):
        circuit = binary_circuit(model, pack.parameters.select([row]))
        inputs = (circuit.mask[None], circuit.nodes[None], data.tokens[None], None, data.positions[None])
        found.append((circuit, same_answers(masked_logits(network, *inputs)[0], whole).float().mean().item()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("experiments", "edges"), [(xproportion, 7), (reverse, 11)])
def test_pruning_finds_the_known_circuit(tmp_path, experiments, edges):
    exact = [circuit.num_edges for circuit, kept in pruned(experiments(tmp_path)) if kept == 1]
    assert exact
    assert 0 < min(exact) <= edges
