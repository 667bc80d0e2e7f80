"""Closed vocabularies of `<...>` token strings: text without separators to ids and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

TOKEN = re.compile(r"<[^<>]+>")
SPECIAL_TOKENS = ("<mask>", "<sep>", "<a>", "</a>", "<q>", "</q>")  # in this order after the data tokens
ANSWER, STOP, PAD = "<a>", "</a>", "<pad>"


def numbered(prefix: str, count: int) -> list[str]:
    """numbered("e_", 2) -> ["<e_0>", "<e_1>"]."""
    return [f"<{prefix}{index}>" for index in range(count)]


class Vocabulary:
    """Token strings whose ids are their places. Raises ValueError for repeated or malformed tokens."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = tuple(tokens)
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            repeated = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise ValueError(f"token '{repeated}' occurs twice in the vocabulary; keep one")
        for token in self.tokens:
            if not TOKEN.fullmatch(token):
                raise ValueError(f"'{token}' is not a token; write it as <name>, without '<' or '>' inside")

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: str) -> bool:
        return token in self.ids

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for text between tokens and for a token that is not in the vocabulary."""
        pieces = TOKEN.findall(text)
        if "".join(pieces) != text:
            raise ValueError(f"'{text}' is not a row of <...> tokens without separators")
        unknown = next((piece for piece in pieces if piece not in self.ids), None)
        if unknown is not None:
            raise ValueError(f"token '{unknown}' in '{text}' is not in the vocabulary; add it there")
        return [self.ids[piece] for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.tokens[index] for index in ids)

    def encode_batch(self, texts: Sequence[str]) -> tuple[IntArray, IntArray]:
        """-> ids of all texts end to end, number of tokens of each text [N]. Raises ValueError as `encode` does."""
        joined = "".join(texts)
        pieces = TOKEN.findall(joined)
        lengths = np.fromiter((text.count(">") for text in texts), np.int64, len(texts))
        if "".join(pieces) != joined or not all(text.endswith(">") and text[0] == "<" for text in texts):
            for text in texts:  # some text is wrong: let it be named
                self.encode(text)
            raise ValueError("an empty text; write at least one token")
        try:
            return np.fromiter(map(self.ids.__getitem__, pieces), np.int64, len(pieces)), lengths
        except KeyError as error:
            raise ValueError(f"token '{error.args[0]}' is not in the vocabulary; add it there") from None
