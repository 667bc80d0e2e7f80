"""Comparison of values: `<attr_k><q><e_i><mask><e_j>` is answered `<attr_k_y>`, y = 0 smaller, 1 equal, 2 larger.

Grokked Transformers (arXiv 2405.15071), section 4 and its published generator. All values are in training as atomic
facts (`<e_i><attr_k>` -> `<v>`); pairs of out-of-distribution entities are only tested, mixed pairs are not used.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Answer, Dataset, Split
from tasks.attribute_world import NUM_LABELS, AttributeTask, AttributeWorld
from tasks.examples import answer_split, make_dataset, sample
from tasks.tracing import Reading, Traceable, TracingExamples, choose_rows, make_role, prompts_of_length
from tasks.vocabulary import IntArray, Vocabulary


class Comparison(AttributeTask, Traceable):
    """At one seed, all phi share the values and the tests, and their training sets nest."""

    phi: float = Field(7.2, gt=0, description="training comparisons for each in-distribution atomic fact")
    predict_stop: bool = Field(True, description="train on </a> after the answer too, as the paper does")

    @model_validator(mode="after")
    def _check_phi(self) -> Comparison:
        largest = (self._num_id - 1) * (1 - self.iid_fraction)
        if self.phi > largest:
            raise ValueError(self._phi_error(largest))
        return self

    def _phi_error(self, largest: float) -> str:
        return (
            f"task.phi {self.phi:g} is more than the world holds: at most about {largest:.4g} with {self._num_id} "
            "in-distribution entities; lower task.phi or raise task.num_entities"
        )

    @property
    def max_length(self) -> int:
        return 5 + self.predict_stop

    @property
    def num_answers(self) -> int:
        return 1 + self.predict_stop

    def build(self) -> Dataset:
        """Raises ConfigError if this seed's world has too few pairs for phi."""
        random = RandomState(self.seed)
        world = self._draw_world(random, cross=False)
        id_atomic, ood_atomic = world.atomic(ood=False), world.atomic(ood=True)
        wanted = round(self.phi * len(id_atomic))
        if wanted > len(world.pool):
            raise ConfigError(self._phi_error(len(world.pool) / max(len(id_atomic), 1)))
        # The samples before the training set do not depend on phi, so that runs of different phi share them.
        evaluation = {
            "test_inferred_ood": self._pairs(world, world.both_ood.sample(self.test_size, random)),
            "id_atomic": self._atomic(sample(id_atomic, self.test_size, random)),
            "ood_atomic": self._atomic(sample(ood_atomic, self.test_size, random)),
            "test_inferred_iid": self._pairs(world, world.iid.sample(self.test_size, random)),
        }
        inferred = world.pool.sample(wanted, random)
        evaluation["train_inferred"] = self._pairs(world, sample(inferred, self.test_size, random))
        train = {
            "id_atomic": self._atomic(id_atomic),
            "ood_atomic": self._atomic(ood_atomic),
            "train_inferred": self._pairs(world, inferred),
        }
        candidates = {
            "train_inferred": len(world.pool),
            "test_inferred_iid": len(world.iid),
            "test_inferred_ood": len(world.both_ood),
        }
        return make_dataset(
            self, self.vocabulary(), train, evaluation, answer=Answer(slice(0, 1)), candidates=candidates
        )

    def tracing_examples(self, dataset: Dataset, split: str, count: int, seed: int) -> TracingExamples:
        return tracing_examples(dataset, split, count, seed)

    def _atomic(self, facts: IntArray) -> Split:
        entity, attribute, value = self._atomic_ids(facts)
        return self._split(len(facts), [entity, attribute, value])

    def _pairs(self, world: AttributeWorld, facts: IntArray) -> Split:
        attribute, first, second, label = self._pair_ids(facts, world.labels(facts))
        return self._split(len(facts), [attribute, "<q>", first, "<mask>", second, label])

    def _split(self, count: int, columns: list[IntArray | str]) -> Split:
        stop = ["</a>"] if self.predict_stop else []
        rows = self._token_rows(count, [*columns, *stop])
        return answer_split(rows, len(columns) - 1, self.max_length, pad=self.vocab_size - 1)


# ---- looking inside ----


def tracing_examples(dataset: Dataset, split: str, count: int, seed: int) -> TracingExamples:
    """Prompts `<a><q><e1><mask><e2>` over values v1, v2 of attribute a; facts are read off the training rows.

    Candidates are in distribution (ID) for the attribute: in one of its training comparisons.
    e1: entities with value v2, and where the values are equal, v2 - 1 or v2 + 1; e2 the other way round. a: any other
    attribute (labels belong to attributes, so the answer's token changes). e1 and a are replaced together with the
    token after them.
    """
    values, is_id = _facts(dataset)
    rows = choose_rows(dataset, split, count, seed)
    chosen = dataset.evaluation[split]
    rows = rows[prompts_of_length(chosen, 5)[rows]]
    prompts, answers = chosen.tokens[rows, :5].numpy(), chosen.targets[rows, 0].numpy()
    attribute, first, second = prompts[:, 0], prompts[:, 2], prompts[:, 4]
    v1, v2 = values[first, attribute], values[second, attribute]
    if not len(rows) or (v1 < 0).any() or (v2 < 0).any():
        raise ConfigError(f"split: '{split}' has entities whose values are not in training; trace another")
    attributes = np.flatnonzero(is_id.any(axis=0))
    by_role: dict[str, list[IntArray]] = {"e1": [], "e2": [], "a": []}
    for a, one, other in np.column_stack([attribute, v1, v2]):
        column = np.where(is_id[:, a], values[:, a], -2)  # -2: no candidate, and next to no value
        by_role["e1"].append(_near(column, other, one))
        by_role["e2"].append(_near(column, one, other))
        by_role["a"].append(attributes[attributes != a])
    token_of, labels = _value_tokens(dataset), _label_tokens(dataset)
    readings = {"val1": Reading(2, token_of[v1]), "val2": Reading(4, token_of[v2])}
    readings |= {f"label{y}": Reading(0, labels[attribute, y]) for y in range(NUM_LABELS)}
    places = {"e1": (2, 4, 2), "e2": (4, 5, 4), "a": (0, 2, 0)}  # replaced from, to, and the token that differs
    return TracingExamples(
        torch.from_numpy(prompts),
        torch.from_numpy(answers),
        torch.from_numpy(rows),
        ("a", "q", "e1", "mask", "e2"),
        readings,
        {
            name: make_role(prompts, start, stop, by_role[name], place, seed)
            for name, (start, stop, place) in places.items()
        },
    )


def _near(column: IntArray, wanted: int, current: int) -> IntArray:
    """Entities with the wanted value, or where that is the current one, with a value next to it."""
    return np.flatnonzero(column == wanted if wanted != current else np.abs(column - wanted) == 1)


def _value_tokens(dataset: Dataset) -> Tensor:
    """Token of each value: `<0>`, `<1>`, ..."""
    ids = Vocabulary(dataset.vocabulary).ids
    return torch.tensor([ids[f"<{value}>"] for value in range(sum(token[1:-1].isdigit() for token in ids))])


def _label_tokens(dataset: Dataset) -> Tensor:
    """[V, 3]: tokens of the three labels of an attribute's token."""
    ids = Vocabulary(dataset.vocabulary).ids
    table = torch.zeros(len(ids), NUM_LABELS, dtype=torch.int64)
    for token, index in ids.items():
        if f"{token[:-1]}_0>" in ids:
            table[index] = torch.tensor([ids[f"{token[:-1]}_{y}>"] for y in range(NUM_LABELS)])
    return table


def _facts(dataset: Dataset) -> tuple[IntArray, NDArray[np.bool_]]:
    """By token ids: values [V, V] of (entity, attribute), -1 where there is no fact, and which facts are ID [V, V]."""
    train, size = dataset.train_split, len(dataset.vocabulary)
    tokens = train.tokens.numpy()
    atomic, pairs = prompts_of_length(train, 2), tokens[prompts_of_length(train, 5), :5]
    value_of = np.full(size, -1)
    tokens_of_values = _value_tokens(dataset).numpy()
    value_of[tokens_of_values] = np.arange(len(tokens_of_values))
    values, is_id = np.full((size, size), -1), np.zeros((size, size), bool)
    values[tokens[atomic, 0], tokens[atomic, 1]] = value_of[train.targets[atomic, 0].numpy()]
    for entity in (2, 4):
        is_id[pairs[:, entity], pairs[:, 0]] = True
    return values, is_id
