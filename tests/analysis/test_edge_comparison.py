"""All methods on one network and task, and the report of a sweep of pruning runs."""

from dataclasses import replace

import pandas as pd
import pytest
from circuit_networks import GradedPairs, decoder_network, pruning_experiment, write_decoder

from analysis.circuit_evaluation import CircuitEvaluation
from analysis.circuit_paths import connected
from analysis.edge_comparison import METHODS, Found, Ground, draw, find, judge
from analysis.edge_pruning_report import edge_pruning_report
from groundswell import ConfigError
from groundswell.probes import run_probes
from groundswell.results import load_results
from groundswell.rundir import SweepFolder
from groundswell.sweep import PlannedRun
from groundswell.training.trainer import PackTrainer

TASK = GradedPairs()


@pytest.fixture(scope="module")
def ground() -> Ground:
    dataset = TASK.build()
    return Ground(decoder_network(), TASK, dataset.train, dataset.evaluation["test"])


def test_every_method_finds_circuits_of_the_sizes_asked_for(ground):
    told: list[str] = []
    found = find(ground, METHODS, [10, 30, 61], [1e-3, 1e-2], told=told.append)
    table = judge(ground, found)
    assert len(table) == len(found) == 3 + 3 + 2 + 3 * 3
    assert {line.split(":")[0] for line in told} >= {"EAP", "EAP-IG", "random edges"}
    for each, row in zip(found, table.to_dict("records"), strict=True):
        mask = each.circuit.mask
        assert connected(each.circuit.graph, mask).equal(mask)
        assert row["num_edges"] == mask.sum()
    whole = table[table["num_edges"] == ground.network.graph.num_edges]
    assert set(whole["method"]) == {"eap", "eap_ig", "random"}
    assert whole["kl"].max() < 1e-5
    assert table.loc[table["method"] == "random", "setting"].nunique() == 9


def test_judging_many_is_judging_each(ground):
    found = find(ground, ["random"], [20, 40])
    table = judge(ground, found)
    for row, each in enumerate(found):
        alone = judge(ground, [each]).iloc[0]
        assert alone["kl"] == pytest.approx(table.loc[row, "kl"], rel=1e-4, abs=1e-6)


def test_more_edges_than_there_are(ground):
    with pytest.raises(ConfigError, match="edges: 5 to 99; this graph has 1 to 61"):
        find(ground, ["eap"], [5, 99])


def test_figure_has_a_line_for_each_method(ground):
    found = find(ground, ["eap", "random"], [20, 40])
    mine = [Found("edge_pruning", "run", found[0].circuit)]
    figure = draw({"pairs": judge(ground, mine + found)})
    axes = figure.axes
    assert [ax.get_ylabel().split()[0] for ax in axes] == ["KL", "exact", "logit"]
    assert {line.get_label() for line in axes[0].lines} == {"Edge Pruning", "EAP", "random edges"}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two targets, two seeds, trained and asked."""
    path = tmp_path_factory.mktemp("sweeps")
    folder, planned = SweepFolder(path / "pruning"), []
    base = pruning_experiment(write_decoder(path / "network"))
    for target in (0.3, 0.9):
        for seed in (0, 1):
            axes = {"objective.target": target, "seed": seed}
            planned.append(PlannedRun(base.with_overrides(axes), axes, f"target={target} seed={seed}"))
    runs = [folder.create_run(run, "pack", place) for place, run in enumerate(planned)]
    for run in runs:
        trainer = PackTrainer([run])
        while not trainer.finished:
            trainer.advance()
        run_probes(run, [CircuitEvaluation()])
    return load_results(folder, planned, ["objective.target", "seed"], "seed")


def test_report_of_a_sweep(sweep):
    report = edge_pruning_report(sweep, ["eap", "random"], found_on=4, judged_on=6)
    assert list(report.table["target"]) == ["0.3", "0.9"]
    assert {"edges", "edge sparsity", "KL", "exact match", "logit difference"} <= set(report.table)
    (ax, *_) = report.figures["faithfulness"].axes
    assert {line.get_label() for line in ax.lines} == {"Edge Pruning", "EAP", "random edges"}
    kept = sorted((sweep.folder.path / "tables").glob("baseline-*.csv"))
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    edge_pruning_report(sweep, ["eap", "random"], found_on=4, judged_on=6)  # computed once
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert set(pd.read_csv(kept[0])["method"]) == {"eap"}


def test_report_without_answers(sweep):
    report = edge_pruning_report(replace(sweep, folder=None))
    assert not report.figures and report.table.empty
