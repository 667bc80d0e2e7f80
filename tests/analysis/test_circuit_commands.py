"""`groundswell circuit` on runs, checkpoints and edge lists."""

import json

import pandas as pd
import pytest
from circuit_networks import pruning_experiment, write_decoder

from groundswell.commands import main
from groundswell.training.trainer import PackTrainer
from models.decoder import Decoder
from models.edge_loading import load_edge_network
from models.edge_masks import save_edges

TASK = ["--task.class", "circuit_networks.GradedPairs"]


@pytest.fixture
def network(tmp_path):
    return write_decoder(tmp_path / "network")


@pytest.fixture
def pruned(network, make_run):
    folder = make_run(pruning_experiment(network))
    trainer = PackTrainer([folder])
    while not trainer.finished:
        trainer.advance()
    return folder


@pytest.fixture
def edge_list(tmp_path, network):
    graph = load_edge_network(network).graph
    save_edges(tmp_path / "mine.json", graph.edges[::2])
    return tmp_path / "mine.json"


def run(capsys, *arguments) -> str:
    assert main(["circuit", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def error(capsys, *arguments) -> str:
    assert main(["circuit", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_evaluate_an_edge_list(capsys, network, edge_list, monkeypatch):
    monkeypatch.chdir(edge_list.parent)  # a long path would be folded
    out = run(capsys, "evaluate", edge_list.name, "--network", network, *TASK, "--task.num-examples", "7")
    assert "test: 7 examples, graph of 61 edges" in out
    assert "mine.json" in out and "exact_match" in out


def test_evaluate_a_run_and_its_checkpoint_alike(capsys, pruned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (checkpoint,) = (pruned.path / "checkpoints").glob("step-*8")
    paths = [path.relative_to(tmp_path) for path in (checkpoint, pruned.path, checkpoint / "edges.json")]
    out = run(capsys, "evaluate", pruned.run_id, *paths, "--output", tmp_path)
    values = [line.split()[1:] for line in out.splitlines() if pruned.run_id in line]
    assert len(values) == 4
    assert all(row == values[0] for row in values)


def test_network_and_task_of_a_run(capsys, pruned, edge_list, tmp_path):
    out = run(capsys, "evaluate", edge_list, "--run", pruned.run_id, "--output", tmp_path, "--task.num-examples", "5")
    assert "test: 5 examples, graph of 61 edges" in out


def test_intersect(capsys, tmp_path):
    first, second, third = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    save_edges(first, [("m0", "m1"), ("tok_embeds", "m0"), ("m1", "resid_post")])
    save_edges(second, [("m1", "resid_post"), ("m0", "m1")])
    out = run(capsys, "intersect", first, second, "--save", third)
    assert "2 edges in all 2 circuits" in out and "0.6667" in out
    assert json.loads(third.read_text()) == [["m0", "m1"], ["m1", "resid_post"]]


def test_compare(capsys, network, edge_list, tmp_path):
    folder = tmp_path / "comparison"
    options = ["--methods", "eap", "random", "--edges", "10", "30", "--folder", folder]
    run(capsys, "compare", edge_list, "--network", network, *TASK, *options)
    table = pd.read_csv(folder / "comparison.csv")
    assert list(table["method"]) == ["edge_pruning", "eap", "eap"] + ["random"] * 6
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert len(list((folder / "circuits").glob("*.json"))) == len(table)


def test_draw_a_list_and_a_run(capsys, pruned, edge_list, tmp_path):
    assert "31 edges: saved" in run(capsys, "draw", edge_list, "--save", tmp_path / "list.svg")
    run(capsys, "draw", pruned.run_id, "--save", tmp_path / "run.png", "--output", tmp_path)
    assert (tmp_path / "list.svg").exists() and (tmp_path / "run.png").exists()


def test_export(capsys, pruned, tmp_path):
    run(capsys, "export", pruned.run_id, "--save", tmp_path / "graph.json", "--output", tmp_path)
    run(capsys, "export", pruned.run_id, "--form", "edges", "--save", tmp_path / "edges.json", "--output", tmp_path)
    graph = json.loads((tmp_path / "graph.json").read_text())
    edges = json.loads((tmp_path / "edges.json").read_text())
    assert set(graph) == {"cfg", "nodes", "edges"}
    assert graph["edges"]["m0->m1"]["in_graph"] == (["m0", "m1"] in edges)


def test_mistakes(capsys, network, edge_list, tmp_path, tiny, make_run):
    wrong = tmp_path / "wrong.json"
    save_edges(wrong, [("a7.h0", "resid_post")])
    where = ["--network", network, *TASK]
    assert "a7.h0 -> resid_post" in error(capsys, "evaluate", wrong, *where)
    assert "give --network FOLDER" in error(capsys, "evaluate", edge_list, *TASK)
    assert "give --task.class" in error(capsys, "evaluate", edge_list, "--network", network)
    plain = ["--network", network, "--task.class", "tasks.modular_arithmetic.ModularArithmetic"]
    assert "grades no circuits" in error(capsys, "evaluate", edge_list, *plain)
    assert "name runs" in error(capsys, "evaluate")
    assert "two or more" in error(capsys, "intersect", edge_list)
    assert "no such option" in error(capsys, "draw", edge_list, "--optimizer.lr", "3")
    decoder = make_run(tiny)
    trainer = PackTrainer([decoder])
    while not trainer.finished:
        trainer.advance()
    assert "Decoder has no edge masks" in error(capsys, "evaluate", decoder.run_id, "--output", tmp_path)
    assert isinstance(tiny.model, Decoder)
