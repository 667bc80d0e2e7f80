"""Comparison and complex reasoning: worlds, proofs and their limits."""

import itertools

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundswell.config import ConfigError
from tasks.attribute_world import AttributeWorld, PairFacts
from tasks.comparison import Comparison
from tasks.complex_reasoning import ComplexReasoning, find_queries
from tasks.examples import row_texts
from tasks.proofs import UNPROVEN, comparison_graph, proven_labels


def all_facts(facts: PairFacts) -> list[tuple[int, ...]]:
    return [tuple(row) for row in facts.rows(np.arange(len(facts))).tolist()]


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 12), st.integers(1, 3), st.sampled_from([0.0, 0.2, 0.5]), st.integers(0, 2**32 - 1))
def test_every_ordered_pair_is_in_the_split_of_its_kind(entities: int, attributes: int, ood: float, seed: int) -> None:
    task = ComplexReasoning(num_entities=entities, num_attributes=attributes, ood_fraction=ood, seed=seed)
    world = task.world()
    kinds = {name: all_facts(getattr(world, name)) for name in ("pool", "iid", "cross", "both_ood")}
    everything = [fact for facts in kinds.values() for fact in facts]
    expected = [(a, *pair) for a in range(attributes) for pair in itertools.permutations(range(entities), 2)]
    assert sorted(everything) == sorted(expected)
    num_ood = {"pool": 0, "iid": 0, "cross": 1, "both_ood": 2}
    for name, facts in kinds.items():
        assert all(world.ood[e1, a] + int(world.ood[e2, a]) == num_ood[name] for a, e1, e2 in facts)
        assert {(a, e2, e1) for a, e1, e2 in facts} == set(facts)
    assert (world.ood.sum(axis=0) == entities - round((1 - ood) * entities)).all()


def test_comparison_labels_follow_the_values() -> None:
    task = Comparison(num_entities=30, num_attributes=3, num_values=4, phi=5)
    dataset, values = task.build(), task.world().values
    symbol = {-1: 0, 0: 1, 1: 2}
    checked = 0
    for prompt, answer in row_texts(dataset.train, dataset.vocabulary):
        tokens = prompt.strip("<>").split("><")
        if len(tokens) == 2:
            entity, attribute = (int(token.split("_")[1]) for token in tokens)
            assert answer == f"<{values[entity, attribute]}></a>"
        else:
            attribute, first, second = (int(tokens[place].split("_")[1]) for place in (0, 2, 4))
            order = int(np.sign(values[first, attribute] - values[second, attribute]))
            assert answer == f"<attr_{attribute}_{symbol[order]}></a>"
            checked += 1
    assert checked == 5 * 27 * 3


def test_all_phi_of_a_seed_share_tests_and_nest_training() -> None:
    world = {"num_entities": 40, "num_attributes": 3, "num_values": 5, "test_size": 50}
    small, large = Comparison(phi=2, **world).build(), Comparison(phi=6, **world).build()
    for name in ("test_inferred_ood", "id_atomic", "ood_atomic", "test_inferred_iid"):
        assert small.evaluation[name].tokens.equal(large.evaluation[name].tokens)
    assert small.train.tokens.equal(large.train.tokens[: len(small.train)])


def test_comparison_phi_beyond_the_world_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.phi 50 .* at most about 7\.2 with 9 .*raise task\.num_entities"):
        Comparison.from_dict({"num_entities": 10, "phi": 50})
    with pytest.raises(ConfigError, match=r"task\.phi 7\.1 .* at most about .*lower task\.phi"):
        for seed in range(20):  # the expectation allows it, some seeds do not
            Comparison(num_entities=10, num_attributes=1, phi=7.1, seed=seed).build()


@pytest.mark.parametrize("task", [Comparison, ComplexReasoning])
def test_a_world_without_pairs_is_refused(task: type[Comparison] | type[ComplexReasoning]) -> None:
    with pytest.raises(ConfigError, match=r"task\.ood_fraction 0\.9 leaves 1 of 10 .*lower task\.ood_fraction"):
        task.from_dict({"num_entities": 10, "ood_fraction": 0.9})


def test_paper_vocabulary() -> None:
    assert Comparison().vocab_size == ComplexReasoning().vocab_size == 1_106 + 1  # and the padding


def test_proofs_by_hand() -> None:
    # 0 > 1 = 2, 3 < 2; 4 is joined to nothing.
    graph = comparison_graph(5, np.array([0, 1, 3]), np.array([1, 2, 2]), np.array([2, 1, 0]))
    u = UNPROVEN
    assert proven_labels(graph, np.arange(5)).tolist() == [
        [u, 2, 2, 2, u],
        [0, u, 1, 2, u],
        [0, 1, u, 2, u],
        [0, 0, 0, u, u],
        [u, u, u, u, u],
    ]


def strict_proofs(world: AttributeWorld, attribute: int, facts: np.ndarray, with_values: bool) -> set[tuple[int, ...]]:
    """An independent prover that follows strictness: a > b needs a path with a strict edge, a = b one each way."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(world.values)))

    def add(first: int, second: int) -> None:
        order = world.values[first, attribute] - world.values[second, attribute]
        if order >= 0:
            graph.add_edge(first, second, strict=order > 0)
        if order <= 0:
            graph.add_edge(second, first, strict=order < 0)

    for row_attribute, first, second in facts.tolist():
        if row_attribute == attribute:
            add(first, second)
    if with_values:
        for first, second in itertools.combinations(np.flatnonzero(~world.ood[:, attribute]).tolist(), 2):
            add(first, second)
    above = {node: nx.descendants(graph, node) | {node} for node in graph}
    strict_edges = [(a, b) for a, b, strict in graph.edges(data="strict") if strict]

    def larger(first: int, second: int) -> bool:
        return any(a in above[first] and second in above[b] for a, b in strict_edges)

    proofs = set()
    for first, second in itertools.permutations(np.flatnonzero(world.ood[:, attribute]).tolist(), 2):
        if larger(first, second):
            proofs.add((attribute, first, second, 2))
        elif larger(second, first):
            proofs.add((attribute, first, second, 0))
        elif second in above[first] and first in above[second]:
            proofs.add((attribute, first, second, 1))
    return proofs


@settings(max_examples=40, deadline=None)
@given(st.integers(6, 14), st.integers(2, 4), st.floats(0.05, 0.6), st.integers(0, 2**32 - 1))
def test_queries_are_those_with_a_strict_proof(entities: int, values: int, share: float, seed: int) -> None:
    task = ComplexReasoning(num_entities=entities, num_attributes=2, num_values=values, ood_fraction=0.4, seed=seed)
    world, random = task.world(), np.random.RandomState(seed)
    topleft = world.pool.sample(round(share * len(world.pool)), random)
    cross = world.cross.sample(round(share * len(world.cross)), random)
    queries = find_queries(world, topleft, cross)
    solvable, easy = set(), set()
    for attribute in range(2):
        solvable |= strict_proofs(world, attribute, cross, with_values=True)
        easy |= strict_proofs(world, attribute, np.concatenate([cross, topleft]), with_values=False)
    for found, expected in [(queries.solvable, solvable), (queries.easy, easy), (queries.hard, solvable - easy)]:
        assert len(found) == len(expected)
        assert {tuple(row) for row in found.tolist()} == expected


@pytest.mark.slow
@pytest.mark.parametrize("name, limit_s", [("composition", 20), ("comparison", 30), ("complex reasoning", 60)])
def test_paper_sizes_generate_in_seconds(name: str, limit_s: float) -> None:
    import time

    from tasks.composition import Composition

    task = {"composition": Composition(), "comparison": Comparison(), "complex reasoning": ComplexReasoning()}[name]
    start = time.perf_counter()
    dataset = task.build()
    elapsed = time.perf_counter() - start
    print(f"{name}: {len(dataset.train):,} training rows in {elapsed:.2f} s")
    rows = {"composition": 313_600, "comparison": 149_600}
    assert len(dataset.train) == rows.get(name, len(dataset.train))
    if name == "complex reasoning":  # 18,000 + 437 thousand + 108,000 (section 5 of the paper)
        assert dataset.manifest["train_blocks"]["train_inferred_cross"] == 108_000
        assert round(dataset.manifest["train_blocks"]["train_inferred_topleft"], -3) == 437_000
        assert len(dataset.evaluation["test_hard"]) == 150
    assert elapsed < limit_s
