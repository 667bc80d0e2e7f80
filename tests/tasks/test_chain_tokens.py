"""Texts of chains of thought as tokens and masks, against what the published code makes of the same lines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from groundswell.protocols import IGNORE, Split
from tasks.chain_files import ChainFiles
from tasks.chain_of_thought import first_separator, nth_separator, second_separator
from tasks.chain_text import extract_answer, extract_chain, read_line
from tasks.multiplication_chain import MultiplicationChain

GOLDEN = Path(__file__).parents[1] / "golden" / "implicit_cot"
TOKENIZER = str(GOLDEN / "tokenizer")
RECORDED = json.loads((GOLDEN / "tokenised_batches.json").read_text())
BATCHES = {name: RECORDED["batches"][name] for name in ("mult4", "mult5", "gsm8k", "mixed_lengths")}


@pytest.fixture(params=BATCHES)
def batch(request: pytest.FixtureRequest) -> dict:
    return BATCHES[request.param]


def task_of(lines: list[str], folder: Path, **fields) -> ChainFiles:
    for name in ("train", "valid"):
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return ChainFiles(path=str(folder), **fields)


def labels_of(split: Split) -> torch.Tensor:
    """Positions and targets as the published code writes them: the token itself where it is learned."""
    labels = torch.full((len(split), split.tokens.shape[1] + 1), IGNORE)
    for row, column in (split.targets != IGNORE).nonzero().tolist():
        labels[row, split.positions[row, column] + 1] = split.targets[row, column]
    return labels


def test_parts_of_lines(batch: dict) -> None:
    examples = [read_line(line) for line in batch["lines"]]
    assert [example.answer for example in examples] == batch["extract_answer"]
    assert [example.chain for example in examples] == batch["extract_cot"]
    assert [extract_answer(line) for line in batch["lines"]] == batch["extract_answer"]
    behind = [line.split("||")[1] for line in batch["lines"]]
    assert [extract_chain(text) for text in behind] == batch["extract_cot"]


@pytest.mark.parametrize(("form", "tokens", "labels"), [("explicit", "all", "all"), ("none", "nocot", "nocot")])
def test_tokens_and_masks(batch: dict, form: str, tokens: str, labels: str, tmp_path) -> None:
    task = task_of(batch["lines"], tmp_path, tokenizer=TOKENIZER, form=form)
    split = task.build().evaluation["validation"]
    expected = torch.tensor(batch["collated"][f"input_ids_{tokens}"])
    assert torch.equal(split.tokens, expected[:, :-1]) and (expected[:, -1] == task.separator).all()
    if f"labels_{labels}" in batch["collated"]:
        assert torch.equal(labels_of(split), torch.tensor(batch["collated"][f"labels_{labels}"]))
    rows = zip(labels_of(split).tolist(), batch["per_example"][f"labels_{labels}"], strict=True)
    assert all(ours == theirs + [IGNORE] * (len(ours) - len(theirs)) for ours, theirs in rows)


def test_hidden_chains_are_read_and_not_learned(batch: dict, tmp_path) -> None:
    task = task_of(batch["lines"], tmp_path, tokenizer=TOKENIZER)
    explicit = task.build()
    hidden = task.with_overrides({"form": "hidden"}).build()
    assert torch.equal(hidden.train.tokens, explicit.train.tokens)
    columns = explicit.answer.columns
    assert hidden.answer.columns == columns == slice(0, hidden.train.targets.shape[1])
    assert torch.equal(hidden.train.targets, explicit.train.targets[:, columns])
    assert torch.equal(hidden.train.positions, explicit.train.positions[:, columns])
    answers = [[token for token in row if token != IGNORE] for row in hidden.train.targets.tolist()]
    behind = [
        row[place + 1 :] for row, place in zip(batch["per_example"]["examples_all"], batch["second_sep"], strict=True)
    ]
    assert answers == behind


def test_separators(batch: dict, tmp_path) -> None:
    task = task_of(batch["lines"], tmp_path, tokenizer=TOKENIZER, form="hidden")
    split = task.build().train
    assert task.separator == RECORDED["eos_id"]
    whole = torch.tensor(batch["collated"]["input_ids_all"])
    assert first_separator(whole, task.separator).tolist() == batch["first_sep"]
    assert second_separator(whole, task.separator).tolist() == batch["second_sep"] == split.positions[:, 0].tolist()
    assert nth_separator(whole, task.separator, 2).tolist() == batch["third_sep"]
    found = split.tokens.gather(-1, split.positions[:, :1])  # a model has no other way to know it
    assert first_separator(split.tokens, found).tolist() == batch["first_sep"]
    assert nth_separator(torch.zeros(2, 5), task.separator, 0).tolist() == [5, 5]


def test_answers_of_tokens(batch: dict, tmp_path) -> None:
    """Also with tokens of anything behind the last separator."""
    for fields in ({"tokenizer": TOKENIZER}, {}):
        for form in ("explicit", "none"):
            task = task_of(batch["lines"], tmp_path, form=form, **fields)
            for row, answer in zip(task.build().train.tokens.tolist(), batch["extract_answer"], strict=True):
                assert task.answer_of(row) == answer
                assert task.answer_of([*row, task.separator, *row[:5]]) == answer


@pytest.mark.parametrize("name", ["mult4", "mult5"])
class TestMultiplication:
    """The task that writes tokens without text has those of the text."""

    def rows(self, name: str, folder: Path, **fields) -> tuple[MultiplicationChain, np.ndarray]:
        (folder / "valid.txt").write_text("".join(f"{line}\n" for line in BATCHES[name]["lines"]))
        task = MultiplicationChain(digits=int(name[-1]), files=str(folder), train_size=3, test_size=3, **fields)
        return task, task.rows()["validation"]

    def test_with_a_tokenizer(self, name: str, tmp_path) -> None:
        task, rows = self.rows(name, tmp_path, tokenizer=TOKENIZER)
        assert rows.tokens.tolist() == BATCHES[name]["per_example"]["examples_all"]
        assert rows.first.tolist() == BATCHES[name]["first_sep"] and rows.second.tolist() == BATCHES[name]["second_sep"]
        assert (rows.length - 1).tolist() == BATCHES[name]["third_sep"]
        assert task.vocab_size == len(RECORDED["vocab"])

    def test_with_the_closed_vocabulary(self, name: str, tmp_path) -> None:
        """18 tokens, which are the published ones by another number."""
        task, rows = self.rows(name, tmp_path)
        assert set(task.words()) == set(RECORDED["gpt2_ids"])
        theirs = np.array([RECORDED["vocab"][word] for word in task.words()])
        assert theirs[rows.tokens].tolist() == BATCHES[name]["per_example"]["examples_all"]

    def test_tokens_of_gpt2(self, name: str, tmp_path) -> None:
        """What the published logs show of GPT-2's own tokenizer."""
        task, _ = self.rows(name, tmp_path, form="none")
        gpt2 = torch.tensor([RECORDED["gpt2_ids"][word] for word in task.words()])
        _, labels, tokens, *_ = RECORDED["batches"]["gpt2_log_check"][name]
        split = task.build().evaluation["validation"]
        ours = gpt2[split.tokens].tolist()
        row = ours.index(tokens[:-1])
        learned = labels_of(split)[row]
        assert torch.where(learned == IGNORE, IGNORE, gpt2[learned.clamp(min=0)]).tolist() == labels
