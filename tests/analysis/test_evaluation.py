"""Evaluation of checkpoints: the recorded answers, and what the probe keeps."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from analysis.evaluation import Evaluate, decode, evaluate, item_rows
from analysis.scoring import main as score
from groundswell.config import ConfigError
from groundswell.probes import Opened
from groundswell.protocols import Split
from models.decoder import Decoder
from models.objectives import AnswerLoss
from tasks.composition import Composition
from tasks.folder import read_folder
from tasks.grading import accuracy_by_type

GOLDEN = Path(__file__).parents[1] / "golden" / "grokking"
OFFSET = 257  # tokens of the recorded models before the data's own
DATA = {"composition": "composition_50_10_deg5_seed0", "comparison": "comparison_50_5_10_seed0"}


def load(name: str):
    return json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


@pytest.mark.parametrize("name", DATA)
def test_decoding_writes_the_recorded_answers(name: str, tmp_path: Path) -> None:
    """Every answer of the recorded checkpoint, right or wrong, token by token."""
    files, items = load(DATA[name])["files"], load(f"all_items_{name}_ckpt300")
    for file, content in files.items():
        (tmp_path / f"{file}.json").write_text(json.dumps(content))
    dataset = read_folder(tmp_path)
    weights = load_file(GOLDEN / f"trace_{name}_ckpt300.safetensors")
    model = Decoder(num_layers=8, num_heads=4, width=32, num_positions=16)
    rows = len(weights["transformer.wte.weight"])
    parameters = {spec.name: weights[spec.name].unsqueeze(0) for spec in model.parameters(rows, 16)}
    vocabulary = ["?"] * OFFSET + list(dataset.vocabulary) + ["?"] * rows

    found = []
    for kind, split in dataset.evaluation.items():
        shifted = Split(split.tokens + OFFSET, split.positions, split.targets + OFFSET)
        answers = decode(model, parameters, shifted, range(len(split)), vocabulary, max_length=10)
        prompts = [item["input_text"] for item in items if item["type"] == kind]
        found += [prompt + answer + "</a>" for prompt, answer in zip(prompts, answers, strict=True)]
        metrics = evaluate(AnswerLoss(), model, parameters, shifted, dataset.answer, 500)
        published = dict(json.loads((GOLDEN / "eval_qa_results.json").read_text())[name][-1][1])
        assert round(float(metrics["accuracy"].mean()), 3) == published[kind]
    assert found == [item["model_output"] for item in items]


TASK = Composition(num_entities=12, num_relations=5, out_degree=5, phi=2, iid_fraction=0.2, ood_fraction=0.2)


@pytest.fixture
def opened(tiny) -> Opened:
    experiment = tiny.with_overrides({"task": TASK, "model.width": 32, "model.init_scale": 40.0})
    generator = torch.Generator().manual_seed(0)
    specs = experiment.model.parameters(TASK.vocab_size, TASK.max_length)
    parameters = {s.name: torch.randn(1, *s.shape, generator=generator) * 0.5 for s in specs}
    return Opened(experiment, 7, parameters)


def test_scalars_and_table_are_means_over_whole_splits(opened: Opened) -> None:
    findings = Evaluate(batch_size=7).run(opened)
    dataset, table = TASK.build(), findings.tables["evaluation"]
    assert list(table["split"]) == [name for name, split in dataset.evaluation.items() if len(split)]
    for row in table.to_dict("records"):
        split = dataset.evaluation[row["split"]]
        logits = opened.experiment.model.answer_logits(opened.parameters, split.tokens[None], split.positions[None])[0]
        right = (logits.argmax(-1) == split.targets).all(-1).float().mean()
        loss = torch.nn.functional.cross_entropy(logits[:, 0], split.targets[:, 0])
        assert row["n"] == len(split) and row["accuracy"] == pytest.approx(float(right))
        assert row["answer_loss"] == pytest.approx(float(loss), rel=1e-5)
        assert findings.scalars[f"evaluate/{row['split']}/accuracy"] == row["accuracy"]
    assert set(findings.texts) == set()


def test_items_score_as_the_table_says(opened: Opened) -> None:
    """The published text score of what is written equals the accuracy by tokens."""
    embedding = opened.parameters["transformer.wte.weight"]
    stop = TASK.vocabulary().index("</a>")
    embedding[:, stop] = embedding[:, : TASK.num_entities].mean(1) * 4  # so that some answers stop and some do not
    findings = Evaluate(items=True, max_examples=20).run(opened)
    items = json.loads(findings.texts["all_items.json"])
    table = findings.tables["evaluation"].set_index("split")
    scores = accuracy_by_type(items)
    assert {kind: count for kind, (_, count) in scores.items()} == table["n"].to_dict()
    assert {kind: share for kind, (share, _) in scores.items()} == pytest.approx(table["accuracy"].to_dict())
    outputs = {item["model_output"] for item in items}
    assert len(outputs) > 3 and all(output.endswith("</a>") for output in outputs)


def test_right_rows_need_no_decoding(opened: Opened) -> None:
    dataset = TASK.build()
    split = dataset.evaluation["id_atomic"]
    model = opened.experiment.model
    everything = item_rows(model, opened.parameters, split, np.zeros(len(split), bool), dataset, "id_atomic")
    metrics = evaluate(AnswerLoss(), model, opened.parameters, split, dataset.answer, 100)
    assert everything == item_rows(model, opened.parameters, split, metrics["accuracy"] > 0, dataset, "id_atomic")


def test_unknown_splits_are_named(opened: Opened) -> None:
    with pytest.raises(ValueError, match="no split 'valid'; it has id_atomic, ood_atomic"):
        Evaluate(splits=("valid",)).run(opened)


# ---- groundswell score ----


def test_score_reads_the_folders_of_the_original(tmp_path: Path, capsys) -> None:
    for step in (300, 50):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "all_items.json").write_bytes(
            gzip.decompress((GOLDEN / "all_items_comparison_ckpt300.json.gz").read_bytes())
        )
    assert score([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "checkpoint", "test_inferred_ood", "id_atomic", "ood_atomic", "test_inferred_iid", "train_inferred",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[1:]] == ["checkpoint-50", "checkpoint-300"]
    assert "0.910 (810)" in lines[2] and "0.780" in lines[2]


def test_score_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no all_items.json there"):
        score([str(tmp_path)])
    (tmp_path / "all_items.json").write_text("{}")
    with pytest.raises(ConfigError, match="must be a list"):
        score([str(tmp_path / "all_items.json")])
