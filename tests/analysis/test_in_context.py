"""The hard queries in English: the facts of the prompts, their proofs, the folder, asking and scoring."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import in_context
from analysis.in_context import main
from analysis.in_context_prompts import (
    Query,
    hard_queries,
    neighbourhood,
    person_names,
    proven_label,
    training_facts,
    write_prompts,
)
from analysis.in_context_scores import (
    CANNOT_DECIDE,
    INVALID,
    WORDS,
    answer_file,
    check_model_name,
    parse,
    score_report,
)
from groundswell.config import ConfigError
from groundswell.rundir import RunFolder
from groundswell.training.trainer import PackTrainer
from tasks.complex_reasoning import ComplexReasoning
from tasks.proofs import UNPROVEN

SMALL = ComplexReasoning(num_entities=100, num_attributes=3, num_values=5, train_fraction=0.04, test_size=40)
SMALL_FIELDS = {"num-entities": 100, "num-attributes": 3, "num-values": 5, "train-fraction": 0.04, "test-size": 40}
OPTIONS = [text for name, value in SMALL_FIELDS.items() for text in (f"--task.{name}", str(value))]
FACT = re.compile(r"The age of (?P<who>[\w ]+) is (?P<age>\d+)\.|(?P<a>[\w ]+?) is (?P<order>[\w ]+) (?P<b>\w+ \w+)\.")


@pytest.fixture(scope="module")
def dataset():
    return SMALL.build()


@pytest.fixture(scope="module")
def queries(dataset) -> dict[int, Query]:
    return hard_queries(dataset)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Never changed by a test; `folder` is a copy."""
    path = tmp_path_factory.mktemp("prompts") / "small"
    write_prompts(path, SMALL)
    return path


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """The written folder without its prompts, which scoring does not read."""
    path = tmp_path / "prompts"
    path.mkdir()
    for file in [*written.glob("answer_*.txt"), written / "queries.json"]:
        (path / file.name).write_bytes(file.read_bytes())
    return path


# ---- facts ----


def test_facts_are_those_of_training(dataset) -> None:
    facts, world = training_facts(dataset), SMALL.world()
    about_value = facts[:, 1] == facts[:, 2]
    attribute, entity, _, value = facts[about_value].T
    assert {*zip(entity, attribute, value, strict=True)} == {tuple(row) for row in world.atomic(ood=False)}
    assert len(facts) == len(dataset.train) and about_value.sum() == 90 * 3
    comparisons = facts[~about_value]
    assert (world.labels(comparisons[:, :3]) == comparisons[:, 3]).all()
    num_ood = (
        world.ood[comparisons[:, 1], comparisons[:, 0]].astype(int) + world.ood[comparisons[:, 2], comparisons[:, 0]]
    )
    blocks = dataset.manifest["train_blocks"]
    assert [(num_ood == n).sum() for n in (0, 1, 2)] == [*list(blocks.values())[1:], 0]


def test_queries_are_the_split(dataset, queries) -> None:
    world = SMALL.world()
    assert list(queries) == list(range(12)) and len(dataset.evaluation["test_hard"]) == 12
    assert [query.label for query in queries.values()] == sorted(query.label for query in queries.values())
    for query, row in zip(queries.values(), dataset.evaluation["test_hard"].tokens.tolist(), strict=True):
        assert dataset.vocabulary[row[0]] == f"<attr_{query.attribute}>"
        assert [row[2], row[4]] == [query.first, query.second]
        assert world.ood[[query.first, query.second], query.attribute].all()
    assert {k: query.first for k, query in hard_queries(dataset, 1).items()} == {
        k: query.first for k, query in queries.items() if query.attribute == 1
    }


def test_neighbourhood_by_hand() -> None:
    facts = [
        (0, 2, 2),  # of the first
        (3, 1, 0),  # of the second
        (2, 2, 7),  # the neighbours' values and comparisons
        (3, 3, 4),
        (4, 2, 1),
        (4, 4, 5),  # two steps away
        (5, 4, 0),
    ]
    assert neighbourhood(np.array(facts), 0, 1).tolist() == [0, 1, 2, 3, 4]
    assert neighbourhood(np.array(facts), 0, 5).tolist() == [0, 2, 4, 5, 6]


def test_neighbourhoods_mention_an_entity_one_step_away(queries) -> None:
    for query in queries.values():
        pairs = [{a, b} for a, b, _ in query.facts.tolist()]
        near = {query.first, query.second}
        near |= set().union(*(pair for pair in pairs if pair & near))
        assert query.near.tolist() == [n for n, pair in enumerate(pairs) if pair & near]
        assert 0 < len(query.near) < len(query.facts)


def test_proofs_by_hand() -> None:
    facts = np.array(
        [(0, 1, 2), (2, 3, 2), (1, 1, 4), (2, 2, 3), (3, 5, 1), (5, 3, 1)]
    )  # 0 > 1 = age 4 > age 3 = 2 > 3 = 5
    assert proven_label(facts, 0, 3) == proven_label(facts, 0, 2) == 2
    assert proven_label(facts, 5, 0) == 0 and proven_label(facts, 5, 3) == 1
    assert proven_label(facts, 0, 4) == UNPROVEN
    assert proven_label(facts[[0, 1]], 0, 3) == UNPROVEN  # without values


def test_every_query_needs_values_and_is_decided_by_its_neighbourhood(queries) -> None:
    for query in queries.values():
        near = query.facts[query.near]
        assert query.decides(query.facts) and query.decides(near)
        assert not query.decides(near[near[:, 0] != near[:, 1]])


# ---- English ----


def test_names_are_distinct_and_say_no_answer() -> None:
    names = person_names(20_000, seed=0)
    assert len(set(names)) == 20_000
    assert person_names(50, 0) == names[:50] != person_names(50, 1)
    for name in names:  # "Holder" would read as an answer
        assert len(name.split()) == 2 and not any(word in name.lower() for word in WORDS)
    with pytest.raises(ConfigError, match=r"task\.num_entities 90000: there are names for 20020 people only"):
        person_names(90_000, 0)


def read_prompt(path: Path) -> tuple[list[tuple[str, ...]], str]:
    """-> facts as (who, age) and (a, order, b), question. Fails where a sentence has another form."""
    _, facts, question = path.read_text().split("\n\n")
    found = []
    for text in re.findall(r"[^.]+\.", facts):
        match = FACT.fullmatch(text.strip())
        assert match, text
        found.append(tuple(part for part in match.groups() if part is not None))
    return found, question


def test_prompts_say_the_facts_in_english(written: Path, queries) -> None:
    names = person_names(100, seed=0)
    orders = ("younger than", "in the same age as", "older than")
    for k, query in queries.items():
        for context, facts in [("prompt", query.facts), ("retrieval", query.facts[query.near])]:
            said, question = read_prompt(written / f"{context}_directna_{k}.txt")
            expected = [
                (names[a], str(value)) if a == b else (names[a], orders[value], names[b]) for a, b, value in facts
            ]
            assert sorted(said) == sorted(expected) and said != expected
            assert (
                f"is {names[query.first]} younger than, older than or in the same age as {names[query.second]}?"
                in question
            )
            assert all(word in question for word in WORDS) and question.endswith("Answer:\n")
            thoughts, question = read_prompt(written / f"{context}_cot_{k}.txt")
            assert thoughts == said
            assert all(word in question for word in (*WORDS, "Final answer: "))
        assert (written / f"answer_{k}.txt").read_text() == f"{query.label}\n"


def test_queries_about_one_attribute_have_their_facts_in_other_orders(written: Path, queries) -> None:
    first, second = [k for k, query in queries.items() if query.attribute == queries[0].attribute][:2]
    one, other = (read_prompt(written / f"prompt_cot_{k}.txt")[0] for k in (first, second))
    assert sorted(one) == sorted(other) and one != other


def read_and_answer(path: Path) -> str:
    """Reason from the text alone: each of the two is bounded by the ages of those it is compared with."""
    said, question = read_prompt(path)
    people = re.findall(r"is ([A-Z]\w+ \w+) younger than, .* as ([A-Z]\w+ \w+)\?", question)[0]
    age = {fact[0]: int(fact[1]) for fact in said if len(fact) == 2}
    said += [(b, {"younger than": "older than", "older than": "younger than"}.get(order, order), a)
             for a, order, b in (fact for fact in said if len(fact) == 3)]  # fmt: skip
    low, high = {}, {}
    for who in people:
        near = [(fact[1], age[fact[2]]) for fact in said if len(fact) == 3 and fact[0] == who]
        low[who] = max([a + 0.5 * (order == "older than") for order, a in near if order != "younger than"], default=-1)
        high[who] = min([a - 0.5 * (order == "younger than") for order, a in near if order != "older than"], default=99)
    first, second = people
    if low[first] > high[second] or high[first] < low[second]:
        return "older" if low[first] > high[second] else "younger"
    exact = low[first] == high[first] == low[second] == high[second]
    return "same age" if exact else "cannot decide"


@pytest.mark.parametrize("context", ["prompt", "retrieval"])
def test_a_reader_who_reasons_is_always_right(context: str, written: Path, queries) -> None:
    for k, query in queries.items():
        assert WORDS[read_and_answer(written / f"{context}_cot_{k}.txt")] == query.label


def test_seeds_decide_names_and_order(written: Path, tmp_path: Path) -> None:
    write_prompts(tmp_path / "same", SMALL, attribute=1)
    write_prompts(tmp_path / "other", SMALL, attribute=1, seed=1)
    files = sorted(path.name for path in (tmp_path / "same").glob("*.txt"))
    assert 0 < len(files) < len(list(written.glob("*.txt")))
    for file in files:
        text = (tmp_path / "same" / file).read_text()
        assert text == (written / file).read_text()
        assert (text == (tmp_path / "other" / file).read_text()) == file.startswith("answer")


def test_queries_json_says_what_was_asked(written: Path, dataset, queries) -> None:
    described = json.loads((written / "queries.json").read_text())
    assert described["task"] == SMALL.to_dict() and described["sha256"] == dataset.manifest["sha256"]
    names = person_names(100, 0)
    for row, (k, query) in zip(described["queries"], queries.items(), strict=True):
        assert row == {
            "k": k,
            "attribute": query.attribute,
            "e1": query.first,
            "e2": query.second,
            "names": [names[query.first], names[query.second]],
            "label": query.label,
            "facts": {"prompt": len(query.facts), "retrieval": len(query.near)},
        }


def test_a_killed_writer_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("analysis.in_context_prompts._description", stop)
    with pytest.raises(KeyboardInterrupt):
        write_prompts(tmp_path / "new", SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_paper_sizes() -> None:
    queries = hard_queries(ComplexReasoning().build())
    assert len(queries) == 150
    sizes = np.array([[len(query.facts), len(query.near)] for query in queries.values()])
    assert sizes.mean(axis=0).round(-2).tolist() == [28_200, 5_400]  # section 5 of the paper


# ---- scores ----


@pytest.mark.parametrize(
    ("text", "direct", "cot"),
    [
        ("Younger.", 0, INVALID),
        ("in the SAME AGE", 1, INVALID),
        ("older, not younger", INVALID, INVALID),
        ("cannot decide: younger", INVALID, INVALID),
        ("Mr Holder", INVALID, INVALID),
        ("first older. Final answer: younger. FINAL ANSWER: Cannot decide", INVALID, CANNOT_DECIDE),
        ("Final answer: cannot decide, maybe older", INVALID, INVALID),
        ("", INVALID, INVALID),
    ],
)
def test_strict_reading(text: str, direct: int, cot: int) -> None:
    assert parse(text, "direct", strict=True) == direct
    assert parse(text, "CoT", strict=True) == cot


def put(folder: Path, name: str, context: str, style: str, texts: Sequence[str]) -> None:
    for k, text in enumerate(texts):
        (folder / answer_file(name, context, style, k)).write_text(text)


def test_table_by_hand(folder: Path) -> None:
    gold = [int((folder / f"answer_{k}.txt").read_text()) for k in range(12)]
    assert gold == [0, 0, *[1] * 8, 2, 2]
    words = ("younger", "same age", "older")
    put(folder, "gemini", "prompt", "directna", [words[label] for label in gold])
    put(folder, "gemini", "retrieval", "cot", [f"Hm.\nFinal answer: {words[2 - label]}" for label in gold])
    put(folder, "gpt4turbo", "prompt", "directna", ["cannot decide", "Younger", "", words[(gold[3] + 1) % 3]])
    table = score_report(folder).table
    ours = table[table["source"] == "here"].drop(columns=["queries", "source"])
    assert ours.values.tolist() == [
        ["gemini", "all facts", "direct", 12, 0, 1.0, 0.0, 0.0, 0.0],
        ["gemini", "retrieval", "CoT", 12, 0, 8 / 12, 4 / 12, 0.0, 0.0],
        ["gpt4turbo", "all facts", "direct", 4, 8, 0.0, 0.25, 0.25, 0.5],
    ]
    assert (table[table["source"] != "published"]["queries"] == 12).all()
    strict = score_report(folder, strict=True).table.set_index("model").loc["gpt4turbo"]
    assert gold[1] == 0 and [strict["correct"], strict["invalid"]] == [0.25, 0.25]  # "Younger"
    chance = table.set_index("model").loc["chance"]
    assert chance["correct"] == pytest.approx(1 / 3)


def test_published_figures_and_remarks(folder: Path) -> None:
    put(folder, "some", "prompt", "cot", ["final answer: older"])
    report = score_report(folder)
    published = report.table[report.table["source"] == "published"].set_index(["model", "context", "style"])
    assert (published["queries"] == 150).all() and len(published) == 7
    assert published.loc[("Gemini-1.5-Pro", "all facts", "CoT"), ["correct", "cannot decide"]].tolist() == [
        0.113,
        0.707,
    ]
    assert published.loc[("GPT-4-Turbo", "retrieval", "CoT")]["invalid"] == 0.04
    text = " ".join(report.remarks)
    assert "trained on these very facts" in text and "0.136 (one standard error) over 12 queries" in text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"answer_0.txt": None}, r"answer_0\.txt to score it against"),
        ({"answer_3.txt": "3"}, r"answer_3\.txt: says '3'; 0 \(younger\), 1"),
        ({"answer_3.txt": "older\n"}, r"answer_3\.txt: says 'older'"),
        ({"me_cto_0.txt": ""}, r"me_cto_0\.txt: not the name of an answer; name it NAME_\[retrieval_\]"),
        ({"me_cot_00.txt": ""}, "not the name of an answer"),
        ({"answer_x.txt": ""}, "not the name of an answer"),
        ({"me_cot_12.txt": ""}, r"me_cot_12\.txt: there is no answer_12\.txt"),
        ({"me_cot_0.txt": None}, r"has no answers of a model; `groundswell in-context ask` writes"),
    ],
)
def test_wrong_folders_are_told_in_one_line(folder: Path, files: dict[str, str | None], message: str) -> None:
    put(folder, "me", "prompt", "cot", ["final answer: older"])
    for name, text in files.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        score_report(folder)
    assert "\n" not in str(caught.value)


def test_folders_that_are_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no answer_K\.txt"):
        main(["score", str(tmp_path)])
    with pytest.raises(ConfigError, match="no such folder"):
        main(["score", str(tmp_path / "none")])


def test_names_whose_answers_would_be_another_models() -> None:
    assert check_model_name("gpt-4_turbo") == "gpt-4_turbo"
    for name in ("prompt", "retrieval", "my_retrieval", "my_cot_3.txt_retrieval"):
        with pytest.raises(ConfigError, match="could not be told from others"):
            check_model_name(name)
    for name in ("a/b", "", ".."):
        with pytest.raises(ConfigError, match="--name: .* cannot name a file"):
            check_model_name(name)


# ---- the trained transformer ----


@pytest.fixture
def trained(tiny, make_run) -> RunFolder:
    """A few steps on the small world, so that some queries are right and some are not."""
    folder = make_run(tiny.with_overrides({"task": SMALL, "budget.steps": 40, "optimizer.lr": 1e-2, "model.width": 32}))
    trainer = PackTrainer([folder])
    while not trainer.finished:
        trainer.advance()
    return folder


def test_a_run_is_asked_its_own_queries(trained: RunFolder, tmp_path: Path, capsys) -> None:
    prompts, output = tmp_path / "mine", str(tmp_path)
    assert main(["write", str(prompts), "--run", trained.run_id, "--output", output]) == 0
    assert json.loads((prompts / "queries.json").read_text())["run"] == trained.run_id
    put(prompts, "me", "prompt", "directna", ["older"] * 12)
    assert main(["score", str(prompts), "--run", trained.run_id, "--output", output]) == 0
    row = pd.read_csv(prompts / "scores.csv").set_index("context").loc["its weights"].iloc[0]
    assert row["model"] == f"run {trained.run_id}, step 40"
    measured = trained.journal()[-1]["metrics"]["eval/test_hard/accuracy"]
    assert row["correct"] == pytest.approx(measured) and row["wrong"] == pytest.approx(1 - measured)
    assert 0 < measured < 1
    assert "saved" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--run brings its own task; leave out --task"):
        main(["write", str(tmp_path / "new"), "--run", trained.run_id, "--output", output, *OPTIONS])


def test_a_run_on_other_data_is_refused(tiny, make_run, trained: RunFolder, folder: Path, tmp_path: Path) -> None:
    put(folder, "me", "prompt", "directna", ["older"])
    described = json.loads((folder / "queries.json").read_text())
    (folder / "queries.json").write_text(json.dumps({**described, "sha256": "other"}))
    with pytest.raises(ConfigError, match=rf"--run {trained.run_id}: was trained on other data .* write FOLDER --run"):
        score_report(folder, trained)
    (folder / "queries.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"queries\.json is damaged"):
        score_report(folder, trained)
    (folder / "queries.json").unlink()
    with pytest.raises(ConfigError, match=r"queries\.json: No such file"):
        score_report(folder, trained)
    other = make_run(tiny)
    with pytest.raises(ConfigError, match="its task is ModularArithmetic; ComplexReasoning is needed"):
        main(["write", str(tmp_path / "new"), "--run", other.run_id, "--output", str(tmp_path)])


# ---- the commands ----


class Parrot:
    """Says the question's second name and an answer; remembers how it was asked."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.batches: list[list[str]] = []

    def complete(self, prompts: Sequence[str]) -> list[str]:
        self.batches.append(list(prompts))
        return [f"Ünique {prompt.split('?')[0].split()[-1]}. Final answer: older" for prompt in prompts]


@pytest.fixture
def parrots(monkeypatch: pytest.MonkeyPatch) -> list[Parrot]:
    made: list[Parrot] = []

    def make(*arguments: object) -> Parrot:
        made.append(Parrot(*arguments))
        return made[-1]

    monkeypatch.setattr(in_context, "ServedModel", make)
    monkeypatch.setattr(in_context, "LocalModel", make)
    return made


def test_write_ask_and_score(tmp_path: Path, parrots: list[Parrot], capsys) -> None:
    prompts = tmp_path / "prompts"
    assert main(["write", str(prompts), *OPTIONS]) == 0
    assert "12 queries" in capsys.readouterr().out
    ask = ["ask", str(prompts), "--url", "http://localhost:1/v1", "--model", "lab/parrot:8b", "--batch-size", "5"]
    assert main([*ask, "--limit", "3", "--styles", "cot"]) == 0
    assert parrots[0].arguments == ("http://localhost:1/v1", "lab/parrot:8b", 1024, 600.0)
    assert [len(batch) for batch in parrots[0].batches] == [5, 1]  # 3 queries, 2 contexts
    first = sorted(path.name for path in prompts.glob("lab-parrot-8b_*"))
    assert len(first) == 6 and all("_cot_" in name for name in first)
    (prompts / first[0]).write_text("kept")
    assert main(ask) == 0
    assert sum(map(len, parrots[1].batches)) == 4 * 12 - 6
    assert (prompts / first[0]).read_text() == "kept"
    second_name = json.loads((prompts / "queries.json").read_text())["queries"][7]["names"][1]
    text = (prompts / "lab-parrot-8b_retrieval_directna_7.txt").read_text(encoding="utf-8")
    assert text == f"Ünique {second_name.split()[1]}. Final answer: older"
    assert main(ask) == 0 and len(parrots) == 2  # nothing left: no model is loaded
    assert main([*ask[:2], "--folder", str(tmp_path / "local"), "--limit", "1", "--max-tokens", "9"]) == 0
    assert parrots[2].arguments == (tmp_path / "local", 9)
    assert len(list(prompts.glob("local_*"))) == 4
    capsys.readouterr()
    assert main(["score", str(prompts), "--strict"]) == 0
    assert list(pd.read_csv(prompts / "scores_strict.csv")["answered"][:4]) == [12] * 4
    assert "lab-parrot" in capsys.readouterr().out


def test_a_limited_sample_is_random_and_grows(written: Path) -> None:
    def asked(limit: int | None) -> list[str]:
        pairs = in_context._unanswered(written, "me", ["prompt"], ["cot"], limit)
        return [re.findall(r"\d+", answer.name)[0] for _, answer in pairs]

    everything = asked(None)
    assert [asked(n) for n in (2, 5, 100)] == [everything[:2], everything[:5], everything]
    assert sorted(map(int, everything)) == list(range(12)) != list(map(int, everything))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["write", "{new}", "--task.num-entities", "1"], r"task\.num_entities: Input should be greater than 1, got 1"),
        (["write", "{new}", "--task.num-entitis", "9"], r"no field 'num_entitis'; did you mean 'num_entities'"),
        (["write", "{new}", *OPTIONS, "--attribute", "3"], "--attribute 3: the task has attributes 0 to 2"),
        (["write", "{new}", *OPTIONS, "--seed", "-1"], "--seed -1: must be at least 0"),
        (["write", "{new}", *OPTIONS, "--task.hard-per-label", "0"], "no hard queries"),
        (["write", "{old}"], "exists already; name a new folder"),
        (["write", "{new}", "--run", "3f2a", "--output", "{new}"], "no sweeps in"),
        (["ask", "{old}"], "name a model: --url and --model on a server, or --folder on disk"),
        (["ask", "{old}", "--url", "http://localhost/v1"], "name a model"),
        (["ask", "{old}", "--url", "http://localhost/v1", "--model", "m", "--folder", "f"], "name a model"),
        (["ask", "{old}", "--folder", "f", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["ask", "{old}", "--folder", "f"], r"prompt_directna_\d+\.txt: is missing"),
        (["ask", "{old}", "--folder", "retrieval"], "--name retrieval: its answers could not be told"),
        (["ask", "{new}", "--folder", "f"], "no such folder"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    places = {"new": str(tmp_path / "new"), "old": str(folder)}
    with pytest.raises(ConfigError, match=message) as caught:
        main([argument.format(**places) for argument in arguments])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_help_lists_all_options(capsys) -> None:
    for command, options in {
        "write": ["--run", "--task.num-entities", "--attribute"],
        "ask": ["--url", "--folder", "--limit"],
        "score": ["--run", "--strict"],
    }.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert all(option in text for option in options)
