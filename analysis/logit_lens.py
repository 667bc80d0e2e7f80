"""Logit lens: what every state of a network would answer, at every layer and position (nostalgebraist 2020).

A state is read by the final LayerNorm and the output matrix. Its rank for a token is the number of tokens that score
higher (0 is best), over the closed vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from analysis.patching import read_tokens
from groundswell.experiment import Experiment
from groundswell.probes import Findings, Opened, Probe
from groundswell.protocols import Dataset, Parameters, Task
from groundswell.rundir import RunFolder
from groundswell.training.pack import dataset_of
from models import cached
from models.decoder import Decoder
from tasks.tracing import Reading, Traceable, TracingExamples, choose_rows


class LogitLens(Probe):
    """Ranks of a task's intermediate facts (for composition the bridge entity and the second relation) and of the
    answer, in every state.

    Scalars: mean reciprocal rank (MRR) and recall at k of each fact at its own position after each layer,
    `lens/<fact>/layer_<l>/mrr`. The table has every layer and position; `ranks.npy` the rank of each example.
    """

    headlines: ClassVar[tuple[str, ...]] = ("lens/answer/final/mrr",)

    split: str = Field("train_inferred", description="evaluation split to take examples from")
    num_examples: int = Field(300, gt=0, description="examples, drawn by seed; the same for all checkpoints")
    seed: int = Field(0, ge=0, description="of the choice of examples (and of counterfactuals)")
    recall_at: tuple[int, ...] = Field((1, 3), description="k of recall at k: share of examples with rank < k")
    examples: bool = Field(False, description="write the ranks of each example as JSON, named as the original does")

    held_out: str = Field("test_inferred_iid", description="split whose accuracy marks grokking in the figures")

    def objection(self, experiment: Experiment) -> str | None:
        if not isinstance(experiment.model, Decoder):
            return f"model {type(experiment.model).__name__} is no Decoder: it has no layers to read"
        return None

    def run(self, opened: Opened) -> Findings:
        model = opened.experiment.model
        assert isinstance(model, Decoder)
        examples, normal = look(opened, self.split, self.num_examples, self.seed)
        ranks = lens_ranks(model, opened.parameters, examples, normal)
        table = summarise(ranks, examples, self.recall_at)
        texts = {"examples.json": json.dumps(per_example(ranks, examples))} if self.examples else {}
        return Findings(scalars(table, examples), {"ranks": ranks}, {"lens": table}, texts=texts)

    def over_time(self, folder: RunFolder, answers: Mapping[int, Path]) -> Findings | None:
        from analysis.circuits import lens_over_time

        return lens_over_time(folder, answers, self.split, self.held_out)


def look(opened: Opened, split: str, count: int, seed: int) -> tuple[TracingExamples, cached.Pass]:
    """Examples, and the pass over their prompts: made once for all probes of a checkpoint. Raises ValueError for a
    split that cannot be looked at."""
    key = (split, count, seed)
    if key not in opened.memo:
        model = opened.experiment.model
        assert isinstance(model, Decoder)
        examples = _examples(opened.experiment.task.canonical_json(), *key)
        device = opened.device
        opened.memo[key] = examples, cached.forward(model, opened.parameters, examples.prompts[None].to(device))
    return opened.memo[key]


@lru_cache(maxsize=4)
def _examples(canonical_task: str, split: str, count: int, seed: int) -> TracingExamples:
    """Kept, because all checkpoints of a run are asked the same."""
    task, dataset = Task.from_dict(json.loads(canonical_task)), dataset_of(canonical_task)
    if isinstance(task, Traceable):
        return task.tracing_examples(dataset, split, count, seed)
    return answer_examples(dataset, split, count, seed)


def answer_examples(dataset: Dataset, split: str, count: int, seed: int) -> TracingExamples:
    """For a task that tells nothing about itself: its most frequent length of prompt, and the answer."""
    rows = choose_rows(dataset, split, count, seed)
    chosen = dataset.evaluation[split]
    lengths = chosen.positions[rows, 0] + 1
    length = int(lengths.mode().values)
    rows = rows[(lengths == length).numpy()]
    names = tuple(str(position) for position in range(length))
    return TracingExamples(
        chosen.tokens[rows, :length], chosen.targets[rows, 0], torch.from_numpy(np.asarray(rows)), names, {}
    )


def all_readings(examples: TracingExamples) -> dict[str, Reading]:
    """The task's own, and the answer at the last position."""
    return {**examples.readings, "answer": Reading(examples.prompts.shape[1] - 1, examples.answers)}


@torch.no_grad()
def lens_ranks(
    model: Decoder, parameters: Parameters, examples: TracingExamples, normal: cached.Pass | None = None
) -> np.ndarray:
    """Rank of each reading's token in each state: int32 [readings, S + 1, T, N], readings as in `all_readings`.

    `normal`: the pass over the prompts, where it is there already.
    """
    device = next(iter(parameters.values())).device
    normal = normal or cached.forward(model, parameters, examples.prompts[None].to(device))
    states = torch.stack(normal.states)[:, 0]
    by_reading: list[Tensor] = []
    for reading in all_readings(examples).values():
        flat = states.transpose(1, 2).flatten(0, 1)  # [(S+1) * T, N, d]
        ranks, _ = read_tokens(model, parameters, flat, reading.tokens.to(device))
        by_reading.append(ranks.view(len(states), -1, len(examples)))
    return torch.stack(by_reading).to(torch.int32).cpu().numpy()


def mean_reciprocal_rank(ranks: np.ndarray) -> np.ndarray:
    """Over the last axis; ranks from 0."""
    return (1.0 / (ranks + 1.0)).mean(axis=-1)


def summarise(ranks: np.ndarray, examples: TracingExamples, recall_at: Sequence[int]) -> pd.DataFrame:
    """One row a reading, layer and position: mrr, recall_at_<k>, mean_rank, n, and whether it is the own position."""
    rows: list[dict[str, Any]] = []
    for index, (name, reading) in enumerate(all_readings(examples).items()):
        for layer in range(ranks.shape[1]):
            for position, label in enumerate(examples.position_names):
                mine = ranks[index, layer, position]
                row = {"reading": name, "layer": layer, "position": position, "position_name": label}
                row |= {"own_position": position == reading.position, "mrr": float(mean_reciprocal_rank(mine))}
                row |= {f"recall_at_{k}": float((mine < k).mean()) for k in recall_at}
                rows.append({**row, "mean_rank": float(mine.mean()), "n": len(mine)})
    return pd.DataFrame(rows)


def scalars(table: pd.DataFrame, examples: TracingExamples) -> dict[str, float]:
    """Each reading at its own position; the answer after the last layer is the network's own ranking."""
    own = table[table["own_position"]]
    measures = [str(column) for column in table if column == "mrr" or str(column).startswith("recall_at_")]
    found = {
        f"lens/{row['reading']}/layer_{row['layer']}/{measure}": row[measure]
        for row in own.to_dict("records")
        for measure in measures
    }
    last = own[(own["reading"] == "answer") & (own["layer"] == own["layer"].max())].iloc[0]
    return found | {f"lens/answer/final/{measure}": float(last[measure]) for measure in measures}


def per_example(ranks: np.ndarray, examples: TracingExamples) -> list[dict[str, int]]:
    """The published record's names: `<fact>_rank_pos<position>_<layer>` for layers 1..S-1, and `rank_before`."""
    readings = list(all_readings(examples).items())
    last, answer = ranks.shape[1] - 1, readings[-1][1]
    return [
        {"rank_before": int(ranks[-1, last, answer.position, n])}
        | {
            f"{name}_rank_pos{reading.position}_{layer}": int(ranks[index, layer, reading.position, n])
            for layer in range(1, last)
            for index, (name, reading) in enumerate(readings[:-1])
        }
        for n in range(len(examples))
    ]
