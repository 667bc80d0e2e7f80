"""Vocabularies, generated lines, tokenised splits and verdicts against fixtures made by the original's own code."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from groundswell.protocols import IGNORE
from tasks.arithmetic_files import encode_lines, shuffle_and_split
from tasks.arithmetic_grading import exact, smallest_right, sorted_exact
from tasks.arithmetic_original import (
    bucket_lines,
    or_lines,
    pick_symbols,
    plain_lines,
    sorting_bucket_lines,
    sorting_lines,
    with_hints,
)
from tasks.arithmetic_vocabulary import EOS, PAD, VOCABULARIES

FOLDER = Path(__file__).parents[1] / "golden/arithmetic"
DATASETS = json.loads((FOLDER / "datasets.json").read_text())
GRADING = json.loads((FOLDER / "grading.json").read_text())
TOKENIZED = json.loads((FOLDER / "tokenize_split.json").read_text())
VOCABULARY = json.loads((FOLDER / "vocab.json").read_text())
PAD_VOCABULARY, SORT_VOCABULARY = VOCABULARIES["pad"], VOCABULARIES["sort"]
SYMBOLS = {"$": EOS, "_": PAD, "?": 1}


def ids(symbols: str, vocabulary: Any = PAD_VOCABULARY) -> list[int]:
    return [SYMBOLS.get(symbol) if symbol in SYMBOLS else vocabulary.id_of(symbol) for symbol in symbols]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_of_the_vocabularies(name: str) -> None:
    known = VOCABULARIES[name]
    assert {token: index for index, token in enumerate(known.tokens)} == VOCABULARY[name]["vocab"]
    assert len(known) == VOCABULARY[name]["vocab_size"]


def generated(name: str) -> list[str]:
    case = DATASETS[name]
    arguments = dict(case.get("args", {}))
    seeded = random.Random(case.get("python_random_seed", 0))
    if name.startswith("add_") or name.startswith(("mul_", "sub_")):
        return bucket_lines(seeded, **arguments)
    if name.startswith("gen_"):
        inside = int(case["function"].partition("random.seed(")[2].partition("random.seed(")[2].rstrip(")"))
        return plain_lines(random.Random(inside), **arguments)
    if name.startswith("or_"):
        words = case["argv"]
        n, m = (int(words[words.index(flag) + 1]) for flag in ("--n", "--m"))
        most = int(words[words.index("--max") + 1]) if "--max" in words else None
        return or_lines(seeded, n, m, exact="--exact" in words, most=most)
    make = sorting_bucket_lines if case["function"] == "bucket_uniform_distribution" else sorting_lines
    return make(seeded, **arguments)


@pytest.mark.parametrize("name", [name for name, case in DATASETS.items() if "lines" in case])
def test_lines_and_their_ids(name: str) -> None:
    case = DATASETS[name]
    assert generated(name) == case["lines"]
    vocabulary = VOCABULARIES[case["tokenizer"]]
    assert [vocabulary.encode(line) for line in case["lines"]] == case["token_ids"]


def test_symbols_of_hints() -> None:
    case = DATASETS["pick_char_set"]
    seeded = random.Random(case["python_random_seed"])
    assert [pick_symbols(seeded, case["max_len"]) for _ in case["draws"]] == case["draws"]
    hints = DATASETS["hints_helper"]
    letters = pick_symbols(random.Random(hints["python_random_seed"]), 5)
    assert list(letters) == hints["pick_char_set_5"]
    assert {digits: with_hints(digits, letters) for digits in hints["out"]} == hints["out"]


def test_the_evident_line_with_hints() -> None:
    (line,) = bucket_lines(random.Random(0), 3, 3, "+", 1, start=3, reverse_all=True, index_hints=True)
    assert len(line) == 2 * 3 + 1 + 2 * 3 + 1 + len(line.partition("=")[2])
    first, second = line.partition("=")[0].split("+")
    assert first[::2] == second[::2]
    assert line.partition("=")[2][:6:2] == first[::2]


@pytest.mark.parametrize("name", ["r005", "r0", "r001_small"])
def test_tokenised_splits(name: str) -> None:
    case = TOKENIZED[name]
    rows = encode_lines("\n".join([*case["lines"], ""]), PAD_VOCABULARY, Path("lines.txt"), 1)
    splits = shuffle_and_split(rows, case["test_split_ratio"], seed=None)
    assert splits["train"].tolist() == case["train"]
    assert splits["test"].tolist() == case["test"]


def test_decoding() -> None:
    assert [PAD_VOCABULARY.decode(case["ids"]) for case in TOKENIZED["decode"]] == [
        c["text"] for c in TOKENIZED["decode"]
    ]


def targets(rows: list[list[int]], width: int) -> torch.Tensor:
    return torch.tensor([[*row, *[IGNORE] * (width - len(row))] for row in rows])


@pytest.mark.parametrize("case", GRADING["addition_single"], ids=lambda case: case["case"])
def test_verdict_on_one_sum(case: dict) -> None:
    assert ids(case["generated_symbols"]) == case["generated_ids"]
    gold = targets([case["gold_ids"]], case["token_limit"])
    assert exact(torch.tensor([case["generated_ids"]]), gold).tolist() == [case["correct"]]


def test_verdicts_on_a_batch() -> None:
    batch = GRADING["addition_batch"]
    rows = batch["rows"]
    generated_ids = torch.tensor([ids(row["generated_symbols"]) for row in rows])
    gold = targets([[*ids(row["gold"]), EOS] for row in rows], generated_ids.shape[1])
    verdicts = exact(generated_ids, gold)
    assert verdicts.tolist() == [row["correct"] for row in rows]
    assert verdicts.float().mean().item() == pytest.approx(batch["accuracy"])


@pytest.mark.parametrize("case", GRADING["sort"], ids=lambda case: case["case"])
def test_verdicts_on_sorting(case: dict) -> None:
    """The original generates twice the tokens and cuts them to the answer without EOS."""
    answer = case["line"].partition("=")[2]
    generated_ids = torch.tensor([ids(case["generated_symbols"], SORT_VOCABULARY)])
    gold = targets([[*ids(answer, SORT_VOCABULARY), EOS]], generated_ids.shape[1])
    assert sorted_exact(generated_ids, gold).tolist() == [case["exact"]]
    assert smallest_right(generated_ids, gold).tolist() == [case["top1"]]
