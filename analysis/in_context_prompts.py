"""Hard comparison queries as prompts for a language model that reads the facts instead of having been trained on them.

Grokked Transformers (arXiv 2405.15071), section 5: all training facts of the query's attribute in English, or only the
two-hop neighbourhood of both entities ("retrieval"). The published prompt texts are not at hand; these are our own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import RandomState

from groundswell.config import ConfigError
from groundswell.files import atomic_folder, ensure_writable
from groundswell.protocols import Dataset, Split
from tasks.complex_reasoning import ComplexReasoning
from tasks.proofs import comparison_graph, proven_labels
from tasks.vocabulary import IntArray

CONTEXTS = {"prompt": "all facts", "retrieval": "retrieval"}  # as in file names -> as in tables
STYLES = {"directna": "direct", "cot": "CoT"}
QUERIES = "queries.json"
ORDERS = ("younger than", "in the same age as", "older than")  # of labels 0, 1, 2
CHOICES = "younger, older, same age, cannot decide"
INSTRUCTIONS = {
    "directna": f"Answer with one of: {CHOICES}. Give only the answer, in lower case, without explanation.\nAnswer:",
    "cot": "Think step by step: which facts compare these two people with others, and how old are those? Then end with "
    f'a line "Final answer: X", where X is one of: {CHOICES}.',
}
FIRST_NAMES = """
Aaron Abigail Adam Agnes Albert Alice Amelia Amir Andrea Anika Anton April Arthur Astrid Audrey Barbara Beatrice
Benjamin Bianca Boris Bridget Bruno Calvin Camille Carlos Caroline Cecil Charlotte Chloe Clara Connor Cyrus Daisy
Daniel Daphne David Deborah Dennis Diana Dmitri Dora Edgar Edith Eleanor Elias Ella Emil Emma Eric Esther Eva Felix
Fiona Florence Francis Freya George Georgia Gloria Grace Gregory Greta Hannah Harold Harriet Hassan Hazel Hector Helen
Henry Hugo Ibrahim Ida Igor Imogen Ingrid Irene Isaac Isabel Ivan Jacob Jane Jasmine Jerome Joan Jonas Joseph Judith
Julia Karen Karl Keith Kiran Laila Lara Laura Lawrence Leo Lillian Linda Louis Lucy Luke Lydia Magnus Marcus Margaret
Maria Martin Matilda Maya Miriam Naomi Nathan Nina Noah Nora Oliver Omar Oscar Patrick Paula Peter Philip Quentin
Rachel Ralph Rosa Ruth Samuel Sarah Simon Sofia Stella Theo Ursula Victor Viola Walter Yara
"""
LAST_NAMES = """
Abbott Acosta Adler Ahmed Allison Anders Archer Ashby Atwood Bailey Baker Banks Barlow Barton Becker Bennett Berger
Bishop Blake Bowen Bradley Brandt Briggs Brooks Bryant Burke Byrne Calder Campos Carver Castro Chandler Chen Clarke
Coleman Conway Cooper Costa Craig Crane Cruz Dalton Davies Dawson Decker Delgado Diaz Dixon Doyle Drake Duncan Eaton
Edwards Ellis Erikson Evans Farrell Ferreira Fisher Fleming Forbes Foster Fox Fraser Gallo Garcia Gibson Gordon Grant
Greene Griffin Gupta Hale Hansen Hardy Harper Hayes Hobbs Holt Hughes Hunt Ibarra Ivanov Jensen Jordan Kapoor Keller
Kim Klein Knight Kovacs Lambert Lang Larsen Lopez Lowe Lynch Maddox Marsh Mason Meyer Moreau Morris Murphy Nash Nguyen
Novak Nolan Olsen Ortega Palmer Parker Patel Perez Petrov Pierce Porter Quinn Ramos Reed Reyes Rossi Rowe Sato Schmidt
Shah Silva Singh Sloan Stone Tanaka Taylor Torres Turner Vargas Vega Wagner Walsh Weber Wells Wong Yates Zimmer
"""


@dataclass(frozen=True)
class Query:
    """A pair of OOD entities to compare, and the facts to do it with."""

    attribute: int
    first: int
    second: int
    label: int
    facts: IntArray  # [N, 3] of the attribute, as `training_facts` has them
    near: IntArray  # [M] places in `facts`: the two-hop neighbourhood

    def decides(self, facts: IntArray) -> bool:
        """Do these facts prove the label?"""
        return proven_label(facts, self.first, self.second) == self.label


def prompt_file(context: str, style: str, k: int) -> str:
    return f"{context}_{style}_{k}.txt"


def gold_file(k: int) -> str:
    return f"answer_{k}.txt"


# ---- facts ----


def training_facts(dataset: Dataset) -> IntArray:
    """All training facts of a ComplexReasoning data set as rows [N, 4]: attribute, e1, e2, label. A fact about a value
    is about one entity: e1 == e2, and the last column is the value."""
    num_values = dataset.manifest["train_blocks"]["id_atomic"]
    # <q><e><attr><mask></q><a><value></a>
    train = dataset.train_split
    rows, said = train.tokens[:num_values].numpy(), train.targets[:num_values, 1].numpy()
    value, attribute = said - dataset.vocabulary.index("<0>"), rows[:, 2] - dataset.vocabulary.index("<attr_0>")
    comparisons = comparison_rows(train.select(slice(num_values, None)), dataset.vocabulary)
    return np.concatenate([np.stack([attribute, rows[:, 1], rows[:, 1], value], axis=1), comparisons])


def comparison_rows(split: Split, vocabulary: Sequence[str]) -> IntArray:
    """<attr><q><e1><mask><e2></q><a><label></a> -> [N, 4] attribute, e1, e2, label."""
    attribute = split.tokens[:, 0].numpy() - vocabulary.index("<attr_0>")
    label = split.targets[:, 1].numpy() - vocabulary.index("<attr_0_0>") - len(ORDERS) * attribute
    return np.column_stack([attribute, split.tokens[:, [2, 4]].numpy(), label])


def neighbourhood(facts: IntArray, first: int, second: int) -> IntArray:
    """Facts [N, 3] (e1, e2, said) -> places of those that mention an entity at most one comparison away from `first` or
    `second`."""
    near = np.zeros(int(facts[:, :2].max()) + 1, bool)
    near[[first, second]] = True
    near[facts[near[facts[:, :2]].any(axis=1), :2]] = True
    return np.flatnonzero(near[facts[:, :2]].any(axis=1))


def proven_label(facts: IntArray, first: int, second: int) -> int:
    """What facts [N, 3] (e1, e2, said) prove about two entities; UNPROVEN if nothing."""
    about_value = facts[:, 0] == facts[:, 1]
    values, pairs = facts[about_value], facts[~about_value]
    num_entities = max(int(facts[:, :2].max()), first, second) + 1
    num_values = int(values[:, 2].max(initial=-1)) + 1
    # a node for each entity and each value: an entity equals its value, and the values are a chain
    left = np.concatenate([pairs[:, 0], values[:, 0], num_entities + np.arange(1, num_values)])
    right = np.concatenate([pairs[:, 1], num_entities + values[:, 2], num_entities + np.arange(num_values - 1)])
    labels = np.concatenate([pairs[:, 2], np.full(len(values), 1), np.full(max(0, num_values - 1), 2)])
    graph = comparison_graph(num_entities + num_values, left, right, labels)
    return int(proven_labels(graph, np.array([first, second]))[0, 1])


def hard_queries(dataset: Dataset, attribute: int | None = None) -> dict[int, Query]:
    """Number in the split test_hard -> query; only those of one attribute if it is given. All can be decided, also from
    their neighbourhoods alone: the last in-distribution entity on either end of a proof is compared with that end."""
    facts = training_facts(dataset)
    by_attribute = cache(lambda number: facts[facts[:, 0] == number, 1:])
    found = {}
    for k, row in enumerate(comparison_rows(dataset.evaluation["test_hard"], dataset.vocabulary).tolist()):
        number, first, second, label = row
        if attribute in (None, number):
            mine = by_attribute(number)
            query = Query(number, first, second, label, mine, neighbourhood(mine, first, second))
            assert query.decides(query.facts[query.near]), f"query {k} has no proof in its neighbourhood"
            found[k] = query
    return found


# ---- English ----


def person_names(count: int, seed: int) -> list[str]:
    """Distinct names, one for each entity."""
    names = [f"{first} {last}" for first in FIRST_NAMES.split() for last in LAST_NAMES.split()]
    if count > len(names):
        raise ConfigError(f"task.num_entities {count}: there are names for {len(names)} people only; lower it")
    return [names[n] for n in RandomState(seed).permutation(len(names))[:count]]


def sentence(fact: Sequence[int], names: Sequence[str]) -> str:
    first, second, said = fact
    if first == second:
        return f"The age of {names[first]} is {said}."
    return f"{names[first]} is {ORDERS[said]} {names[second]}."


def prompt_text(sentences: Sequence[str], people: Sequence[str], style: str) -> str:
    first, second = people
    question = f"Going by these facts, is {first} younger than, older than or in the same age as {second}?"
    return f"Facts about the ages of some people:\n\n{' '.join(sentences)}\n\n{question} {INSTRUCTIONS[style]}\n"


def shuffled(query: Query, sentences: Sequence[str], seed: list[int]) -> dict[str, list[str]]:
    """Context -> sentences in random order; the neighbourhood keeps the order that it has among all."""
    order = RandomState(seed).permutation(len(sentences))
    near = np.isin(order, query.near)
    return {"prompt": [sentences[n] for n in order], "retrieval": [sentences[n] for n in order[near]]}


# ---- the folder ----


def write_prompts(
    folder: Path, task: ComplexReasoning, seed: int = 0, attribute: int | None = None, run: str | None = None
) -> dict[str, Any]:
    """Write prompts and answers as a new folder; returns what queries.json says. Raises ConfigError."""
    if folder.exists():
        raise ConfigError(f"{folder} exists already; name a new folder")
    if attribute is not None and not 0 <= attribute < task.num_attributes:
        raise ConfigError(f"--attribute {attribute}: the task has attributes 0 to {task.num_attributes - 1}")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed {seed}: must be at least 0 and below 2^32")
    ensure_writable(folder.parent, "prompts")
    names = person_names(task.num_entities, seed)
    dataset = task.build()
    queries = hard_queries(dataset, attribute)
    if not queries:
        raise ConfigError("the task has no hard queries here; raise task.num_entities or task.hard_per_label")
    by_attribute = {query.attribute: query.facts for query in queries.values()}
    sentences = {a: [sentence(fact, names) for fact in facts.tolist()] for a, facts in by_attribute.items()}
    rows = []
    with atomic_folder(folder) as path:
        for k, query in queries.items():
            people = [names[query.first], names[query.second]]
            contexts = shuffled(query, sentences[query.attribute], [seed, k])
            for context, facts in contexts.items():
                for style in STYLES:
                    (path / prompt_file(context, style, k)).write_text(prompt_text(facts, people, style))
            (path / gold_file(k)).write_text(f"{query.label}\n")
            rows.append(_description(k, query, people, contexts))
        described = {
            "task": task.to_dict(),
            "sha256": dataset.manifest["sha256"],
            "run": run,
            "seed": seed,
            "attribute": attribute,
            "queries": rows,
        }
        (path / QUERIES).write_text(json.dumps(described, indent=1) + "\n")
    return described


def _description(k: int, query: Query, people: Sequence[str], contexts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        "k": k,
        "attribute": query.attribute,
        "e1": query.first,
        "e2": query.second,
        "names": list(people),
        "label": query.label,
        "facts": {context: len(facts) for context, facts in contexts.items()},
    }


def read_queries(folder: Path) -> dict[str, Any]:
    """queries.json. Raises ConfigError where it is missing or damaged."""
    try:
        described = json.loads((folder / QUERIES).read_bytes())
        assert {"task", "sha256", "queries"} <= described.keys()
        return described
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{folder / QUERIES}: {reason}; give a folder of `groundswell in-context write`") from None
    except (ValueError, AttributeError, AssertionError):
        raise ConfigError(f"{folder / QUERIES} is damaged; write the folder again") from None
