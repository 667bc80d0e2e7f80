from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from groundswell.config import ConfigError
from groundswell.protocols import Dataset
from tasks.composition import Composition
from tasks.examples import row_texts
from tasks.vocabulary import TOKEN


def facts(dataset: Dataset, name: str) -> list[tuple[str, ...]]:
    """(h, r, t) or (h, r1, r2, t) as token strings."""
    split = dataset.train if name == "train" else dataset.evaluation[name]
    return [tuple(TOKEN.findall(prompt + answer)) for prompt, answer in row_texts(split, dataset.vocabulary)]


@st.composite
def worlds(draw: st.DrawFn) -> Composition:
    degree = draw(st.integers(1, 6))
    ood, iid = draw(st.sampled_from([0.0, 0.1, 0.4])), draw(st.sampled_from([0.0, 0.1, 0.5]))
    return Composition(
        num_entities=draw(st.integers(2, 15)),
        num_relations=draw(st.integers(degree, 8)),
        out_degree=degree,
        phi=draw(st.floats(0.2, 0.8)) * degree * (1 - ood) * (1 - iid),
        ood_fraction=ood,
        iid_fraction=iid,
        predict_stop=False,
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_two_hop_facts_are_composed_of_edges_of_the_right_kind(task: Composition) -> None:
    try:
        dataset = task.build()
    except ConfigError:
        assume(False)
    blocks = dataset.manifest["train_blocks"]
    train = facts(dataset, "train")
    id_edges = {fact[:2]: fact[2] for fact in train[: blocks["id_atomic"]]}
    atomic = train[: blocks["id_atomic"] + blocks["ood_atomic"]]
    ood_edges = {fact[:2]: fact[2] for fact in atomic[blocks["id_atomic"] :]}
    assert len(ood_edges) == round(task.num_entities * task.out_degree * task.ood_fraction)
    assert Counter(fact[0] for fact in atomic) == {f"<e_{e}>": task.out_degree for e in range(task.num_entities)}
    assert len(train) - len(atomic) == round(task.phi * len(id_edges))

    def composed(edges: dict) -> set[tuple[str, ...]]:
        return {(h, r1, r2, t) for (h, r1), b in edges.items() for (start, r2), t in edges.items() if start == b}

    inside, outside = composed(id_edges), composed(ood_edges)
    assert set(train[len(atomic) :]) <= inside
    assert set(facts(dataset, "train_inferred")) == set(train[len(atomic) :])
    iid = facts(dataset, "test_inferred_iid")
    assert set(iid) <= inside
    assert set(facts(dataset, "test_inferred_ood")) == outside
    assert dataset.manifest["candidates"]["train_inferred"] + len(iid) == len(inside)


def test_all_phi_of_a_seed_share_tests_and_nest_training() -> None:
    world = {"num_entities": 30, "num_relations": 10, "out_degree": 8, "iid_fraction": 0.1, "test_size": 100, "seed": 3}
    small, large = Composition(phi=2, **world).build(), Composition(phi=5, **world).build()
    for name in ("id_atomic", "ood_atomic", "test_inferred_iid", "test_inferred_ood"):
        assert small.evaluation[name].tokens.equal(large.evaluation[name].tokens)
        assert 0 < len(small.evaluation[name]) <= 100
    assert len(small.train) < len(large.train)
    assert small.train.tokens.equal(large.train.tokens[: len(small.train)])


def test_without_stop_only_the_stop_is_missing() -> None:
    world = {"num_entities": 30, "num_relations": 10, "out_degree": 8, "phi": 2}
    whole, bare = Composition(**world).build().train, Composition(predict_stop=False, **world).build().train
    assert bare.tokens.shape[1] == 3 and whole.tokens.shape[1] == 4
    assert bare.targets.equal(whole.targets[:, :1]) and bare.positions.equal(whole.positions[:, :1])


def test_paper_vocabulary() -> None:
    assert Composition().vocab_size == 2_206 + 1  # and the padding


def test_phi_beyond_the_world_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"task\.phi 19 .* at most about 18\.9.*lower task\.phi or raise task\.out_degree"
    ):
        Composition.from_dict({"phi": 19})
    # The expectation allows this phi, but some seeds' graphs hold fewer paths.
    close = {"num_entities": 10, "num_relations": 4, "out_degree": 3, "phi": 2.25, "iid_fraction": 0.2}
    with pytest.raises(ConfigError, match=r"task\.phi 2\.25 .* at most about .*lower task\.phi"):
        for seed in range(20):
            Composition(seed=seed, **close).build()


def test_a_world_of_ood_edges_only_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.ood_fraction 0\.9 leaves no edge for training paths; lower it"):
        Composition.from_dict({"num_entities": 2, "out_degree": 1, "ood_fraction": 0.9, "phi": 0.01})


def test_more_edges_than_relations_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"task\.out_degree 20 exceeds task\.num_relations 10.*lower task\.out_degree"
    ):
        Composition.from_dict({"num_relations": 10})


@pytest.mark.parametrize("field, value", [("phi", 0), ("ood_fraction", 1), ("iid_fraction", -0.1), ("seed", 2**32)])
def test_fields_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        Composition(**{field: value})
