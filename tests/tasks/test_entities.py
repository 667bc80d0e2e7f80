"""Sizes, words and bad input of the Reversal Curse tasks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import RandomState

from groundswell import ConfigError
from tasks.chain import Chain
from tasks.chain_related import ChainRelated
from tasks.entities import LARGEST_POOL, words
from tasks.reverse import Reverse
from tasks.reverse_icl import ReverseICL


@pytest.mark.parametrize(
    ("size", "train", "validation"), [(20, 9, 1), (50, 20, 4), (200, 85, 15), (800, 340, 60), (2000, 850, 150)]
)
def test_published_sizes_of_reverse(size, train, validation):
    facts = Reverse(entity_vocab_size=size).draw()
    assert (len(facts.train), len(facts.validation)) == (train, validation)


def test_published_sizes_of_the_others():
    facts = Chain().draw()
    assert (len(facts.train), len(facts.validation)) == (540, 60)
    facts = ReverseICL().draw()
    assert (len(facts.train), len(facts.validation)) == (700, 300)
    facts = ChainRelated().draw()
    assert (len(facts.train), len(facts.validation)) == (700, 50)
    limited = Reverse(word_size=3, original_limits=True)
    assert (len(limited.draw().train), limited.num_train) == (250, 250)


@given(size=st.integers(2, 40), length=st.integers(1, 6), seed=st.integers(0, 99), share=st.floats(0.01, 1.0))
def test_words_are_distinct_and_over_their_alphabet(size, length, seed, share):
    count = max(1, min(200, int(share * min(size**length, 10_000))))
    alphabets = [np.arange(size) + 100, np.arange(size) + 500]
    if 10_000 < size**length <= LARGEST_POOL:
        return  # shuffles millions; the published sizes cover it
    for alphabet, found in zip(alphabets, words(RandomState(seed), alphabets, length, count), strict=True):
        assert found.shape == (count, length)
        assert np.isin(found, alphabet).all()
        assert len(np.unique(found, axis=0)) == count


def test_pools_too_large_to_number_are_sampled():
    """word_size 4 over 200 letters: 1.6 thousand million words."""
    task = Reverse(word_size=4)
    facts = task.draw()
    assert len(facts.train) == task.num_train == 680
    first = facts.train[facts.train[:, 4] == 0][:, :4]
    assert len(np.unique(first, axis=0)) == len(first)


def test_every_held_out_fact_is_known_from_its_other_side():
    facts = Reverse(entity_vocab_size=80).draw()
    known = {tuple(row) for row in facts.train.tolist()}
    for first, relation, second in facts.validation.tolist():
        assert (second, 1 - relation, first) in known and (first, relation, second) not in known
    facts = Chain(entity_vocab_size=80).draw()
    hops = {row[0]: row[2] for row in facts.train.tolist() if row[1] == 0}
    for x, relation, z in facts.validation.tolist():
        assert relation == 1 and hops[hops[x]] == z


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (Reverse, {"entity_vocab_size": 7}, "entity_vocab_size: 7 gives alphabets of 1; at least 8 is needed"),
        (Reverse, {"entity_vocab_size": 0}, "entity_vocab_size: Input should be greater than or equal to 1"),
        (Reverse, {"word_size": 0}, "word_size: Input should be greater than or equal to 1"),
        (Reverse, {"word_size": 17}, "word_size: Input should be less than or equal to 16"),
        (
            Chain,
            {"entity_vocab_size": 8, "word_size": 2, "num_triples": 5},
            "num_triples: 5 is out of range; word_size 2 over 2 letters allows 2 to 4",
        ),
        (Reverse, {"entity_vocab_size": 20, "train_fraction": 0.99}, "train_fraction: 0.99 leaves one side of 5 facts"),
        (
            ReverseICL,
            {"entity_vocab_size": 40},
            "entity_vocab_size: 40 is too small for 100 x and 10 y tokens; at least 113 is needed",
        ),
        (ReverseICL, {"num_y_tokens": 2, "train_fraction": 0.4}, "train_fraction: 0.4 of 2 y tokens leaves one side"),
        (ChainRelated, {"alphabet_size": 798}, "alphabet_size: 798 is too large: with 3 letters at most 797 fit"),
        (ChainRelated, {"num_train_triples": 580}, "need 630 indices; alphabet_size 600 allows 600 in all"),
        (Reverse, {"loss_scope": "first"}, "loss_scope: Input should be 'last' or 'whole'"),
    ],
)
def test_odd_sizes_are_told(task, fields, message):
    with pytest.raises(ConfigError) as error:
        task.from_dict(fields)
    assert message in str(error.value)
