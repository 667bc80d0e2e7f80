import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.vocabulary import SPECIAL_TOKENS, Vocabulary, numbered

VOCABULARY = Vocabulary([*numbered("e_", 12), *numbered("", 3), *SPECIAL_TOKENS])
IDS = st.lists(st.integers(0, len(VOCABULARY) - 1))


@given(IDS)
def test_decode_then_encode(ids: list[int]) -> None:
    assert VOCABULARY.encode(VOCABULARY.decode(ids)) == ids


@given(st.lists(IDS.filter(bool)))
def test_a_batch_is_its_rows_end_to_end(rows: list[list[int]]) -> None:
    ids, lengths = VOCABULARY.encode_batch([VOCABULARY.decode(row) for row in rows])
    assert ids.tolist() == [index for row in rows for index in row]
    assert lengths.tolist() == [len(row) for row in rows]


@pytest.mark.parametrize(
    "text, message",
    [
        ("<e_1> <e_2>", "'<e_1> <e_2>' is not a row of"),
        ("<e_1><>", "is not a row of"),
        ("e_1", "is not a row of"),
        ("<e_1", "is not a row of"),
        ("<e_1><e_12>", "token '<e_12>' .* not in the vocabulary"),
    ],
)
def test_bad_text_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VOCABULARY.encode(text)
    with pytest.raises(ValueError, match=message):
        VOCABULARY.encode_batch(["<e_1>", text, "<e_2>"])


def test_text_that_is_only_whole_when_joined_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("'<e_' is not a row")):
        VOCABULARY.encode_batch(["<e_", "1>"])
    with pytest.raises(ValueError, match="empty text"):
        VOCABULARY.encode_batch(["<e_1>", ""])


def test_bad_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="'<a>' occurs twice"):
        Vocabulary(["<a>", "<b>", "<a>"])
    with pytest.raises(ValueError, match="'a' is not a token"):
        Vocabulary(["a"])
