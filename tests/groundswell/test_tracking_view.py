"""The columns of MLflow's table of runs."""

import json

from groundswell.tracking.view import page_address, table_view

AXES = {"model.num_layers": {}, "optimizer.weight_decay": {}, "seed": {}}


def test_axes_first_then_the_sweeps_metric_then_other_accuracies():
    description = {"metric": "eval/b/accuracy", "mode": "max", "axes": AXES}
    measured = ["train/loss", "eval/c/accuracy", "eval/b/accuracy", "eval/a/accuracy", "eval/a/answer_loss"]
    view = json.loads(table_view(description, measured))
    metrics = [f"metrics.`eval/{split}/accuracy`" for split in "bac"]
    assert view["selectedColumns"] == [*(f"params.`{path}`" for path in AXES), *metrics]
    assert view["columnOrder"] == ["attributes.`Run Name`", *view["selectedColumns"]]
    assert set(view["columnWidths"]) == set(view["columnOrder"])
    assert (view["orderByKey"], view["orderByAsc"]) == (metrics[0], False)


def test_a_loss_is_sorted_upwards_and_many_metrics_are_cut():
    description = {"metric": "eval/x/answer_loss", "mode": "min", "axes": {}}
    view = json.loads(table_view(description, [f"eval/{n}/accuracy" for n in range(9)]))
    assert view["orderByAsc"] is True
    assert len(view["selectedColumns"]) == 4


def test_a_sweep_without_a_description():
    assert "orderByKey" not in json.loads(table_view({}, []))


def test_address():
    assert page_address("http://127.0.0.1:5000", "7").endswith(
        "experiments/7/runs?workflowType=machine_learning&viewStateShareKey=groundswell"
    )
