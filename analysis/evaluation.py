"""Evaluation of a checkpoint on whole splits: exact match, losses, and if asked for every answer as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.probes import Findings, Opened, Probe
from groundswell.protocols import Answer, Dataset, Model, Objective, Parameters, Split
from groundswell.training.pack import build_dataset
from tasks.examples import row_texts
from tasks.grading import ITEMS_FILE
from tasks.vocabulary import STOP


class Evaluate(Probe):
    """The objective's metrics on all examples of each split (training evaluates the first `max_examples` only).

    Scalars: `evaluate/<split>/<metric>`; `accuracy` is exact match: the greedy answer, with its stop token where the
    task has one, is the right one. The table adds the number of examples and the binomial standard error.
    """

    headlines: ClassVar[tuple[str, ...]] = ("evaluate/*/accuracy",)

    splits: tuple[str, ...] = Field((), description="evaluation splits; none named: all of them")
    max_examples: int | None = Field(None, gt=0, description="the first so many of each split; none: all")
    batch_size: int = Field(2_048, gt=0, description="examples in one forward pass")
    items: bool = Field(False, description="write every answer as text: all_items.json, as the original does")

    def run(self, opened: Opened) -> Findings:
        """Raises ConfigError for a split that the task does not have."""
        e = opened.experiment
        dataset = build_dataset(e)
        for name in self.splits:
            if name not in dataset.evaluation:
                raise ConfigError(f"splits: the task has no split '{name}'; it has {', '.join(dataset.evaluation)}")
        device = opened.device
        rows: list[dict[str, Any]] = []
        items: list[dict[str, Any]] = []
        for name in self.splits or tuple(dataset.evaluation):
            split = dataset.evaluation[name].select(slice(0, self.max_examples)).to(device)
            if not len(split):
                continue
            metrics = evaluate(
                e.objective, e.model, opened.parameters, split, dataset.answer.to(device), self.batch_size
            )
            rows.append({"split": name, "n": len(split), **summarise(metrics)})
            if self.items:
                items += item_rows(e.model, opened.parameters, split, metrics["accuracy"] > 0, dataset, name)
        table = pd.DataFrame(rows)
        texts = {ITEMS_FILE: json.dumps(items)} if self.items else {}
        found = {
            f"evaluate/{row['split']}/{metric}": float(row[metric])
            for row in rows
            for metric in row
            if metric not in ("split", "n", "standard_error")
        }
        return Findings(found, tables={"evaluation": table}, texts=texts)


@torch.no_grad()
def evaluate(
    objective: Objective, model: Model, parameters: Parameters, split: Split, answer: Answer, batch_size: int
) -> dict[str, np.ndarray]:
    """The objective's metrics of each example [N] of a split, float64."""
    parts: list[Mapping[str, Tensor]] = []
    for start in range(0, len(split), batch_size):
        part = split.select(slice(start, start + batch_size))
        batch = Split(part.tokens[None], part.positions[None], part.targets[None])
        parts.append(objective.evaluate(model, parameters, batch, answer))
    return {name: torch.cat([part[name][0] for part in parts]).double().cpu().numpy() for name in parts[0]}


def summarise(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means, and the standard error of the accuracy."""
    means = {name: float(values.mean()) for name, values in metrics.items()}
    if "accuracy" in means:
        share = means["accuracy"]
        means["standard_error"] = float(np.sqrt(share * (1 - share) / len(metrics["accuracy"])))
    return means


def item_rows(
    model: Model, parameters: Parameters, split: Split, right: np.ndarray, dataset: Dataset, kind: str
) -> list[dict[str, Any]]:
    """The split's examples as the published file has them. What is right needs no decoding: greedy decoding would
    meet the very contexts of the forward pass that said so. Only the other rows are decoded."""
    texts = row_texts(split, dataset.vocabulary)
    closing = STOP if STOP in dataset.vocabulary else ""
    outputs = [prompt + answer.removesuffix(closing) + closing for prompt, answer in texts]
    golds = list(outputs)
    wrong = np.flatnonzero(~right)
    for row, answer in zip(wrong, decode(model, parameters, split, wrong, dataset.vocabulary), strict=True):
        outputs[row] = texts[row][0] + answer + closing
    return [
        {"input_text": prompt, "target_text": gold, "type": kind, "model_output": output}
        for (prompt, _), gold, output in zip(texts, golds, outputs, strict=True)
    ]


@torch.no_grad()
def decode(
    model: Model,
    parameters: Parameters,
    split: Split,
    rows: Sequence[int] | np.ndarray,
    vocabulary: Sequence[str],
    max_length: int | None = None,
) -> list[str]:
    """Greedy answers to these rows' prompts as text, up to the first `</a>`, which is left out.

    An answer has as many tokens as the split's answers, or goes on until prompt and answer have `max_length` tokens
    (the published evaluation: 10). Prompts of one length are decoded as one batch.
    """
    answers = [""] * len(rows)
    lengths = (split.positions[rows, 0] + 1).tolist()
    for length in sorted(set(lengths)):
        places = [place for place, mine in enumerate(lengths) if mine == length]
        prompts = split.tokens[[int(rows[place]) for place in places], :length]
        count = max_length - length if max_length else split.targets.shape[1]
        found = model.generate(parameters, prompts[None], count)[0].tolist()
        for place, tokens in zip(places, found, strict=True):
            answers[place] = "".join(vocabulary[token] for token in tokens).split(STOP)[0]
    return answers
