"""Abacus: places of digits against the published modules, offsets, and the stand-alone module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.abacus import Abacus, digit_places, shifted
from models.recurrent import RecurrentDecoder

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "arithmetic" / "abacus_ids.json").read_text())


def ids(tokens: list[list[int]], offset: int = 0) -> list[list[int]]:
    """Through the model's own method."""
    found = RecurrentDecoder().abacus_ids(torch.tensor([tokens]), torch.tensor([offset]) if offset else None)
    return found[0].tolist()


@pytest.mark.parametrize("case", [c for c in RECORDED["cases"] if "eval_ids" in c], ids=lambda c: c["text"])
def test_published_ids(case: dict) -> None:
    assert ids([case["token_ids"]]) == [case["eval_ids"]]
    for drawn in case["train"]:
        assert ids([case["token_ids"]], drawn["k"]) == [drawn["ids"]]


def test_a_row_of_one_digit() -> None:
    """The published code fails here."""
    assert ids([[9]]) == [[1]]


def test_batches_share_the_offset_and_padding_ends_numbers() -> None:
    batch = RECORDED["batch"]
    assert ids(batch["input_ids"]) == batch["eval_ids"]
    assert ids(batch["input_ids"], batch["k"]) == batch["train_ids"]
    assert ids(RECORDED["random_rows"]["input_ids"]) == RECORDED["random_rows"]["eval_ids"]


def test_each_run_has_its_own_offset() -> None:
    tokens = torch.tensor(RECORDED["batch"]["input_ids"]).expand(3, -1, -1)
    model = RecurrentDecoder(abacus_max_offset=50)
    offsets = model.offsets([torch.Generator().manual_seed(seed) for seed in range(3)], tokens.device)
    assert offsets is not None and offsets.shape == (3,) and len(set(offsets.tolist())) > 1
    places = model.abacus_ids(tokens, offsets)
    alone = model.abacus_ids(tokens[1:2], model.offsets([torch.Generator().manual_seed(1)], tokens.device))
    assert torch.equal(places[1:2], alone)
    assert torch.equal(places[1] - places[0], (places[0] > 0) * (offsets[1] - offsets[0]))


def test_offsets_cover_their_range() -> None:
    generator = torch.Generator().manual_seed(0)
    model = RecurrentDecoder(abacus_max_offset=3)
    drawn = [model.offsets([generator], torch.device("cpu")) for _ in range(200)]
    assert {int(offset) for offset in drawn if offset is not None} == {0, 1, 2, 3}


def test_places() -> None:
    digits = torch.tensor([[True, True, False, True], [False, True, True, True]])
    places = digit_places(digits)
    assert places.tolist() == [[1, 2, 0, 1], [0, 1, 2, 3]]
    assert shifted(places, torch.tensor([[5], [0]])).tolist() == [[6, 7, 0, 6], [0, 1, 2, 3]]


def test_module_against_the_published_one() -> None:
    recorded = RECORDED["standalone"]
    module = Abacus(recorded["digit_tokens"], embedding_dim=6, max_seq_length=16, max_k=4).eval()
    tokens = torch.tensor(recorded["input_ids"])
    assert module.ids(tokens).tolist() == recorded["eval_ids"]
    assert torch.equal(module(tokens), module.embedding(torch.tensor(recorded["eval_ids"])))


def test_module_shifts_in_training_only() -> None:
    module = Abacus([4, 5], embedding_dim=3, max_seq_length=40, max_k=20)
    tokens = torch.tensor([[4, 5, 9, 4]])
    shift = int(torch.randint(21, (), generator=torch.Generator().manual_seed(1)))
    assert shift > 0
    expected = module.embedding(torch.tensor([[1 + shift, 2 + shift, 0, 1 + shift]]))
    assert torch.equal(module(tokens, torch.Generator().manual_seed(1)), expected)
    assert torch.equal(module.eval()(tokens), module.embedding(torch.tensor([[1, 2, 0, 1]])))


def test_numbers_longer_than_the_table() -> None:
    module = Abacus([4], embedding_dim=3, max_seq_length=4, max_k=0)
    assert module(torch.full((1, 3), 4)).shape == (1, 3, 3)
    assert module(torch.tensor([[4, 4, 4, 9, 4, 4]])).shape == (1, 6, 3)  # long rows of short numbers
    with pytest.raises(ValueError, match="a number of 4 digits at offset 0 does not fit a table of 4 rows"):
        module(torch.full((1, 4), 4))
    with pytest.raises(ValueError, match="max_k 4 must be"):
        Abacus([4], embedding_dim=3, max_seq_length=4, max_k=4)
