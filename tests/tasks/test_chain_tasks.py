"""Forms, vocabularies and splits of tasks with chains of thought."""

from pathlib import Path

import numpy as np
import pytest
import torch
from chain_data import DATA, published
from text_files import END, write_tokenizer

from groundswell.config import ConfigError
from groundswell.protocols import IGNORE
from tasks.chain_files import ChainFiles
from tasks.chain_of_thought import ChainOfThought, first_separator, second_separator
from tasks.chain_text import read_lines
from tasks.multiplication_chain import MultiplicationChain
from tasks.running_sums import RunningSums

SIZES = {"train_size": 60, "validation_size": 10, "test_size": 20}
LINES = ["a b?||<<1+1=2>> #### 2", "A b, c?|| #### 1,024", "b||a b c a b c #### -7"]


def write_files(folder: Path, lines: list[str] = LINES, names: tuple[str, ...] = ("train", "valid")) -> str:
    for name in names:
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(folder)


@pytest.fixture(params=["products", "sums", "files"])
def task(request: pytest.FixtureRequest, tmp_path) -> ChainOfThought:
    if request.param == "files":
        return ChainFiles(path=write_files(tmp_path))
    return MultiplicationChain(digits=3, **SIZES) if request.param == "products" else RunningSums(base=7, **SIZES)


def forms(task: ChainOfThought) -> dict:
    return {form: task.with_overrides({"form": form}).build() for form in ("explicit", "hidden", "none")}


def test_without_the_chain_the_rest_stays(task: ChainOfThought) -> None:
    """Tokens of form none are those of form hidden without the places behind the first E up to the second."""
    found = forms(task)
    hidden, none = found["hidden"].train, found["none"].train
    first = first_separator(hidden.tokens, task.separator)
    second = second_separator(hidden.tokens, task.separator)
    assert torch.equal(second, hidden.positions[:, 0]) and torch.equal(first, none.positions[:, 0])
    assert torch.equal(hidden.targets, none.targets)
    assert torch.equal(hidden.positions - none.positions, (second - first)[:, None].expand_as(hidden.positions))
    for row in range(len(hidden)):
        kept = torch.cat([hidden.tokens[row, : first[row] + 1], hidden.tokens[row, second[row] + 1 :]])
        both = min(len(kept), none.tokens.shape[1])
        assert torch.equal(kept[:both], none.tokens[row, :both])
        assert (kept[both:] == task.separator).all() and (none.tokens[row, both:] == task.separator).all()


def test_what_is_learned(task: ChainOfThought) -> None:
    """The targets of a text are what follows the first E, or the second."""
    for form, dataset in forms(task).items():
        vocabulary = dataset.vocabulary
        for name, split in {"train": dataset.train, **dataset.evaluation}.items():
            for row, example in enumerate(task.texts(name)):
                counted = split.targets[row] != IGNORE
                learned = dict(
                    zip(split.positions[row][counted].tolist(), split.targets[row][counted].tolist(), strict=True)
                )
                text = "".join(vocabulary[learned[place]] for place in sorted(learned))
                chain = f" {example.chain} {END}" if form == "explicit" else ""
                assert text == f"{chain} {example.answer} {END}"
                start = min(learned)
                read = "".join(vocabulary[token] for token in split.tokens[row, : start + 1].tolist())
                assert read == f" {example.question} {END}" + (f" {example.chain} {END}" if form == "hidden" else "")
                assert task.answer_of(split.tokens[row].tolist()) == example.answer


def test_columns_without_a_target_repeat_the_last_place(tmp_path) -> None:
    split = ChainFiles(path=write_files(tmp_path)).build().train
    counted = split.targets != IGNORE
    assert not counted.all()
    lengths = (split.tokens != 0).cumsum(1).argmax(1) + 1  # E is token 0, and closes what can be learned
    assert torch.equal(split.positions.amax(1), lengths - 1)
    places, width = split.positions, split.tokens.shape[1]
    learned = torch.zeros(len(split), width, dtype=torch.bool).scatter(1, places, torch.ones_like(counted))
    assert torch.equal(learned.sum(1), counted.sum(1))


def test_the_tokenizer_of_a_closed_vocabulary_agrees(task: ChainOfThought) -> None:
    """Tokens that are written without text are those of the text."""
    tokenizer = task._tokenizer()
    for name, rows in task.rows().items():
        for row, example in enumerate(task.texts(name)):
            ids = tokenizer.encode(example.text(END)).ids
            assert rows.tokens[row, : rows.length[row]].tolist() == ids
            assert rows.tokens[row, [rows.first[row], rows.second[row]]].tolist() == [0, 0]
    assert tokenizer.get_vocab_size() == task.vocab_size and len(set(task.words())) == task.vocab_size


def test_a_tokenizer_that_splits_symbols(tmp_path) -> None:
    """Tokens come from the text then; here a space is a token of its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = [END, "#", *"0123456789+*() "]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    tokenizer.add_special_tokens([END])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    task = MultiplicationChain(tokenizer=str(tmp_path), digits=2, **SIZES)
    dataset = task.build()
    assert (task.max_length, task.num_answers) == (dataset.train.tokens.shape[1], dataset.train.targets.shape[1])
    closed = task.with_overrides({"tokenizer": None})
    assert task.texts("test") == closed.texts("test")
    assert task.max_length > closed.max_length
    for row, example in zip(dataset.evaluation["test"].tokens.tolist(), task.texts("test"), strict=True):
        assert task.answer_of(row) == example.answer
        assert "".join(words[token] for token in row).startswith(f" {example.question} {END} {example.chain} {END}")


# ---- files ----


def test_closed_words_of_files(tmp_path) -> None:
    task = ChainFiles(path=write_files(tmp_path))
    assert task.words() == (
        *(
            END,
            " ",
            " #",
            " -",
            " 1",
            " 2",
            " <",
            " A",
            " a",
            " b",
            " c",
            "###",
            "+",
            ",",
            "0",
            "1",
            "2",
            "4",
            "7",
            "<",
        ),
        *("=", ">", "?"),
    )
    assert [task.texts("train")[row].answer for row in range(3)] == ["#### 2", "#### 1024", "#### -7"]


def test_names_of_files(tmp_path) -> None:
    write_files(tmp_path, names=("train", "valid", "test_bigbench", "mine", "more"))
    task = ChainFiles(path=str(tmp_path), train="mine.txt", others=("more.txt",), train_size=2, test_size=1)
    counts = task.build().manifest["counts"]
    assert counts == {"train": 2, "validation": 3, "test": 1, "more": 3}
    assert ChainFiles(path=str(tmp_path), test=str(tmp_path / "more.txt")).texts("test")[0].question == "a b?"
    for fields, message in (
        ({"train": "none.txt"}, "train: .*none.txt: no such file"),
        ({"test": "none.txt"}, "test: .*none.txt: no such file"),
        ({"others": ["train.txt"]}, "there is a split 'train' already"),
    ):
        with pytest.raises(ConfigError, match=message):
            ChainFiles.from_dict({"path": str(tmp_path), **fields})
    with pytest.raises(ConfigError, match="split: 'tset' is none of this task's"):
        task.texts("tset")


def test_bad_lines_are_told_or_skipped(tmp_path) -> None:
    task = ChainFiles(path=write_files(tmp_path, [*LINES, "no answer||here"]))
    with pytest.raises(ConfigError, match=r"train.txt line 4: has no '####'"):
        task.build()
    skipping = task.with_overrides({"skip_bad_lines": True}).build()
    assert len(skipping.train) == 3 and skipping.manifest["skipped_lines"] == {"train": [4], "validation": [4]}


def test_texts_that_are_too_long(tmp_path) -> None:
    task = ChainFiles(path=write_files(tmp_path), context=17)
    with pytest.raises(ConfigError, match=r"train.txt line 1: has 21 tokens, at most 17 are read; .* task.context=21"):
        task.build()
    assert len(task.with_overrides({"context": 21}).build().train) == 3


def test_a_changed_file_is_read_again(tmp_path) -> None:
    task = ChainFiles(path=write_files(tmp_path))
    assert len(task.build().train) == 3
    write_files(tmp_path, [*LINES, "new||x #### 1"])
    assert len(task.build().train) == 4 and " new" in task.words()


def test_tokenizers_that_do_not_fit(tmp_path) -> None:
    write_files(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"train.txt line 1: 'a' has no token"):
        ChainFiles(path=str(tmp_path), tokenizer=str(tmp_path)).build()
    write_files(tmp_path, [f"w1 {END} w2||w3 #### w4"])
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"w5"', '"####"'))
    with pytest.raises(ConfigError, match=r"train.txt line 1: its tokens are not three parts"):
        ChainFiles(path=str(tmp_path), tokenizer=str(tmp_path)).build()
    write_tokenizer(tmp_path, end="<stop>")
    with pytest.raises(ConfigError, match=r"tokenizer.json: names no end-of-text token; write its eos_token into"):
        RunningSums.from_dict({"tokenizer": str(tmp_path)})
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert RunningSums(tokenizer=str(tmp_path)).separator == 2
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: eos_token '<end>' is no token of tokenizer.json"):
        RunningSums.from_dict({"tokenizer": str(tmp_path)})


def test_gsm8k_with_its_own_vocabulary() -> None:
    published("gsm8k/valid.txt")
    task = ChainFiles(path=str(DATA / "gsm8k"), train="valid.txt", form="hidden")
    dataset = task.build()
    answers = [task.answer_of(row) for row in dataset.train.tokens.tolist()]
    assert answers == [example.answer for example in read_lines(DATA / "gsm8k/valid.txt").examples]
    gaps = second_separator(dataset.train.tokens, 0) - first_separator(dataset.train.tokens, 0)
    empty = torch.tensor([not example.chain for example in task.texts("train")])
    assert empty.sum() == 6 and torch.equal(gaps == 3, empty)  # two spaces, then E


# ---- running sums ----


def test_running_sums() -> None:
    task = RunningSums(length=5, base=12, **SIZES)
    for name, rows in task.draw().items():
        for row, example in zip(rows.tolist(), task.texts(name), strict=True):
            assert [int(digit, 12) for digit in example.question.split()] == row
            sums = (np.cumsum(row) % 12).tolist()
            assert [int(digit, 12) for digit in (*example.chain.split(), example.answer[-1])] == sums[1:]


@pytest.mark.parametrize(("length", "base", "sizes"), [(6, 4, (3_596, 250, 250)), (20, 10, (4_000, 250, 250))])
def test_no_question_twice(length: int, base: int, sizes: tuple[int, ...]) -> None:
    """Where there are few, all of them; where there are many, drawn ones."""
    task = RunningSums(length=length, base=base, train_size=None if base == 4 else 4_000)
    rows = task.draw()
    assert tuple(map(len, rows.values())) == sizes and task.num_train == sizes[0]
    assert len(np.unique(np.concatenate(list(rows.values())), axis=0)) == sum(sizes)
    counts = np.bincount(rows["train"].ravel(), minlength=base)
    assert counts.min() > 0.9 * counts.mean()
    with pytest.raises(ConfigError, match="train_size: 65, .* more than the 64 questions"):
        RunningSums.from_dict({"length": 3, "train_size": 65, "validation_size": 1, "test_size": 1})


def test_sums_in_another_modulus():
    task = RunningSums(length=5, base=8, modulus=2, **SIZES)
    inputs = task.draw()["test"]
    for row, example in zip(inputs, task.texts("test"), strict=True):
        sums = [sum(row[: n + 1]) % 2 for n in range(5)]
        assert example.question.split() == [str(digit) for digit in row]
        assert example.chain.split() == [str(s) for s in sums[1:-1]]
        assert example.answer.split()[-1] == str(sums[-1])
    assert RunningSums(length=5, base=2, modulus=8, **dict.fromkeys(SIZES, 5)).symbols == "01234567"
