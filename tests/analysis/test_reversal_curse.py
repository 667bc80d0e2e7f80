"""Probes and report of the Reversal Curse sweep: recorded matrices, definitions, figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from analysis.reversal_curse import (
    EmbeddingSimilarity,
    LogitHeatMaps,
    diagonal_gap,
    draw_heat_maps,
    heat_map_scalars,
    reversal_report,
    row_accuracy,
)
from groundswell import Budget, Experiment
from groundswell.probes import Opened
from groundswell.results import load_results
from groundswell.sweep import PlannedRun, run_name
from groundswell.training.trainer import PackTrainer
from models.bilinear import Bilinear
from models.decoder import Decoder
from models.objectives import WordLoss
from tasks.chain import Chain
from tasks.reverse import Reverse
from tasks.reverse_icl import ReverseICL

GOLDEN = Path(__file__).parents[1] / "golden" / "reversal_curse"
RUNS = json.loads((GOLDEN / "runs.json").read_text())


def recorded(name: str, task_class: type) -> Opened:
    args = RUNS[name]["args"]
    experiment = Experiment(
        task=task_class(entity_vocab_size=args["vocab_size"], seed=args["seed"]),
        model=Decoder(num_layers=2, num_heads=2, width=64, tied_head=False, num_positions=16),
        objective=WordLoss(),
    )
    weights = load_file(GOLDEN / f"run_{name}_final.safetensors")
    return Opened(experiment, 60, {key: value.unsqueeze(0) for key, value in weights.items()})


@pytest.mark.parametrize(("name", "task_class"), [("reverse_logits", Reverse), ("chain_logits", Chain)])
def test_heat_maps_are_the_recorded_ones(name: str, task_class: type) -> None:
    findings = LogitHeatMaps().run(recorded(name, task_class))
    record = np.load(GOLDEN / f"run_{name}.npz")
    expected = {key.removeprefix("out_"): record[key] for key in record if key.startswith("out_")}
    assert findings.arrays.keys() == expected.keys()
    for key, matrix in expected.items():
        assert findings.arrays[key].dtype == np.float32
        np.testing.assert_allclose(findings.arrays[key], matrix, atol=1e-5)
    assert list(findings.figures) == ["logits"]


def test_similarities_are_the_recorded_ones() -> None:
    findings = EmbeddingSimilarity().run(recorded("reverse_logits", Reverse))
    expected = np.load(GOLDEN / "run_reverse_embed.npz")["out_cos_sim"]
    np.testing.assert_allclose(findings.arrays["cos_sim"], expected, atol=1e-5)
    x, y = slice(2, 12), slice(12, 22)
    matched = np.diagonal(expected[x, y]).mean()
    assert findings.scalars["embedding/matched_cosine_x_y"] == pytest.approx(matched, abs=1e-5)


def test_scores_by_hand() -> None:
    matrix = np.array([[3.0, 1.0], [5.0, 1.0]])
    assert diagonal_gap(matrix) == pytest.approx((3 + 1) / 2 - (1 + 5) / 2)
    assert row_accuracy(matrix) == 0.5
    assert heat_map_scalars({"val_seen": np.array([[7.0]]), "val_unseen": np.array([[1.0]])}) == {}
    eye, flat = 4 * np.eye(3), np.zeros((3, 3))
    found = heat_map_scalars({"val_seen": eye, "val_unseen": flat})
    assert found["heat_map/asymmetry"] == 4.0
    found = heat_map_scalars({"val_x0y": eye, "val_y0z": 2 * eye, "val_x1z": eye / 2})
    assert found["heat_map/intransitivity"] == 4.0 - 2.0


def test_probes_know_what_they_can_ask() -> None:
    experiment = Experiment(task=Reverse(entity_vocab_size=40), model=Bilinear(width=16), objective=WordLoss())
    for probe in (LogitHeatMaps(), EmbeddingSimilarity()):
        assert probe.applies(experiment)
        assert not probe.applies(experiment.with_overrides({"task": Reverse(entity_vocab_size=40, word_size=2)}))
        small = ReverseICL(entity_vocab_size=40, num_x_tokens=12, num_y_tokens=10)
        assert not probe.applies(experiment.with_overrides({"task": small}))


def test_panels_are_drawn_in_the_order_of_the_chain() -> None:
    names = [f"{part}_{hop}" for part in ("train", "val") for hop in ("x0y", "y0z", "x1z")]
    figure = draw_heat_maps({name: np.eye(3) for name in sorted(names)})
    titles = [ax.get_title() for ax in figure.axes[:6]]
    assert [title.split(" (")[0] for title in titles] == ["y after x", "z after y", "z after x"] * 2
    assert all("100%" in title for title in titles)


def test_the_report_of_a_small_sweep(make_run, tmp_path: Path) -> None:
    base = Experiment(
        task=Reverse(entity_vocab_size=40),
        model=Bilinear(width=32),
        objective=WordLoss(),
        budget=Budget(epochs=4, batch_size=8),
        metrics_every=1,
    ).with_overrides({"evaluation.schedule": {"class": "groundswell.schedule.Every", "every": 2}})
    planned, folders = [], []
    for lr in (1e-3, 1e-2):
        for seed in (0, 1):
            axes = {"optimizer.lr": lr, "seed": seed}
            folders.append(make_run(base, **axes))
            planned.append(PlannedRun(base.with_overrides(axes), axes, run_name(axes)))
    for folder in folders:
        trainer = PackTrainer([folder])
        while not trainer.finished:
            trainer.advance()
    from groundswell.probes import run_probes
    from groundswell.rundir import SweepFolder

    for folder in folders[:2]:
        run_probes(folder, [LogitHeatMaps(), EmbeddingSimilarity()])
    results = load_results(SweepFolder(tmp_path / "sweep"), planned, ("optimizer.lr", "seed"), "seed")
    report = reversal_report(results)
    assert list(report.table["lr"]) == ["0.001", "0.01"]
    assert report.remarks[-1].endswith("over 2 seeds")
    assert report.table["uniform"][0] == "3.74 / 2.30"  # ln 42, ln 10
    assert report.table["asymmetry"][0] != "-" and report.table["asymmetry"][1] == "-"
    assert set(report.figures) == {"word_nll", "logits_0.001", "cos_sim_0.001"}
    assert [ax.get_title() for ax in report.figures["word_nll"].axes] == ["lr = 0.001", "lr = 0.01"]
    assert isinstance(report.table, pd.DataFrame)
