"""The four tasks of the Reversal Curse analysis against data sets that the published code drew."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.chain import Chain
from tasks.chain_related import ChainRelated
from tasks.entities import FactTask
from tasks.reverse import Reverse
from tasks.reverse_icl import ReverseICL

GOLDEN = Path(__file__).parents[1] / "golden" / "reversal_curse"
CASES = json.loads((GOLDEN / "datasets.json").read_text())["cases"]
RENAMED = {"vocab_size": "entity_vocab_size", "num_train": "num_train_triples", "num_val": "num_validation_triples"}


def task_of(case: dict[str, Any]) -> FactTask:
    fields = {RENAMED.get(name, name): value for name, value in case["params"].items()}
    if case["kind"] == "reverse_icl":
        return ReverseICL(**fields)
    if case["kind"] == "chain_related_tokens":
        return ChainRelated(**fields)
    # the published heat-map scripts lack the limits
    fields["original_limits"] = not case["kind"].endswith("_logits")
    return (Reverse if case["kind"].startswith("reverse") else Chain)(**fields)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_data_sets_are_exact(number: int) -> None:
    case = CASES[number]
    task = task_of(case)
    facts = task.draw()
    for name, rows in (("train", facts.train), ("val", facts.validation)):
        assert len(rows) == case[f"{name}_count"]
        compact = json.dumps(rows.tolist(), separators=(",", ":"))
        assert hashlib.sha256(compact.encode()).hexdigest() == case[f"{name}_sha256"]
        if name in case:
            assert rows.tolist() == case[name]
    for letter in "xyz":
        if case.get(f"{letter}_tokens"):
            assert facts.groups[letter].tolist() == case[f"{letter}_tokens"]
        if case.get(f"{letter}_words") and task.entity_length == 1:
            assert facts.groups[letter].tolist() == [word[0] for word in case[f"{letter}_words"]]


@pytest.mark.parametrize("case", [case for case in CASES if case["kind"].endswith("_logits")], ids=lambda c: c["kind"])
def test_heat_map_sentences_are_exact(case: dict[str, Any]) -> None:
    panels = task_of(case).draw().panels
    reverse = {"train_forward": "train_data_forward", "train_backward": "train_data_backward",
               "val_seen": "val_data_seen", "val_unseen": "val_data_unseen"}  # fmt: skip
    assert len(panels) == (4 if case["kind"] == "reverse_logits" else 6)
    for name, panel in panels.items():
        recorded = case[reverse.get(name, name.replace("_", "_data_", 1))]
        assert np.stack([panel.prompts, panel.answers], axis=1).tolist() == recorded


@pytest.mark.parametrize("case", [case for case in CASES if "label_masks" in case], ids=lambda c: str(c["params"]))
def test_targets_are_where_the_original_has_labels(case: dict[str, Any]) -> None:
    if not isinstance(case["label_masks"], dict):
        return
    for scope, mask in (("last", "loss_last_word"), ("whole", "loss_whole_sequence")):
        task = task_of(case).with_overrides({"loss_scope": scope})
        dataset = task.build()
        labelled = [place for place, counted in enumerate(case["label_masks"][mask]) if counted]
        assert (dataset.train.positions[0] + 1).tolist() == labelled
        last = [place for place, counted in enumerate(case["label_masks"]["loss_last_word"]) if counted]
        for split in dataset.evaluation.values():
            assert (split.positions[0] + 1).tolist() == last
        assert dataset.train.targets.shape[1] == task.num_answers
