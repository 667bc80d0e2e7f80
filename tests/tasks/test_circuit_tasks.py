"""Tasks with clean and corrupted texts: what their rows hold."""

import json
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from numpy.random import RandomState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from groundswell.config import ConfigError
from groundswell.protocols import IGNORE, Dataset, Split
from tasks.boolean_expressions import FEW_SHOT, BooleanExpressions, draw_expression, evaluate, other_value
from tasks.circuit_draws import read_lines
from tasks.circuit_text import CircuitTask
from tasks.gendered_pronoun import GenderedPronoun
from tasks.greater_than import CENTURIES, GreaterThan
from tasks.ioi import Ioi

SMALL = {"train_size": 40, "validation_size": 20, "test_size": 30}
TASKS = {
    "ioi": Ioi(**SMALL),
    "ioi t1": Ioi(frames="t1", **SMALL),
    "greater than": GreaterThan(**SMALL),
    "greater than by text": GreaterThan(split_by="text", **SMALL),
    "pronoun": GenderedPronoun(**SMALL),
    "few shot": BooleanExpressions(**SMALL),
    "instruction": BooleanExpressions(prompt="instruction", **SMALL),
    "zero shot": BooleanExpressions(prompt="zero_shot", **SMALL),
}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> CircuitTask:
    return TASKS[request.param]


@lru_cache
def built(task: CircuitTask) -> Dataset:
    return task.build()


def splits(dataset: Dataset) -> dict[str, Split]:
    return {"train": dataset.train, **dataset.evaluation}


def texts(task: CircuitTask, split: Split, half: int = 0) -> list[str]:
    """Prompts of the clean (0) or corrupted (1) half, up to the first answer position."""
    tokenizer, width = task._tokenizer(), task.text_length
    rows = split.tokens[:, half * width : (half + 1) * width].tolist()
    ends = (split.positions[:, 0] + 1).tolist()
    return [tokenizer.decode(row[:end]) for row, end in zip(rows, ends, strict=True)]


def words(task: CircuitTask, tokens: torch.Tensor) -> list[str]:
    return [task._tokenizer().decode([token]) for token in tokens.tolist()]


def test_rows_are_the_sentences(task: CircuitTask) -> None:
    """The bundled tokenizer loses nothing: prompts and answers come back letter by letter."""
    pairs, dataset = task.sentence_pairs(), built(task)
    assert {name: len(split) for name, split in splits(dataset).items()} == task.sizes
    for name, split in splits(dataset).items():
        assert texts(task, split) == [pair.clean.prompt for pair in pairs[name]]
        assert texts(task, split, 1) == [pair.corrupted.prompt for pair in pairs[name]]
        assert words(task, split.targets[:, 0]) == [pair.clean.answer for pair in pairs[name]]
        assert words(task, split.targets[:, 1]) == [pair.clean.distractor for pair in pairs[name]]
        assert torch.equal(split.positions[:, 0], split.positions[:, 1])


def test_both_halves_have_as_many_tokens(task: CircuitTask) -> None:
    for split in splits(built(task)).values():
        clean, corrupted = split.tokens.chunk(2, 1)
        assert torch.equal(clean == 0, corrupted == 0)
        assert torch.equal((clean != 0).sum(1), split.positions[:, 0] + 1)
        assert (clean != corrupted).any(1).float().mean() > 0.9  # greater-than may draw the same year


def test_splits_share_no_text(task: CircuitTask) -> None:
    prompts = [prompt for split in splits(built(task)).values() for prompt in texts(task, split)]
    assert len(set(prompts)) == len(prompts)


def test_without_pairs_the_clean_texts_are_the_same(task: CircuitTask) -> None:
    alone = task.with_overrides({"pairs": False}).build()
    for name, split in splits(alone).items():
        other = splits(built(task))[name]
        assert torch.equal(split.tokens, other.tokens[:, : task.text_length])
        assert torch.equal(split.targets, other.targets[:, :1])
        assert torch.equal(split.positions, other.positions[:, :1])


def test_seeds_give_rows_of_one_shape(task: CircuitTask) -> None:
    other = task.with_overrides({"seed": 1}).build()
    assert other.manifest["sha256"] != built(task).manifest["sha256"]
    assert other.vocabulary == built(task).vocabulary
    for name, split in splits(other).items():
        assert split.tokens.shape == splits(built(task))[name].tokens.shape


def test_default_length_is_enough_and_not_more(task: CircuitTask) -> None:
    if isinstance(task, BooleanExpressions) or task == TASKS["ioi t1"]:
        return  # of a chosen size; of the same as all frames
    large = task.with_overrides({"train_size": 400, "validation_size": 50, "test_size": 400}).build()
    longest = max(int(split.positions.max()) + 1 for split in splits(large).values())
    assert longest == task.text_length


def test_a_length_that_is_too_small_is_named(task: CircuitTask) -> None:
    if isinstance(task, BooleanExpressions):
        return  # draws shorter ones
    with pytest.raises(ConfigError, match=r"a text of \d+ tokens; set task.length=\d+ or more"):
        task.with_overrides({"length": 4}).build()


# ---- indirect objects ----


def test_ioi_names() -> None:
    for pairs in TASKS["ioi"].sentence_pairs().values():
        for clean, corrupted, _ in pairs:
            names = [word.strip(",.") for word in clean.prompt.split() if word.strip(",.") in TASKS["ioi"].names]
            assert Counter(names) == {clean.distractor.strip(): 2, clean.answer.strip(): 1}
            others = [w.strip(",.") for w in corrupted.text.split() if w.strip(",.") in TASKS["ioi"].names]
            assert len(set(others)) == len(others) == 4 and not set(others) & set(names)


def test_ioi_holds_out_two_frames_in_both_orders() -> None:
    cases = Ioi(train_size=2_000, validation_size=100, test_size=400).draw(RandomState(0))
    assert set(cases["test"][:, 0].tolist()) == {12, 13, 20, 21}
    seen = set(cases["train"][:, 0].tolist())
    assert len(seen) == 26 and not seen & {12, 13, 20, 21}
    abba = cases["train"][:, 0] % 2 == 0
    assert (cases["train"][abba, 1] == cases["train"][abba, 4]).all()  # the pair's first name receives
    assert (cases["train"][~abba, 1] == cases["train"][~abba, 3]).all()  # it gives


def test_ioi_test_frames_have_no_words_of_their_own() -> None:
    task = Ioi(train_size=2_000, validation_size=1, test_size=400, pairs=False)
    dataset = task.build()
    train, test = (set(split.tokens.flatten().tolist()) for split in (dataset.train, dataset.evaluation["test"]))
    assert test <= train


def test_ioi_t1_has_one_frame_for_models_of_all_frames() -> None:
    assert TASKS["ioi t1"].text_length == TASKS["ioi"].text_length
    assert built(TASKS["ioi t1"]).vocabulary == built(TASKS["ioi"]).vocabulary
    for pairs in TASKS["ioi t1"].sentence_pairs().values():
        assert all(pair.clean.prompt.startswith("Friends ") and " found a " in pair.clean.prompt for pair in pairs)


def test_too_many_sentences_are_refused() -> None:
    with pytest.raises(ConfigError, match="different sentences are asked for"):
        GreaterThan(train_size=400_000, pairs=False, validation_size=1, test_size=1).build()
    with pytest.raises(ConfigError, match="there are 5400; ask for fewer"):
        GenderedPronoun(train_size=6_000).build()
    with pytest.raises(ConfigError, match="expressions are asked for"):
        BooleanExpressions(prompt="zero_shot", length=3, **SMALL).build()


# ---- years ----


def test_years_after_the_shown_one() -> None:
    for name in ("greater than", "greater than by text"):
        for pairs in TASKS[name].sentence_pairs().values():
            for clean, corrupted, _ in pairs:
                century = clean.prompt[-2:]
                assert int(century) in CENTURIES and f" {century}{clean.distractor} " in clean.prompt
                assert int(clean.answer) > int(clean.distractor) > 0
                assert corrupted.prompt.split()[1] == clean.prompt.split()[1]  # the event stays


def test_years_are_split_by_their_digits() -> None:
    shown = {name: set(split.targets[:, 1].tolist()) for name, split in splits(built(TASKS["greater than"])).items()}
    assert not shown["train"] & shown["validation"] and not shown["train"] & shown["test"]
    assert not shown["validation"] & shown["test"]


def test_candidates_are_the_hundred_years() -> None:
    task = TASKS["greater than"]
    dataset = built(task)
    kinds = dataset.answer.token_kinds
    assert [dataset.vocabulary[token] for token in (kinds == 0).nonzero().flatten()] == [f"{n:02d}" for n in range(100)]
    assert (kinds[kinds != 0] == -1).all()


def test_grades_of_years() -> None:
    task = TASKS["greater than"]
    split = built(task).evaluation["test"].select(slice(0, 3))
    candidates = task.candidates()
    shown = [int(word) for word in words(task, split.targets[:, 1])]
    logits = torch.full((3, 2, task.vocab_size), 50.0)  # what is no year must not count
    logits[:, :, candidates] = 0.0
    reference = logits.clone()
    for row, year in enumerate(shown):
        logits[row, :, candidates[year + 1]] = 40.0
        reference[row, :, candidates[year - 1]] = 40.0
    grades = task.grade(logits, reference, split)
    assert grades["accuracy"].tolist() == [1, 1, 1] and grades["exact_match"].tolist() == [0, 0, 0]
    assert torch.allclose(grades["probability_difference"], torch.ones(3))
    assert torch.allclose(grades["kl"], torch.full((3,), 40.0), atol=1e-3)
    same = task.grade(logits, logits, split)
    assert torch.allclose(same["kendall_tau"], torch.ones(3)) and torch.allclose(same["kl"], torch.zeros(3))
    with pytest.raises(ConfigError, match="task.pairs"):
        task.with_overrides({"pairs": False}).grade(logits, logits, split)


# ---- pronouns ----


def test_pronouns_have_both_genders_evenly() -> None:
    task = TASKS["pronoun"]
    for split in splits(built(task)).values():
        counts = Counter(words(task, split.targets[:, 0]))
        assert counts[" he"] == counts[" she"] == len(split) / 2
    male = set(read_lines("male_names"))
    for clean, corrupted, _ in task.sentence_pairs()["train"]:
        assert (clean.prompt.split()[1] in male) == (clean.answer == " he")
        assert (corrupted.prompt.split()[1] in male) == (clean.answer == " she")
        assert clean.prompt.split()[2:] == corrupted.prompt.split()[2:]


def test_logit_difference() -> None:
    task = TASKS["pronoun"]
    split = built(task).evaluation["test"]
    logits = torch.zeros(len(split), 2, task.vocab_size)
    logits.scatter_(2, split.targets[:, :1, None].expand(-1, 2, 1), 3.0)
    logits.scatter_(2, split.targets[:, 1:, None].expand(-1, 2, 1), -1.0)
    grades = task.grade(logits, torch.zeros_like(logits), split)
    assert grades["logit_difference"].tolist() == [4.0] * len(split)
    assert grades["accuracy"].mean() == 1 and grades["exact_match"].mean() == 0  # of equal ones the first is best
    assert (grades["kl"] > 0).all()


# ---- Boolean expressions ----


def test_values_of_expressions_are_those_of_python() -> None:
    random = RandomState(3)
    for _ in range(300):
        text = draw_expression(random)
        assert evaluate(text) == eval(text)
        other = other_value(text, random)
        assert eval(other) != eval(text)
        shapes = [[w if w in ("not", "(", ")") else "" for w in t.split()] for t in (text, other)]
        assert shapes[0] == shapes[1]


def test_expressions_of_mixed_precedence() -> None:
    for text in ("True or False and False", "not False and False", "not True or True", "( True or True ) and False"):
        assert evaluate(text) == eval(text)


def test_few_shot_lines_are_right() -> None:
    for line in FEW_SHOT.splitlines():
        expression, _, value = line.rpartition(" is ")
        assert str(eval(expression)) == value


def test_expressions_of_few_shot_share_the_beginning() -> None:
    clean, corrupted = built(TASKS["few shot"]).train.tokens.chunk(2, 1)
    shared = len(TASKS["few shot"]._tokenizer().encode(FEW_SHOT).ids)
    assert shared > 30 and torch.equal(clean[:, :shared], corrupted[:, :shared])


def test_an_answer_counts_with_and_without_its_space() -> None:
    task = TASKS["few shot"]
    split = built(task).evaluation["test"].select(slice(0, 2))
    vocabulary = built(task).vocabulary
    logits = torch.zeros(2, 2, task.vocab_size)
    for row, word in enumerate(words(task, split.targets[:, 0])):
        logits[row, :, vocabulary.index(word.strip())] = 1.0
    reference = logits.clone()
    reference.scatter_(2, split.targets[:, :1, None].expand(-1, 2, 1), 2.0)
    grades = task.grade(logits, reference, split)
    assert grades["accuracy"].tolist() == [1, 1] and grades["exact_match"].tolist() == [1, 1]


# ---- other tokenizers ----


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """GPT-2's kind, so small that names are one to four tokens; years are two tokens of two digits, some excepted."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    drawn = (
        Ioi(train_size=300, pairs=False),
        GenderedPronoun(train_size=300, pairs=False),
        BooleanExpressions(prompt="zero_shot", pairs=False, **SMALL),
    )
    corpus = [pair.clean.text for task in drawn for pair in task.sentence_pairs()["train"]]
    trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.mark.parametrize("name", ["ioi", "pronoun", "zero shot"])
def test_counterparts_of_any_tokenizer(name: str, byte_pairs: str) -> None:
    task = TASKS[name].with_overrides({"tokenizer": byte_pairs, "length": 64})
    tokenizer, pairs = task._tokenizer(), task.sentence_pairs()
    several = 0
    for part, split in splits(task.build()).items():
        for row, (clean, corrupted, _) in enumerate(pairs[part]):
            whole, other = (tokenizer.encode(sentence.text).ids for sentence in (clean, corrupted))
            prompt = len(tokenizer.encode(clean.prompt).ids)
            assert len(whole) == len(other)
            assert split.tokens[row, : len(whole) - 1].tolist() == whole[:-1]
            assert split.tokens[row, 64 : 64 + len(other) - 1].tolist() == other[:-1]
            targets = split.targets[row, : task.num_answer_tokens]
            assert targets[targets != IGNORE].tolist() == whole[prompt:]
            expected = [min(prompt - 1 + k, len(whole) - 2) for k in range(task.num_answer_tokens)]
            assert split.positions[row].tolist() == [*expected, prompt - 1]
            several += len(whole) - prompt > 1
    assert name != "ioi" or several > 10


def test_a_text_without_a_counterpart_is_named(tmp_path: Path) -> None:
    """True is one token and False five: the value of an expression of one literal cannot be changed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["True is True"] * 20, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"no counterpart of \d+ tokens for '.* is (True|False)' in 100 draws"):
        BooleanExpressions(prompt="zero_shot", tokenizer=str(tmp_path), length=64, **SMALL).build()


def test_a_tokenizer_with_a_first_token(byte_pairs: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(f"{byte_pairs}/tokenizer.json")
    tokenizer.add_special_tokens(["<s>"])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    plain = TASKS["ioi"].with_overrides({"tokenizer": byte_pairs}).build()
    task = TASKS["ioi"].with_overrides({"tokenizer": str(tmp_path)})
    dataset = task.build()
    assert (dataset.train.tokens[:, 0] == start).all() and (dataset.train.tokens[:, 64] == start).all()
    assert torch.equal(dataset.train.positions, plain.train.positions + 1)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <s>", special_tokens=[("<s>", start)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="do not begin with those of its prompt"):
        task.build()


def test_years_need_tokens_of_two_digits(byte_pairs: str) -> None:
    with pytest.raises(ConfigError, match="has no token '00'"):
        TASKS["greater than"].with_overrides({"tokenizer": byte_pairs}).build()


def test_only_years_of_two_tokens_are_drawn(tmp_path: Path) -> None:
    """A tokenizer with a token of its own for 1732, as GPT-2's has some."""
    tokenizer = TASKS["greater than"]._tokenizer()
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens([" 1732"])
    other.save(str(tmp_path / "tokenizer.json"))
    task = TASKS["greater than"].with_overrides({"tokenizer": str(tmp_path)})
    usable = task._usable()
    assert not usable[CENTURIES.index(17), 32] and usable[CENTURIES.index(17), 33] and usable[0, 32]
    assert not usable[:, 0].any() and not usable[:, 99].any() and int(usable.sum()) == 12 * 98 - 1
    task.build()


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer: .*nothing: No such file"):
        Ioi.from_dict({"tokenizer": str(tmp_path / "nothing")})


# ---- published files ----

PUBLISHED = {
    "ioi": {
        "ioi_sentences": "Then, Mary and John went to the store. John gave a ring to Mary",
        "corr_ioi_sentences": "Then, Alice and Tom went to the store. Bob gave a ring to Frank",
        "a": "Mary",
        "b": "John",
    },
    "greater than": {
        "prefix": "The war lasted from 1732 to 17",
        "corr_prefix": "The war lasted from 1505 to 15",
        "digits": "32",
        "good": ["33", "34"],
        "bad": ["31"],
        "corr_digits": "05",
    },
    "pronoun": {
        "prefix": "So Mary is such a good cook, isn't",
        "pronoun": "she",
        "corr_prefix": "So Bob is such a good cook, isn't",
        "corr_pronoun": "he",
    },
    "zero shot": {
        "input": "( True and False ) or True is",
        "target": "True",
        "corr_input": "( True and False ) or False is",
    },
}
ANSWERS = {
    "ioi": [" Mary", " John"],
    "greater than": ["33", "32"],
    "pronoun": [" she", " he"],
    "zero shot": [" True", " False"],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_fields(name: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(PUBLISHED[name]) + "\n", encoding="utf-8")
    task = TASKS[name].with_overrides({"path": str(tmp_path)})
    dataset = task.build()
    assert dataset.manifest["counts"] == {"train": 1, "test": 1} and task.num_train is None
    assert words(task, dataset.train.targets[0]) == ANSWERS[name]
    values = PUBLISHED[name]
    whole = next(values[field] for field in ("ioi_sentences", "prefix", "input") if field in values)
    assert whole.startswith(texts(task, dataset.train)[0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_field_of_a_published_file_is_named(name: str, tmp_path: Path) -> None:
    values = PUBLISHED[name]
    for field in values.keys() - {"bad"}:
        lines = [json.dumps(values), json.dumps({key: value for key, value in values.items() if key != field})]
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        with pytest.raises(ConfigError, match=rf"train.jsonl line 2: .*field '{field}'"):
            TASKS[name].with_overrides({"path": str(tmp_path)}).build()


def test_a_folder_needs_two_splits(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(PUBLISHED["ioi"]))
    with pytest.raises(ConfigError, match="has no <split>.jsonl"):
        Ioi.from_dict({"path": str(tmp_path)})


def test_lists_of_words_are_clean() -> None:
    for name in ("male_names", "female_names", "places", "objects", "events"):
        found = read_lines(name)
        assert len(set(found)) == len(found) and all(word.isalpha() for word in found), name
    assert not set(read_lines("male_names")) & set(read_lines("female_names"))
    assert len(TASKS["ioi"].names) >= 100 and len(read_lines("events")) == 120
    assert (len(read_lines("ioi_frames")), len(read_lines("pronoun_frames"))) == (15, 30)
    assert not any(word[0] in "aeiou" for word in read_lines("objects"))  # "a OBJECT"
