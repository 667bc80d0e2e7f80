"""Comparison with missing values: the values of out-of-distribution entities are never told and must be inferred.

Grokked Transformers (arXiv 2405.15071), section 5 and its published generator. Training has the atomic facts of
in-distribution entities, comparisons among them ("topleft") and comparisons across the border ("cross"). The hard
queries compare two OOD entities, are decided by the known values together with the cross comparisons, and are not
decided by comparisons alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import RandomState
from pydantic import Field

from groundswell.protocols import Answer, Dataset, Split
from tasks.attribute_world import NUM_LABELS, AttributeTask, AttributeWorld
from tasks.examples import answer_split, make_dataset, sample
from tasks.proofs import UNPROVEN, comparison_graph, proven_labels
from tasks.vocabulary import IntArray


@dataclass(frozen=True)
class Queries:
    """Comparisons of OOD entities that have a proof, as rows [N, 4] (attribute, e1, e2, label) in ascending order."""

    solvable: IntArray  # from the known values and the cross comparisons
    easy: IntArray  # from cross and topleft comparisons, without values
    hard: IntArray  # solvable and not easy


class ComplexReasoning(AttributeTask):
    train_fraction: float = Field(0.03, gt=0, le=1, description="share of the pool's comparisons in training")
    hard_per_label: int = Field(50, ge=0, description="most hard queries of each of the three labels")

    @property
    def max_length(self) -> int:
        return 8

    @property
    def num_answers(self) -> int:
        return 3

    def build(self) -> Dataset:
        random = RandomState(self.seed)
        world = self._draw_world(random, cross=True)
        id_atomic, ood_atomic = world.atomic(ood=False), world.atomic(ood=True)
        tests = {
            "test_inferred_ood": world.both_ood.sample(self.test_size, random),
            "id_atomic": sample(id_atomic, self.test_size, random),
            "test_inferred_iid": world.iid.sample(self.test_size, random),
            "ood_atomic": ood_atomic,
        }
        topleft = world.pool.sample(round(self.train_fraction * len(world.pool)), random)
        cross = world.cross.sample(round(self.train_fraction * len(world.cross)), random)
        tests["train_inferred_topleft"] = sample(topleft, self.test_size, random)
        tests["train_inferred_cross"] = sample(cross, self.test_size, random)

        queries = find_queries(world, topleft, cross)
        by_label = [queries.hard[queries.hard[:, 3] == label] for label in range(NUM_LABELS)]
        hard = [sample(rows, self.hard_per_label, random) for rows in by_label]
        tests["test_hard"] = np.concatenate(hard)[:, :3]
        # All of them, shuffled. Drawn last, so that the draws above keep the published generator's order.
        tests["ood_atomic"] = sample(ood_atomic, len(ood_atomic), random)

        train = {"id_atomic": id_atomic, "train_inferred_topleft": topleft, "train_inferred_cross": cross}
        candidates = {
            "train_inferred_topleft": len(world.pool),
            "train_inferred_cross": len(world.cross),
            "test_inferred_iid": len(world.iid),
            "test_inferred_ood": len(world.both_ood),
            "solvable": len(queries.solvable),
            "easy": len(queries.easy),
            "test_hard": len(queries.hard),
        }
        return make_dataset(
            self,
            self.vocabulary(),
            train={name: self._split(world, name, facts) for name, facts in train.items()},
            evaluation={name: self._split(world, name, facts) for name, facts in tests.items()},
            answer=Answer(slice(1, 2)),
            candidates=candidates,
        )

    def _split(self, world: AttributeWorld, name: str, facts: IntArray) -> Split:
        if name.endswith("atomic"):
            entity, attribute, value = self._atomic_ids(facts)
            prompt: list[IntArray | str] = ["<q>", entity, attribute, "<mask>", "</q>"]
            answer = value
        else:
            attribute, first, second, answer = self._pair_ids(facts, world.labels(facts))
            prompt = [attribute, "<q>", first, "<mask>", second, "</q>"]
        rows = self._token_rows(len(facts), [*prompt, "<a>", answer, "</a>"])
        return answer_split(rows, len(prompt), self.max_length, pad=self.vocab_size - 1)


def find_queries(world: AttributeWorld, topleft: IntArray, cross: IntArray) -> Queries:
    """Training comparisons [N, 3] (attribute, e1, e2) -> what they prove about pairs of OOD entities."""
    num_attributes = world.values.shape[1]
    solvable: list[IntArray] = []
    easy: list[IntArray] = []
    hard: list[IntArray] = []
    for attribute in range(num_attributes):
        entities = np.flatnonzero(world.ood[:, attribute])
        known = cross[cross[:, 0] == attribute]
        compared = np.concatenate([known, topleft[topleft[:, 0] == attribute]])
        with_values = _labels_from_values(world, attribute, known, entities)
        graph = comparison_graph(len(world.values), compared[:, 1], compared[:, 2], world.labels(compared))
        without_values = proven_labels(graph, entities)
        for labels, rows in [
            (with_values, solvable),
            (without_values, easy),
            (np.where(without_values == UNPROVEN, with_values, UNPROVEN), hard),
        ]:
            first, second = np.nonzero(labels != UNPROVEN)
            fact = np.stack([np.full(len(first), attribute), entities[first], entities[second]], axis=1)
            proven = labels[first, second]
            assert (proven == world.labels(fact)).all(), "a proof contradicts the hidden values"
            rows.append(np.column_stack([fact, proven]))
    return Queries(np.concatenate(solvable), np.concatenate(easy), np.concatenate(hard))


def _labels_from_values(world: AttributeWorld, attribute: int, cross: IntArray, entities: IntArray) -> IntArray:
    """Labels [S, S] of OOD entities proven by cross comparisons and the known values.

    In-distribution entities of one value are interchangeable in a proof, so one node stands for each value, the values
    in a chain; the OOD entities follow as further nodes.
    """
    values = world.values[:, attribute]
    num_values = int(values.max()) + 1
    node = values.copy()
    node[entities] = num_values + np.arange(len(entities))
    graph = comparison_graph(num_values + len(entities), node[cross[:, 1]], node[cross[:, 2]], world.labels(cross))
    graph[np.arange(1, num_values), np.arange(num_values - 1)] = True
    return proven_labels(graph, node[entities])
