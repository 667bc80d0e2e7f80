"""The three vocabularies of characters, with the ids of the original (arXiv 2405.17399, code of mcleish7/arithmetic).

Every vocabulary begins with PAD 0, UNK 1, BOS 2, EOS 3 and the digits 4 to 13; `=` is 17 and the space 18 in all.
A space in a text becomes PAD, so id 18 never occurs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

PAD, UNK, BOS, EOS, FIRST_DIGIT, EQUALS, FIRST_SYMBOL = 0, 1, 2, 3, 4, 17, 19
SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]")
DIGITS = "0123456789"
# The cyclic alphabet of index hints and of sorting; `x` is the multiplication sign.
SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwyz!@£#$%^&*()~?.,<>{}[]:;/|βΓΔδεζηθκΛλμΞξΠπΣςτΦφχΨψΩω"
VocabularyName = Literal["pad", "index", "sort"]
Ids = NDArray[np.uint8]


@dataclass(frozen=True)
class Characters:
    """A vocabulary of single characters."""

    name: VocabularyName
    characters: str  # of the ids from FIRST_DIGIT on

    @property
    def tokens(self) -> tuple[str, ...]:
        """The string of each id."""
        return (*SPECIAL, *self.characters)

    def __len__(self) -> int:
        return len(SPECIAL) + len(self.characters)

    def id_of(self, character: str) -> int:
        return FIRST_DIGIT + self.characters.index(character)

    @cached_property
    def table(self) -> Ids:
        """The id of each code point [largest + 2]; UNK where there is none, PAD for the space."""
        codes = [ord(character) for character in self.characters]
        table = np.full(max(codes) + 2, UNK, dtype=np.uint8)
        table[codes] = np.arange(FIRST_DIGIT, len(self))
        table[ord(" ")] = PAD
        return table

    def ids(self, codes: NDArray[np.uint32]) -> Ids:
        """Code points to ids, of the same shape."""
        return self.table[np.minimum(codes, len(self.table) - 1)]

    def encode(self, text: str) -> list[int]:
        """As the original's tokenizer: a character that is not in the vocabulary becomes UNK."""
        return self.ids(np.frombuffer(text.encode("utf-32-le"), dtype="<u4")).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """As the original: PAD, BOS and EOS vanish, an id beyond the vocabulary is UNK."""
        tokens = self.tokens
        texts = (tokens[index] if 0 <= index < len(tokens) else SPECIAL[UNK] for index in ids)
        return "".join(text for text in texts if text not in (SPECIAL[PAD], SPECIAL[BOS], SPECIAL[EOS]))


_OPERATORS = "+-x= "
VOCABULARIES: dict[VocabularyName, Characters] = {
    "pad": Characters("pad", DIGITS + _OPERATORS),
    "index": Characters("index", DIGITS + _OPERATORS + SYMBOLS),
    "sort": Characters("sort", DIGITS + "D,:= " + "".join(symbol for symbol in SYMBOLS if symbol not in "D,:")),
}


def having(characters: str) -> list[VocabularyName]:
    """The vocabularies that have all of these characters."""
    return [name for name, known in VOCABULARIES.items() if set(characters) <= set(known.characters)]
