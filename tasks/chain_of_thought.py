"""Questions that are answered with a chain of thought, without one, or with one that only a teacher sees.

Deng et al. 2023, arXiv 2311.01460. With E the end-of-text token, an example is read as ` Q E chain E #### answer E`.
Shapes: N examples, T tokens of a row, W tokens of a whole text, A answer columns, C chain columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import IGNORE, Answer, Dataset, Split, Task
from tasks.chain_text import MARKER, Example, extract_answer
from tasks.chain_tokens import END, ChainRows, closed_tokenizer, encode_examples, end_of_text
from tasks.examples import make_dataset
from tasks.tokenizer_files import load_tokenizer, load_vocabulary, tokenizer_key
from tasks.vocabulary import IntArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Form = Literal["explicit", "hidden", "none"]
PIECE = 4_096  # rows that are laid out together


class Widths(NamedTuple):
    """Most tokens that any row of a data set has."""

    text: int  # of a whole text
    short: int  # of a text without its chain
    answer: int  # from behind the second E to the last one
    chain: int  # from behind the first E to the second one

    @classmethod
    def of(cls, splits: Iterable[ChainRows]) -> Widths:
        return cls(*map(max, zip(*map(_widths, splits), strict=True)))


class ChainOfThought(Task, ABC):
    """`Split.tokens` [N, T] are the text's tokens without its last E, right-padded with E.

    form explicit: A answer columns (from the second E on: the answer and the last E), then C chain columns (from the
    first E on: the chain and the second E). hidden: the same tokens, the answer columns alone. none: the tokens without
    the chain and the second E, the answer columns alone. In every form `positions[:, 0]` is the E that the answer
    follows; columns without a target repeat the last place that has one.
    """

    form: Form = Field(
        "explicit",
        description="explicit: the chain is learned as well; hidden: it is read, only the answer is learned; none: "
        "question and answer alone",
    )
    tokenizer: str | None = Field(
        None, description="tokenizer.json, or a local folder that has one; default: a closed vocabulary of this task"
    )
    context: int = Field(
        1_024, gt=1, description="most tokens of a text; a longer one is an error (the published code cuts it)"
    )

    @model_validator(mode="after")
    def _check_tokenizer(self) -> ChainOfThought:
        if self.tokenizer is not None:
            self._end()
        return self

    @abstractmethod
    def words(self) -> tuple[str, ...]:
        """The closed vocabulary: E, then the pieces of all texts, each with the space before it."""

    @abstractmethod
    def examples(self) -> Mapping[str, Sequence[Example]]:
        """Split -> examples; "train", "validation" and what else there is."""

    def texts(self, split: str) -> Sequence[Example]:
        """Examples of a split, in the order of its rows. Raises ConfigError for a split that there is not."""
        examples = self.examples()
        if split not in examples:
            raise ConfigError(f"split: '{split}' is none of this task's; take {', '.join(examples)}")
        return examples[split]

    # ---- sizes ----

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary())

    @property
    def max_length(self) -> int:
        widths = self.widths()
        return (widths.short if self.form == "none" else widths.text) - 1

    @property
    def num_answers(self) -> int:
        widths = self.widths()
        return widths.answer + (widths.chain if self.form == "explicit" else 0)

    def answer(self) -> Answer:
        return Answer(slice(0, self.widths().answer))

    def widths(self) -> Widths:
        return Widths.of(self.rows().values())

    # ---- building ----

    def build(self) -> Dataset:
        """Raises ConfigError for an example that is too long or cannot be tokenised, with its file and line."""
        splits, widths = {}, self.widths()
        for name, rows in self.rows().items():
            self._check_length(name, rows)
            splits[name] = form_split(rows, self.form, widths)
        train = splits.pop("train")
        return make_dataset(self, self._vocabulary(), {"chains": train}, splits, self.answer())

    def rows(self) -> Mapping[str, ChainRows]:
        """Split -> whole texts, whatever the form."""
        return _encoded(self.model_copy(update={"form": "explicit"}), self.changed())

    def changed(self) -> tuple[int, ...]:
        """Times of the last change of all files that the rows come from."""
        return () if self.tokenizer is None else (tokenizer_key(self.tokenizer)[1],)

    def _check_length(self, name: str, rows: ChainRows) -> None:
        lengths = rows.length - (rows.second - rows.first if self.form == "none" else 0)
        if lengths.max() > self.context:
            row = int((lengths > self.context).argmax())
            raise ConfigError(
                f"{self.texts(name)[row].source}: has {lengths[row]} tokens, at most {self.context} are read; shorten "
                f"it, or set task.context={lengths.max()} or more"
            )

    # ---- tokens ----

    @property
    def separator(self) -> int:
        """Token E."""
        return self._end()[0]

    def answer_of(self, ids: Sequence[int]) -> str:
        """Tokens of a text, or of its end, -> its answer as in `Example.answer`: from `####` on, without commas, up to
        the next E. Text without `####` is returned as it is, without E."""
        end = self.separator
        parts = [list(part) for is_end, part in groupby(ids, lambda token: token == end) if not is_end]
        texts = [self._decode(part) for part in parts]
        return extract_answer(next((text for text in texts if MARKER in text), "".join(texts)))

    def _decode(self, ids: Sequence[int]) -> str:
        if self.tokenizer is not None:
            return self._tokenizer().decode(ids, skip_special_tokens=True)
        words = self.words()
        return "".join(words[token] for token in ids)

    def _end(self) -> tuple[int, str]:
        """E as id and as text. Raises ValueError for a tokenizer without an end-of-text token."""
        return (0, END) if self.tokenizer is None else end_of_text(self.tokenizer)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            return closed_tokenizer(self.words())
        return load_tokenizer(*tokenizer_key(self.tokenizer))

    def _vocabulary(self) -> tuple[str, ...]:
        if self.tokenizer is None:
            return self.words()
        return load_vocabulary(*tokenizer_key(self.tokenizer))


# ---- whole texts to splits ----


def form_split(rows: ChainRows, form: Form, widths: Widths) -> Split:
    """Rows of N -> tokens [N, T], positions and targets [N, A + C], or [N, A] where the form is not explicit."""
    count = len(rows.tokens)
    tokens = np.empty((count, (widths.short if form == "none" else widths.text) - 1), np.int64)
    shape = count, widths.answer + (widths.chain if form == "explicit" else 0)
    positions, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
    for start in range(0, count, PIECE):  # what is needed in between stays small
        piece = slice(start, start + PIECE)
        some = _one_shape(ChainRows(*(each[piece] for each in rows)))
        _fill_columns(some, some.second, some.length - 1, positions[piece, : widths.answer], targets[piece])
        if form == "explicit":
            _fill_columns(
                some, some.first, some.second, positions[piece, widths.answer :], targets[piece, widths.answer :]
            )
        if form == "none":
            positions[piece] -= (some.second - some.first)[:, None]
            tokens[piece] = without_chain(some, tokens.shape[1])
        else:
            tokens[piece] = _gathered(some.tokens, np.arange(tokens.shape[1])[None])
    return Split(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(targets))


def _fill_columns(rows: ChainRows, start: IntArray, stop: IntArray, positions: IntArray, targets: IntArray) -> None:
    """Write places from `start` to before `stop` ([N] or [1]), and the tokens that follow them, IGNORE beyond."""
    count = positions.shape[1]
    places = start[:, None] + np.arange(count)
    inside = places < stop[:, None]
    positions[:] = places = np.where(inside, places, stop[:, None] - 1)
    targets[:, :count] = np.where(inside, _gathered(rows.tokens, places + 1), IGNORE)


def without_chain(rows: ChainRows, width: int) -> IntArray:
    """Tokens without those behind the first E up to the second one [N, width]."""
    places = np.arange(width)
    gaps = (rows.second - rows.first)[:, None]
    return _gathered(rows.tokens, places + gaps * (places > rows.first[:, None]))


def _gathered(tokens: IntArray, places: IntArray) -> IntArray:
    """tokens [N, W] at places [N, P] or, for all rows the same, [1, P]; E where the row has ended."""
    places = np.minimum(places, tokens.shape[1] - 1)
    return tokens.take(places[0], 1) if len(places) == 1 else np.take_along_axis(tokens, places, 1)


def _one_shape(rows: ChainRows) -> ChainRows:
    """Places and lengths [1] where they are those of all rows, which makes everything faster."""
    shapes = np.stack(rows[1:])
    return ChainRows(rows.tokens, *shapes[:, :1]) if (shapes == shapes[:, :1]).all() else rows


def _widths(rows: ChainRows) -> Widths:
    chains = rows.second - rows.first
    found = rows.length, rows.length - chains, rows.length - 1 - rows.second, chains
    return Widths(*(int(each.max()) for each in found))


def nth_separator(tokens: Tensor, separator: int | Tensor, number: int) -> Tensor:
    """tokens [..., T] -> place [...] of the separator that `number` others precede; T where there are fewer.

    `separator` is an id, or ids [..., 1].
    """
    return ((tokens == separator).cumsum(-1) <= number).sum(-1)


def first_separator(tokens: Tensor, separator: int | Tensor) -> Tensor:
    """tokens [..., T] -> place of the E behind the question [...]."""
    return nth_separator(tokens, separator, 0)


def second_separator(tokens: Tensor, separator: int | Tensor) -> Tensor:
    """tokens [..., T] of the forms explicit and hidden -> place of the E behind the chain [...]."""
    return nth_separator(tokens, separator, 1)


@lru_cache(maxsize=2)
def _encoded(task: ChainOfThought, changed: tuple[int, ...]) -> Mapping[str, ChainRows]:
    tokenizer, (end, text) = task._tokenizer(), task._end()
    return {name: encode_examples(tokenizer, examples, end, text) for name, examples in task.examples().items()}
