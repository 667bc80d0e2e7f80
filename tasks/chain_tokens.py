"""Texts of chains of thought as tokens: ` question E chain E #### answer E`, E the end-of-text token.

N examples, W tokens of the longest text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from groundswell.config import ConfigError
from tasks.chain_text import Example
from tasks.tokenizer_files import END_OF_TEXT, TOKENIZER_CONFIG, UNKNOWN, eos_token, load_tokenizer, tokenizer_key
from tasks.vocabulary import IntArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|endoftext|>"  # E of closed vocabularies, always token 0
ENDS = 3  # separators of a text: behind question, chain and answer
# Pieces of a text in closed vocabularies, each with the space before it. ` ####` is two of them, as GPT-2 cuts it.
PIECE = r" #(?=###)|###| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
BATCH = 10_000  # texts tokenised together


class ChainRows(NamedTuple):
    """Whole texts as token ids. The last column holds E in every row."""

    tokens: IntArray  # [N, W], right-padded with E
    first: IntArray  # [N] place of the E behind the question
    second: IntArray  # [N] place of the E behind the chain
    length: IntArray  # [N] tokens with the last E


def encode_examples(tokenizer: Tokenizer, examples: Sequence[Example], end: int, end_text: str) -> ChainRows:
    """Raises ConfigError for an example with other than three E or tokens behind the last, and for an unknown word."""
    parts: list[IntArray] = []
    counts: list[int] = []
    for start in range(0, len(examples), BATCH):
        texts = [example.text(end_text) for example in examples[start : start + BATCH]]
        ids = [found.ids for found in tokenizer.encode_batch_fast(texts)]
        counts.extend(map(len, ids))
        parts.append(np.fromiter(chain.from_iterable(ids), np.int32))
    length = np.array(counts)
    tokens = np.full((len(examples), length.max()), end, np.int32)
    inside = np.arange(tokens.shape[1]) < length[:, None]
    tokens[inside] = np.concatenate(parts)
    _check_known(tokenizer, tokens, examples, end_text)
    ends = inside & (tokens == end)
    wrong = (ends.sum(1) != ENDS) | (tokens[np.arange(len(tokens)), length - 1] != end)
    if wrong.any():
        raise ConfigError(
            f"{examples[int(wrong.argmax())].source}: its tokens are not three parts with '{end_text}' behind each; "
            f"take '{end_text}' out of the text, or set task.tokenizer to one that adds no such token itself"
        )
    places = np.nonzero(ends)[1].reshape(-1, ENDS)
    return ChainRows(tokens, places[:, 0], places[:, 1], length)


def _check_known(tokenizer: Tokenizer, tokens: IntArray, examples: Sequence[Example], end_text: str) -> None:
    unknown = tokenizer.token_to_id(UNKNOWN)
    if unknown is None or not (wrong := (tokens == unknown).any(1)).any():
        return
    example = examples[int(wrong.argmax())]
    text = example.text(end_text)
    encoding = tokenizer.encode(text)
    start, stop = encoding.offsets[encoding.ids.index(unknown)]
    raise ConfigError(f"{example.source}: '{text[start:stop]}' has no token; set task.tokenizer to one that has")


# ---- a closed vocabulary ----


@lru_cache(maxsize=8)
def closed_tokenizer(words: tuple[str, ...]) -> Tokenizer:
    """One token a word, of which the first is E. Text with another word raises the library's own error."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([END])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def closed_words(texts: Iterable[str]) -> tuple[str, ...]:
    """E, then all pieces of texts without E, in the order of their characters."""
    from tokenizers import Tokenizer, models, trainers

    counter = Tokenizer(models.WordLevel({}, unk_token=UNKNOWN))
    counter.pre_tokenizer = closed_tokenizer((END,)).pre_tokenizer
    counter.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=2**31, show_progress=False))
    return (END, *sorted(counter.get_vocab()))


# ---- tokenizers of others ----


def end_of_text(tokenizer_name: str) -> tuple[int, str]:
    """Id and text of the token that ends a text, as the tokenizer's folder says.

    Raises ValueError where there is none.
    """
    path, changed = tokenizer_key(tokenizer_name)
    tokenizer = load_tokenizer(path, changed)
    for file in (path.with_name(TOKENIZER_CONFIG), path.with_name(SPECIAL_TOKENS_MAP)):
        if named := eos_token(file):
            if (found := tokenizer.token_to_id(named)) is None:
                raise ValueError(f"tokenizer {file}: eos_token '{named}' is no token of {path.name}; mend one of them")
            return found, named
    for token in END_OF_TEXT:
        if (found := tokenizer.token_to_id(token)) is not None:
            return found, token
    raise ValueError(
        f"tokenizer {path}: names no end-of-text token; write its eos_token into {path.with_name(TOKENIZER_CONFIG)}"
    )


@lru_cache(maxsize=8)
def single_tokens(tokenizer: Tokenizer, words: tuple[str, ...], end: int) -> IntArray | None:
    """Id of each word of a closed vocabulary [words], E first; None where the tokenizer has not one token for each."""
    ids = [found.ids for found in tokenizer.encode_batch_fast(words[1:], add_special_tokens=False)]
    if any(len(found) != 1 for found in ids):
        return None
    return np.array([end, *(found[0] for found in ids)], np.int32)
