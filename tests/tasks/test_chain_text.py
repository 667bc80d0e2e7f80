"""Lines `question||chain #### answer`."""

from collections import Counter

import pytest
from chain_data import published
from hypothesis import given
from hypothesis import strategies as st

from groundswell.config import ConfigError
from tasks.chain_text import Example, equation_results, extract_answer, read_line, read_lines, write_lines

GOOD = "1 + 1||<<1+1=2>> #### 2"
# questions of 0, 1, ... steps, and answers equal to the last result (as counted in the published files)
GSM8K = {
    "gsm8k/test.txt": ([18, 65, 357, 364, 290, 138, 57, 21, 9], 1_173, 14),
    "gsm8k/valid.txt": ([6, 26, 155, 140, 91, 53, 18, 8, 3], 459, 4),
}


def test_parts_of_a_line() -> None:
    example = read_line(" a, b||x #### 1,234 \r")
    assert example[:3] == ("a, b", "x", "#### 1234")
    assert example.line == "a, b||x #### 1234"
    assert example.text("E") == " a, b E x E #### 1234 E"
    assert read_line("q|| #### 5")[:3] == ("q", "", "#### 5")
    assert extract_answer(" 1,0 ") == "10"


def test_lines_end_with_line_feeds_only(tmp_path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(f"a\u2028b\u0085c||x\u2028y #### 1\r\n\n  \n{GOOD}".encode())
    examples = read_lines(path).examples
    assert examples[0][:3] == ("a\u2028b\u0085c", "x\u2028y", "#### 1")
    assert [example.source for example in examples] == [f"{path} line 1", f"{path} line 4"]
    assert read_lines(path, most=1).examples == examples[:1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no delimiter #### 3", "has 0 '||'"),
        ("two||of||them #### 3", "has 2 '||'"),
        ("no||answer 3", "has no '####'"),
        ("#### 3||no answer", "has no '####'"),
    ],
)
def test_bad_lines(line: str, message: str, tmp_path) -> None:
    path = tmp_path / "some.txt"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(ConfigError) as error:
        read_lines(path)
    assert str(error.value).startswith(f"{path} line 3: {message}") and "skip_bad_lines=true" in str(error.value)
    found = read_lines(path, skip_bad_lines=True)
    assert len(found.examples) == 2 and found.skipped == (3,)


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"none.txt: No such file"):
        read_lines(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ConfigError, match=r"empty.txt: has no example"):
        read_lines(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9||x #### 1\n")
    with pytest.raises(ConfigError, match=r"is not UTF-8 .* byte 3"):
        read_lines(tmp_path / "latin.txt")


WORDS = st.text(st.characters(codec="utf-8"), max_size=12)


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=4))
def test_written_and_read_back_it_is_the_same(tmp_path_factory, parts) -> None:
    examples = [Example(question, chain, f"#### {answer}") for question, chain, answer in parts]
    path = tmp_path_factory.mktemp("lines") / "some.txt"
    try:
        write_lines(path, examples)
    except ConfigError:
        assert not path.exists()
    else:
        assert [example[:3] for example in read_lines(path).examples] == [example[:3] for example in examples]


@pytest.mark.parametrize(
    "wrong", [Example("a||b", "c", "#### 1"), Example("a", "b\nc", "#### 1"), Example("", "", "1")]
)
def test_what_cannot_be_read_back_is_not_written(wrong: Example, tmp_path) -> None:
    with pytest.raises(ConfigError):
        write_lines(tmp_path / "some.txt", [wrong])


@pytest.mark.parametrize("name", GSM8K)
def test_equations_of_gsm8k(name: str) -> None:
    (path,) = published(name)
    steps, consistent, commas = GSM8K[name]
    examples = read_lines(path).examples
    results = [equation_results(example.chain) for example in examples]
    counts = Counter(map(len, results))
    assert [counts[number] for number in range(len(counts))] == steps
    pairs = zip(results, examples, strict=True)
    assert sum(found[-1:] == [example.answer.removeprefix("#### ")] for found, example in pairs) == consistent
    answers = [line.rpartition("#### ")[2] for line in path.read_text().strip().split("\n")]
    assert sum("," in answer for answer in answers) == commas
    assert all(example.answer.removeprefix("#### ").lstrip("-").isdigit() for example in examples)


def test_all_lines_of_gsm8k() -> None:
    """None is lost, and the question with U+2028 is whole."""
    sizes = {"gsm8k/test.txt": 1_319, "gsm8k/valid.txt": 500, "gsm8k/train_no_aug.txt": 6_973}
    questions: set[str] = set()
    for path in published(*sizes):
        examples = read_lines(path).examples
        assert len(examples) == sizes[f"gsm8k/{path.name}"]
        found = {example.question for example in examples}
        assert not found & questions
        questions |= found
        if path.name == "train_no_aug.txt":
            assert [row for row, example in enumerate(examples, 1) if "\u2028" in example.question] == [4_479]
