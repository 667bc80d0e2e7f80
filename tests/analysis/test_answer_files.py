"""Files of answers are scored as the published scripts score them."""

import hashlib
import json
import sqlite3

import pytest

from analysis.answer_files import MODELS, UNKNOWN, cache_key, counts, main, read_answers, read_file
from groundswell import ConfigError, commands
from tasks.multiplication_chain import MultiplicationChain

SHOTS = "Answer the final question.\n\nExample problems:\n\nQ: 12 * 34\nA: #### 408\n\nQuestion to answer:\n\nQ:"


def stored(question, model, completion, temperature=0.0):
    """A row as the published scripts store it: the key is the hash of the JSON in this order."""
    prompt = [{"role": "user", "content": SHOTS + question}]
    question = json.dumps({"prompt": prompt, "model": model, "temperature": temperature})
    return hashlib.sha256(question.encode()).hexdigest(), json.dumps(prompt), completion


def write_cache(path, rows, table="main"):
    connection = sqlite3.connect(path)
    connection.execute(f"CREATE TABLE {table} (key TEXT PRIMARY KEY, prompt TEXT, completion TEXT)")
    connection.executemany(f"INSERT INTO {table} VALUES (?, ?, ?)", rows)
    connection.commit()
    connection.close()
    return path


@pytest.fixture
def cache(tmp_path):
    rows = [
        stored("12 * 34", "gpt-4", "1): 4 * 12 = 48 #### 408"),
        stored("12 * 35", "gpt-4", "#### 408\n#### 420 "),
        stored("99 * 99", "gpt-4", "#### 9,801"),
        stored("10 * 10", "gpt-4", "100"),  # without the mark the whole text counts
        stored("10 * 11", "gpt-4", "The answer is 110"),
        stored("12 * 34", "gpt-4-1106-preview", "#### 409"),
        stored("12 * 34", "gpt-5", "#### 408"),
        ("a key of nothing", stored("11 * 11", "gpt-4", "")[1], "#### 121"),
    ]
    return write_cache(tmp_path / "cache.db", rows)


def test_a_cache_of_products(cache):
    before = cache.read_bytes()
    given = read_file(cache)
    assert [each.model for each in given] == ["gpt-4"] * 5 + ["gpt-4-1106-preview", UNKNOWN, UNKNOWN]
    assert counts([each for each in given if each.model == "gpt-4"]) == {
        "answers": 5, "right": 3, "percent": "60.0", "right, commas aside": 4,
    }  # fmt: skip
    assert [each.model for each in read_file(cache, models=(*MODELS, "gpt-5"))].count("gpt-5") == 1
    assert {each.model for each in read_file(cache, temperature=1.0)} == {UNKNOWN}
    assert cache.read_bytes() == before
    assert sorted(path.name for path in cache.parent.iterdir()) == ["cache.db"]


def test_keys_depend_on_the_order():
    key, prompt, _ = stored("12 * 34", "gpt-4", "")
    assert cache_key(prompt, "gpt-4", 0.0) == key
    other = json.dumps({"model": "gpt-4", "prompt": json.loads(prompt), "temperature": 0.0})
    assert hashlib.sha256(other.encode()).hexdigest() != key


def test_lines_have_the_answers(tmp_path):
    file = tmp_path / "test.txt"
    file.write_text("Bo has 3 apples?||<<3*1000=3000>> #### 3,000\nWho?|| #### 7\n")
    rows = [stored("Bo has 3 apples?", "gpt-4", "#### 3,000"), stored("Who else?", "gpt-4", "#### 7")]
    cache = write_cache(tmp_path / "cache.db", rows)
    expected = read_answers(file)
    given = read_file(cache, expected)
    assert counts(given, expected) == {
        "answers": 1, "right": 1, "percent": "100.0", "right, commas aside": 1, "unanswered": 1,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"cache.db row 1: 'Bo has 3 apples\?' is no product; .* --lines FILE"):
        read_file(cache)


def test_published_products_are_turned_round(tmp_path):
    task = MultiplicationChain(digits=3, train_size=1, validation_size=1, test_size=50)
    file = tmp_path / "test.txt"
    file.write_text("".join(f"{example.line}\n" for example in task.texts("test")))
    expected = read_answers(file)
    assert len(expected) == 50
    for question, answer in expected.items():
        first, second = map(int, question.split(" * "))
        assert first * second == int(answer) and not answer.startswith("0")


def test_a_file_of_json_lines(tmp_path):
    rows = [
        {"question": "1+1", "answer": "2", "completion": "so #### 2"},
        {"question": "2+1", "answer": "#### 3", "completion": "3", "more": None},
        {"question": "2+2", "answer": "4", "completion": "4 #### 5"},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    assert counts(read_file(path)) == {"answers": 3, "right": 2, "percent": "66.7", "right, commas aside": 2}
    assert len(read_file(path, {"1+1": "2"})) == 1
    with pytest.raises(ConfigError, match="has no answers to the questions of --lines"):
        read_file(path, {})


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}", "answers.jsonl line 1: must have the texts question, answer, completion"),
        ('{"question": "a", "answer": "b", "completion": "c"}\nnone', "line 2: is no JSON"),
        ('{"question": "a", "answer": 3, "completion": "c"}', "line 1: must have the texts"),
        ("", "has no answers"),
    ],
)
def test_broken_lines(tmp_path, text, message):
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_file(path)


def test_broken_caches(tmp_path):
    with pytest.raises(ConfigError, match=r"no such table: main; a cache has a table main\(key, prompt, completion\)"):
        read_file(write_cache(tmp_path / "other.db", [], table="rows"))
    for number, prompt in enumerate(("no JSON", "[]", '[{"content": "Q: 1 * 1"}]', '[{"content": 3}]', "3")):
        path = write_cache(tmp_path / f"{number}.db", [stored("1 * 1", "gpt-4", ""), ("key", prompt, "#### 1")])
        with pytest.raises(ConfigError, match=f"{number}.db row 2: its prompt is no message"):
            read_file(path)
    path = write_cache(tmp_path / "empty.db", [("key", None, "")])
    with pytest.raises(ConfigError, match="empty.db row 1: key, prompt and completion must be texts"):
        read_file(path)
    path = tmp_path / "cut.db"
    path.write_bytes((tmp_path / "0.db").read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cut.db: "):
        read_file(path)


def test_the_command(cache, capsys, tmp_path):
    assert commands.main(["answers", "score", str(cache)]) == 0
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if "gpt-4 " in line)
    assert row.split()[-4:] == ["5", "3", "60.0", "4"]
    assert commands.main(["answers", "score", str(tmp_path / "none.db")]) == 2
    assert "none.db: No such file or directory; give a file of answers" in capsys.readouterr().err
    assert main([str(cache)]) == 0
    assert commands.main(["answers", "score"]) == 2
    assert commands.main(["answers", "score", str(cache), "--lines", str(tmp_path / "none.txt")]) == 2
    assert "--lines" in capsys.readouterr().err
