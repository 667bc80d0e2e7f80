"""Two-hop composition over a random knowledge graph: h -r1-> b -r2-> t is asked as `<h><r1><r2>`, answered `<t>`.

Grokked Transformers (arXiv 2405.15071), section 3 and its published generator. Out of distribution (OOD) means: the
edge is in training as a fact by itself but in no training path. Held out are whole paths: `test_inferred_iid` (no edge
is OOD) and `test_inferred_ood` (both are).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from pydantic import Field, model_validator

from groundswell.config import ConfigError
from groundswell.protocols import Answer, Dataset, Split, Task
from tasks.examples import answer_split, make_dataset, sample
from tasks.tracing import Reading, Traceable, TracingExamples, choose_rows, make_role, prompts_of_length
from tasks.vocabulary import PAD, SPECIAL_TOKENS, STOP, IntArray, numbered


@dataclass(frozen=True)
class KnowledgeGraph:
    """E entities with D outgoing edges each: entity h has the edges (h, relations[h, k], tails[h, k])."""

    relations: IntArray  # [E, D], distinct in a row
    tails: IntArray  # [E, D]
    ood: NDArray[np.bool_]  # [E, D], edges that no training path uses

    def edges(self, ood: bool) -> IntArray:
        """[M, 3] rows h, r, t in generation order."""
        heads, places = np.nonzero(self.ood == ood)
        return np.stack([heads, self.relations[heads, places], self.tails[heads, places]], axis=1)

    def paths(self) -> tuple[IntArray, NDArray[np.bool_], NDArray[np.bool_]]:
        """All E * D * D paths [M, 4] (h, r1, r2, t) in generation order, and whether their two edges are OOD [M]."""
        num_entities, degree = self.tails.shape
        bridges = self.tails.ravel()
        heads = np.repeat(np.arange(num_entities), degree * degree)
        first = np.repeat(self.relations.ravel(), degree)
        rows = np.stack([heads, first, self.relations[bridges].ravel(), self.tails[bridges].ravel()], axis=1)
        return rows, np.repeat(self.ood.ravel(), degree), self.ood[bridges].ravel()


class Composition(Task, Traceable):
    """Atomic and two-hop facts. At one seed, all phi share the graph and the tests, and their training sets nest."""

    packable: ClassVar[frozenset[str]] = frozenset({"seed"})

    num_entities: int = Field(2_000, gt=1)
    num_relations: int = Field(200, gt=0)
    out_degree: int = Field(20, gt=0, description="edges of each entity, with distinct relations")
    phi: float = Field(7.2, gt=0, description="training paths for each in-distribution edge")
    ood_fraction: float = Field(0.05, ge=0, lt=1, description="edges that no training path uses")
    iid_fraction: float = Field(0.005, ge=0, lt=1, description="held-out share of the paths over in-distribution edges")
    test_size: int = Field(3_000, gt=0, description="most rows of an evaluation split")
    predict_stop: bool = Field(True, description="train on </a> after the answer too, as the paper does")
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _check(self) -> Composition:
        if self.out_degree > self.num_relations:
            raise ValueError(
                f"task.out_degree {self.out_degree} exceeds task.num_relations {self.num_relations}, but an entity's "
                "edges have distinct relations; lower task.out_degree or raise task.num_relations"
            )
        if self._num_ood == self.num_entities * self.out_degree:
            raise ValueError(f"task.ood_fraction {self.ood_fraction:g} leaves no edge for training paths; lower it")
        largest = self.out_degree * (1 - self.ood_fraction) * (1 - self.iid_fraction)
        if self.phi > largest:
            raise ValueError(self._phi_error(largest))
        return self

    @property
    def _num_ood(self) -> int:
        return round(self.num_entities * self.out_degree * self.ood_fraction)

    def _phi_error(self, largest: float) -> str:
        return (
            f"task.phi {self.phi:g} is more than the world holds: at most about {largest:.4g} with task.out_degree "
            f"{self.out_degree}; lower task.phi or raise task.out_degree"
        )

    @property
    def vocab_size(self) -> int:
        return self.num_entities + self.num_relations + len(SPECIAL_TOKENS) + 1

    @property
    def max_length(self) -> int:
        return 3 + self.predict_stop

    @property
    def num_answers(self) -> int:
        return 1 + self.predict_stop

    def vocabulary(self) -> tuple[str, ...]:
        entities, relations = numbered("e_", self.num_entities), numbered("r_", self.num_relations)
        return (*entities, *relations, *SPECIAL_TOKENS, PAD)

    def graph(self) -> KnowledgeGraph:
        return self._draw_graph(RandomState(self.seed))

    def build(self) -> Dataset:
        """Raises ConfigError if this seed's graph has too few paths for phi."""
        random = RandomState(self.seed)
        graph = self._draw_graph(random)
        paths, first_ood, second_ood = graph.paths()
        inside = paths[~first_ood & ~second_ood]
        held_out = random.random_sample(len(inside)) <= self.iid_fraction
        pool, iid, ood = inside[~held_out], inside[held_out], paths[first_ood & second_ood]
        id_edges, ood_edges = graph.edges(ood=False), graph.edges(ood=True)

        wanted = round(self.phi * len(id_edges))
        if wanted > len(pool):
            raise ConfigError(self._phi_error(len(pool) / max(len(id_edges), 1)))
        # The samples before the training set do not depend on phi, so that runs of different phi share them.
        tests = [sample(rows, self.test_size, random) for rows in (id_edges, ood_edges, iid, ood)]
        train = sample(pool, wanted, random)
        seen = sample(train, self.test_size, random)

        names = ("id_atomic", "ood_atomic", "train_inferred", "test_inferred_iid", "test_inferred_ood")
        tests.insert(2, seen)
        return make_dataset(
            self,
            self.vocabulary(),
            train={
                "id_atomic": self._split(id_edges),
                "ood_atomic": self._split(ood_edges),
                "train_inferred": self._split(train),
            },
            evaluation={name: self._split(rows) for name, rows in zip(names, tests, strict=True)},
            answer=Answer(slice(0, 1)),
            candidates={"train_inferred": len(pool), "test_inferred_iid": len(iid), "test_inferred_ood": len(ood)},
        )

    def tracing_examples(self, dataset: Dataset, split: str, count: int, seed: int) -> TracingExamples:
        return tracing_examples(dataset, split, count, seed)

    def _draw_graph(self, random: RandomState) -> KnowledgeGraph:
        """The order of the draws is the published generator's, so a seed gives its graph."""
        shape = (self.num_entities, self.out_degree)
        relations, tails = np.empty(shape, np.int64), np.empty(shape, np.int64)
        for entity in range(self.num_entities):
            relations[entity] = random.choice(self.num_relations, self.out_degree, replace=False)
            tails[entity] = random.randint(self.num_entities, size=self.out_degree)
        ood = np.zeros(tails.size, bool)
        ood[random.permutation(tails.size)[: self._num_ood]] = True
        return KnowledgeGraph(relations, tails, ood.reshape(shape))

    def _split(self, facts: IntArray) -> Split:
        """Facts [N, 3] (h, r, t) or [N, 4] (h, r1, r2, t) as indices of entities and relations."""
        first_relation = self.num_entities
        rows = facts.copy()
        rows[:, 1:-1] += first_relation
        if self.predict_stop:
            stop = first_relation + self.num_relations + SPECIAL_TOKENS.index(STOP)
            rows = np.column_stack([rows, np.full(len(rows), stop)])
        return answer_split(rows, facts.shape[1] - 1, self.max_length, pad=self.vocab_size - 1)


# ---- looking inside ----


def tracing_examples(dataset: Dataset, split: str, count: int, seed: int) -> TracingExamples:
    """Two-hop prompts `<h><r1><r2>` with bridge b and answer t; facts are read off the training rows.

    Candidates are in-distribution (ID): of edges that a training path uses.
    h: ID heads h' for which (h', r1, r2) does not lead to t, or nowhere. r1: relations of h's ID edges whose tail does
    not lead to t by r2. r2: relations of b's ID edges with another tail than t.
    """
    tails, is_id = _facts(dataset)
    rows = choose_rows(dataset, split, count, seed)
    chosen = dataset.evaluation[split]
    rows = rows[prompts_of_length(chosen, 3)[rows]]
    prompts, answers = chosen.tokens[rows, :3].numpy(), chosen.targets[rows, 0].numpy()
    heads, first, second = prompts.T
    bridges = tails[heads, first]
    if not len(rows) or (bridges < 0).any() or (tails[bridges, second] != answers).any():
        raise ConfigError(f"split: '{split}' has questions that are no compositions of training facts; trace another")
    id_heads = is_id.any(axis=1)
    candidates: dict[str, list[IntArray]] = {"h": [], "r1": [], "r2": []}
    for h, r1, r2, b, t in np.column_stack([prompts, bridges, answers]):
        # tails[-1] is the pad token's row, which has no facts: what leads nowhere stays nowhere
        candidates["h"].append(np.flatnonzero(id_heads & (tails[tails[:, r1], r2] != t)))
        candidates["r1"].append(np.flatnonzero(is_id[h] & (tails[tails[h], r2] != t)))
        candidates["r2"].append(np.flatnonzero(is_id[b] & (tails[b] != t)))
    return TracingExamples(
        torch.from_numpy(prompts),
        torch.from_numpy(answers),
        torch.from_numpy(rows),
        ("h", "r1", "r2"),
        {"b": Reading(1, torch.from_numpy(bridges)), "r2": Reading(2, torch.from_numpy(second.copy()))},
        {name: make_role(prompts, i, i + 1, found, i, seed) for i, (name, found) in enumerate(candidates.items())},
    )


def _facts(dataset: Dataset) -> tuple[IntArray, NDArray[np.bool_]]:
    """By token ids: tails [V, V] of (head, relation), -1 where there is no fact, and which edges are ID [V, V]."""
    train, size = dataset.train_split, len(dataset.vocabulary)
    tokens, targets = train.tokens.numpy(), train.targets[:, 0].numpy()
    atomic, paths = prompts_of_length(train, 2), tokens[prompts_of_length(train, 3), :3]
    tails, is_id = np.full((size, size), -1), np.zeros((size, size), bool)
    tails[tokens[atomic, 0], tokens[atomic, 1]] = targets[atomic]
    is_id[paths[:, 0], paths[:, 1]] = True
    is_id[tails[paths[:, 0], paths[:, 1]], paths[:, 2]] = True
    return tails, is_id
