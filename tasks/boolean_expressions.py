"""Boolean expressions: `( True and False ) or True is` -> ` True`, alone or behind a prompt.

Bhaskar et al. 2024 (arXiv 2406.16778), section 5 and appendix. How its corrupted expressions were made is in no
published script; here literals and the words and/or are redrawn until the value is the other, so that brackets and
nots stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.random import RandomState
from pydantic import Field
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Split
from tasks.circuit_draws import Cases, DrawnTask
from tasks.circuit_files import Row
from tasks.circuit_text import Pair, Sentence

FEW_SHOT = (
    "(True and False) or (False and True) is False\n"
    "(True or (not True)) and False is False\n"
    "(not (True and False)) or (False and True) is True\n"
)
SYSTEM = "Evaluate the following boolean expression as either 'True' or 'False'."
INSTRUCTION = f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n"
INSTRUCTION_END = " [/INST] '"
LITERALS, OPERATORS = ("False", "True"), ("and", "or")
MOST_LITERALS, MOST_DEPTH, MOST_NOTS = 6, 3, 2
LENGTHS = {"few_shot": 72, "instruction": 64, "zero_shot": 32}  # tokens; the first two are the published ones
MOST_BATCHES = 50  # of as many tries as expressions are asked for


class Expression(NamedTuple):
    """A part of an expression while it is put together."""

    text: str
    depth: int = 0  # of operators
    nots: int = 0  # directly within each other

    @property
    def operand(self) -> str:
        return f"( {self.text} )" if self.depth else self.text


class BooleanExpressions(DrawnTask):
    """Different expressions of one to six literals in all splits. Longer texts than `length` are not drawn.

    A prediction counts by its text without spaces.
    """

    prompt: Literal["few_shot", "instruction", "zero_shot"] = Field(
        "few_shot", description="three solved lines before; a request in the chat form of Llama 2; nothing"
    )
    # half, a tenth and two fifths of the about 2,500 different ones that the published 10,000 tries give
    train_size: int = Field(1_250, gt=0, description="examples; of a file, at most so many, the first")
    validation_size: int = Field(250, gt=0)
    test_size: int = Field(1_000, gt=0)

    @property
    def default_length(self) -> int:
        return LENGTHS[self.prompt]

    def all_words(self) -> Sequence[Sentence]:
        texts = [
            "True",
            "False",
            "not False",
            "( True and False ) or ( not True )",
            "( ( False or True ) and True ) or False",
        ]
        return self.sentences(np.array([*texts, *(f"not ( {text} )" for text in texts[3:])], dtype=object))

    def draw(self, random: RandomState) -> Mapping[str, Cases]:
        """Cases: expressions as text."""
        asked = sum(self.sizes.values())
        found: dict[str, None] = {}
        for _ in range(MOST_BATCHES):
            batch = dict.fromkeys(draw_expression(random) for _ in range(asked))
            new = [text for text in batch if text not in found]
            found |= dict.fromkeys(self._fitting(new))
            if len(found) >= asked:
                break
        else:
            raise ConfigError(f"task: {asked} expressions are asked for, {len(found)} were found; ask for fewer")
        cases = np.array(list(found)[:asked], dtype=object)
        ends = np.cumsum(list(self.sizes.values()))
        return dict(zip(self.sizes, np.split(cases, ends[:-1]), strict=True))

    def corrupt(self, cases: Cases, random: RandomState) -> Cases:
        return np.array([other_value(text, random) for text in cases], dtype=object)

    def sentences(self, cases: Cases) -> list[Sentence]:
        return [self._sentence(text, evaluate(text)) for text in cases]

    def read_row(self, row: Row) -> Pair:
        """`input` (which ends in " is"), `target`, and `corr_input` with the other value."""
        target = row.text("target").strip()
        if target not in LITERALS:
            raise ConfigError(f"{row.source}: field 'target' is '{target}'; write True or False")
        clean, corrupted = (row.text(name).strip().removesuffix(" is") for name in ("input", "corr_input"))
        value = target == "True"
        return Pair(self._sentence(clean, value), self._sentence(corrupted, not value), row.source)

    def grade(self, logits: Tensor, reference: Tensor, split: Split) -> dict[str, Tensor]:
        """As for other tasks, but best tokens are compared as text without spaces."""
        metrics = super().grade(logits, reference, split)
        tokens = self._vocabulary()
        texts = {token: index for index, token in reversed(list(enumerate(_stripped(tokens))))}
        same = torch.tensor([texts[token] for token in _stripped(tokens)], device=logits.device)
        best, whole = same[logits[:, 0].argmax(-1)], same[reference[:, 0].argmax(-1)]
        right = best == same[split.targets[:, 0]]
        return metrics | {"accuracy": right.float(), "exact_match": (best == whole).float()}

    def _sentence(self, text: str, value: bool) -> Sentence:
        if self.prompt == "instruction":
            return Sentence(f"{INSTRUCTION}{text}{INSTRUCTION_END}", LITERALS[value], LITERALS[not value])
        before = FEW_SHOT if self.prompt == "few_shot" else ""
        return Sentence(f"{before}{text} is", f" {LITERALS[value]}", f" {LITERALS[not value]}")

    def _fitting(self, texts: Sequence[str]) -> list[str]:
        """Those that are no longer than a text may be."""
        if not texts:
            return []
        counts = self._token_counts(self.sentences(np.array(texts, dtype=object)))
        return [text for text, count in zip(texts, counts, strict=True) if count - 1 <= self.text_length]


def draw_expression(random: RandomState) -> str:
    """One to six literals; and/or joins two neighbours, or not stands before one, each equally likely, until one item
    is left. Drawn again where it gets deeper than three operators or has more than two nested nots."""
    while True:
        items = [Expression(LITERALS[random.randint(2)]) for _ in range(random.randint(1, MOST_LITERALS + 1))]
        while len(items) > 1 and all(item.depth <= MOST_DEPTH and item.nots <= MOST_NOTS for item in items):
            word = ("and", "or", "not")[random.randint(3)]
            if word == "not":
                place = random.randint(len(items))
                item = items[place]
                items[place] = Expression(f"not {item.operand}", item.depth + 1, item.nots + 1)
            else:
                place = random.randint(len(items) - 1)
                left, right = items[place : place + 2]
                joined = f"{left.operand} {word} {right.operand}"
                items[place : place + 2] = [Expression(joined, max(left.depth, right.depth) + 1)]
        if len(items) == 1 and items[0].depth <= MOST_DEPTH and items[0].nots <= MOST_NOTS:
            return items[0].text


def evaluate(text: str) -> bool:
    """Value of an expression in which brackets and words are separated by spaces; `and` binds before `or`."""
    words = text.split()[::-1]

    def operand() -> bool:
        word = words.pop()
        if word == "not":
            return not operand()
        if word == "(":
            value = alternatives()
            words.pop()  # the closing bracket
            return value
        return word == "True"

    def conjunction() -> bool:
        value = operand()
        while words and words[-1] == "and":
            words.pop()
            value = operand() and value  # the operand first: it must be read in any case
        return value

    def alternatives() -> bool:
        value = conjunction()
        while words and words[-1] == "or":
            words.pop()
            value = conjunction() or value
        return value

    return alternatives()


def other_value(text: str, random: RandomState) -> str:
    """The expression with fresh literals, and/or words, such that its value is the other.

    There always is one: every literal is drawn on its own and occurs once.
    """
    value, words = evaluate(text), text.split()
    while True:
        drawn = [
            LITERALS[random.randint(2)]
            if word in LITERALS
            else OPERATORS[random.randint(2)]
            if word in OPERATORS
            else word
            for word in words
        ]
        if evaluate(" ".join(drawn)) != value:
            return " ".join(drawn)


def _stripped(tokens: Sequence[str]) -> list[str]:
    """Without spaces, and without the marks that stand for a space in GPT-2's and in SentencePiece's vocabularies."""
    return [token.strip(" \u0120\u2581") for token in tokens]
