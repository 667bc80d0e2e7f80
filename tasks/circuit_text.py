"""Tasks that circuits are found on: a clean text with an answer at its end, and a corrupted text of as many tokens.

Shapes: N examples, T tokens of one text, A answer columns, V vocabulary. Texts are right-padded with token 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import IGNORE, Answer, Dataset, Split, Task
from tasks import circuit_grading
from tasks.examples import make_dataset
from tasks.tokenizer_files import UNKNOWN, load_tokenizer, load_vocabulary, tokenizer_key, tokens_by_id, word_tokenizer
from tasks.vocabulary import IntArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ORIGINAL_LENGTH = 64  # tokens to which the published runs pad GPT-2's texts


class Sentence(NamedTuple):
    """A text in parts: prompt and answer end to end. `distractor` is what could wrongly stand for the answer."""

    prompt: str
    answer: str
    distractor: str = ""

    @property
    def text(self) -> str:
        return self.prompt + self.answer


class Pair(NamedTuple):
    clean: Sentence
    corrupted: Sentence
    source: str = "task"  # file and line, for messages


class CircuitTask(Task, ABC):
    """Pairs of clean and corrupted texts.

    `Split.tokens` [N, 2T]: the clean text's tokens without its last, then the corrupted text's. `positions` [N, A] are
    places in the clean half. Answer columns are the answer's tokens, IGNORE where a row has fewer; behind them stands,
    for tasks that have one, the distractor's first token, at the answer's first position. Without `pairs` tokens are
    [N, T], the clean text alone, and there is no distractor, so that ordinary models are trained on the answers.
    """

    has_distractor: ClassVar[bool] = True

    tokenizer: str | None = Field(
        None, description="tokenizer.json, or a local folder that has one; default: one token a word of this task"
    )
    pairs: bool = Field(True, description="with corrupted texts; False trains ordinary models on the same texts")
    length: int | None = Field(
        None, gt=1, description="T, tokens of a text; default: the task's longest text, with a tokenizer of yours 64"
    )

    @model_validator(mode="after")
    def _check_tokenizer(self) -> CircuitTask:
        if self.tokenizer is not None:
            tokenizer_key(self.tokenizer)
        return self

    @abstractmethod
    def coverage(self) -> Sequence[Sentence]:
        """Sentences that have every word and every answer there is, and the longest text among them."""

    @abstractmethod
    def sentence_pairs(self) -> Mapping[str, Sequence[Pair]]:
        """Split -> pairs; "train" and at least one other."""

    # ---- sizes ----

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary())

    @property
    def text_length(self) -> int:
        """T."""
        return self.length or self.default_length

    @property
    def default_length(self) -> int:
        return self._measured()[0] if self.tokenizer is None else ORIGINAL_LENGTH

    @property
    def max_length(self) -> int:
        return 2 * self.text_length if self.pairs else self.text_length

    @property
    def num_answer_tokens(self) -> int:
        """Of the longest answer."""
        return self._measured()[1]

    @property
    def num_answers(self) -> int:
        return self.num_answer_tokens + (self.pairs and self.has_distractor)

    def answer(self) -> Answer:
        return Answer(slice(0, self.num_answer_tokens))

    def _measured(self) -> tuple[int, int]:
        """Tokens of the longest text without its last, tokens of the longest answer."""
        return _measure(self._tokenizer(), tuple(self.coverage()))

    # ---- building ----

    def build(self) -> Dataset:
        """Raises ConfigError for texts that have no use: of different lengths, too long, with unknown words."""
        splits = {name: self._split(list(pairs)) for name, pairs in self.sentence_pairs().items()}
        train = splits.pop("train")
        return make_dataset(self, self._vocabulary(), {"text": train}, splits, self.answer())

    def _split(self, pairs: Sequence[Pair]) -> Split:
        """Pairs of N rows -> tokens [N, 2T] or [N, T], positions and targets [N, A]."""
        width, most = self.text_length, self.num_answer_tokens
        clean, prompts = self._encode([pair.clean for pair in pairs], pairs)
        lengths = np.array([len(ids) for ids in clean])
        if lengths.max() - 1 > width:
            row = int(lengths.argmax())
            raise ConfigError(
                f"{pairs[row].source}: a text of {lengths[row]} tokens; set task.length={lengths[row] - 1} or more"
            )
        tokens = _padded([ids[:-1] for ids in clean], width)
        targets = _padded([ids[prompt:] for ids, prompt in zip(clean, prompts, strict=True)], most, IGNORE)
        # columns without a target repeat the last position, so that they never make a row longer
        positions = np.minimum(prompts[:, None] - 1 + np.arange(most), lengths[:, None] - 2)
        if self.pairs:
            tokens = np.concatenate([tokens, self._corrupted(pairs, lengths)], 1)
        if self.pairs and self.has_distractor:
            others = [Sentence(pair.clean.prompt, pair.clean.distractor) for pair in pairs]
            firsts = [ids[prompt] for ids, prompt in zip(*self._encode(others, pairs), strict=True)]
            targets = np.column_stack([targets, firsts])
            positions = np.column_stack([positions, prompts - 1])
        return Split(*(torch.from_numpy(array) for array in (tokens, positions, targets)))

    def _corrupted(self, pairs: Sequence[Pair], lengths: IntArray) -> IntArray:
        """Tokens of the corrupted texts [N, T], which must have as many as the clean ones [N]."""
        texts, _ = self._encode([pair.corrupted for pair in pairs], pairs)
        for pair, length, ids in zip(pairs, lengths, texts, strict=True):
            if len(ids) != length:
                raise ConfigError(
                    f"{pair.source}: the clean text has {length} tokens, the corrupted one {len(ids)}; write texts of "
                    "as many tokens"
                )
        return _padded([ids[:-1] for ids in texts], self.text_length)

    def _encode(self, sentences: Sequence[Sentence], pairs: Sequence[Pair]) -> tuple[list[list[int]], IntArray]:
        return encode(self._tokenizer(), sentences, [pair.source for pair in pairs])

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            return word_tokenizer(tuple(sentence.text for sentence in self.coverage()))
        return load_tokenizer(*tokenizer_key(self.tokenizer))

    def _vocabulary(self) -> tuple[str, ...]:
        if self.tokenizer is None:
            return tokens_by_id(self._tokenizer())
        return load_vocabulary(*tokenizer_key(self.tokenizer))

    # ---- grading ----

    def grade(self, logits: Tensor, reference: Tensor, split: Split) -> dict[str, Tensor]:
        """Logits of a circuit and of the whole model [N, A, V] for rows of a split -> metrics of each row [N].

        `accuracy`: the best token is the answer's first. `exact_match`: the best tokens are those of the whole model.
        `kl`: KL(whole || circuit) in nats, the mean over the answer's tokens. `logit_difference`: answer minus
        distractor, both by their first token.
        """
        columns = self.answer().columns
        targets, found, whole = split.targets[:, columns], logits[:, columns], reference[:, columns]
        metrics = {
            "accuracy": (found[:, 0].argmax(-1) == targets[:, 0]).float(),
            "exact_match": circuit_grading.exact_match(found, whole, targets),
            "kl": circuit_grading.answer_mean(circuit_grading.kl(found, whole), targets),
        }
        if self.has_distractor and self.pairs:
            distractors = split.targets[:, columns.stop]
            metrics["logit_difference"] = circuit_grading.difference(found[:, 0], targets[:, 0], distractors)
        return metrics


def encode(
    tokenizer: Tokenizer, sentences: Sequence[Sentence], sources: Sequence[str] | None = None
) -> tuple[list[list[int]], IntArray]:
    """Token ids of each whole text, and how many of them are the prompt's [N]; with the tokenizer's special tokens.

    Raises ConfigError where the answer's tokens do not follow the prompt's, and for a word without a token.
    """
    wholes = [found.ids for found in tokenizer.encode_batch_fast([sentence.text for sentence in sentences])]
    prompts = [found.ids for found in tokenizer.encode_batch_fast([sentence.prompt for sentence in sentences])]
    unknown = tokenizer.token_to_id(UNKNOWN)
    for row, (whole, prompt) in enumerate(zip(wholes, prompts, strict=True)):
        source, text = sources[row] if sources else "task", sentences[row].text
        if unknown is not None and unknown in whole:
            start, stop = tokenizer.encode(text).offsets[whole.index(unknown)]
            raise ConfigError(f"{source}: '{text[start:stop]}' has no token; set task.tokenizer to one that has")
        if not 0 < len(prompt) < len(whole) or whole[: len(prompt)] != prompt:
            raise ConfigError(
                f"{source}: the tokens of '{text}' do not begin with those of its prompt '{sentences[row].prompt}'; "
                "an answer must begin with a token of its own"
            )
    return wholes, np.array([len(prompt) for prompt in prompts])


@lru_cache(maxsize=16)
def _measure(tokenizer: Tokenizer, sentences: tuple[Sentence, ...]) -> tuple[int, int]:
    wholes, prompts = encode(tokenizer, sentences)
    lengths = np.array([len(ids) for ids in wholes])
    return int(lengths.max()) - 1, int((lengths - prompts).max())


def _padded(rows: Sequence[Sequence[int]], width: int, fill: int = 0) -> IntArray:
    """N rows -> [N, width], filled up on the right."""
    lengths = np.array([len(row) for row in rows])
    found = np.full((len(rows), width), fill, dtype=np.int64)
    found[np.arange(width) < lengths[:, None]] = np.fromiter(chain.from_iterable(rows), np.int64, lengths.sum())
    return found
