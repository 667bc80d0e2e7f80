"""Grids of operand lengths: cells in batches equal single problems, nothing is computed twice, regions and files."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.arithmetic_grid import LengthGrid, as_array, read_cells, region_means
from analysis.arithmetic_grid_cells import (
    METRICS,
    STRETCH,
    batches,
    decode_rows,
    evaluate_cells,
    first_choices,
    grade,
    join_splits,
)
from analysis.arithmetic_grid_files import (
    original_grid_files,
    original_length_file,
    original_sorting_files,
    read_grid_folder,
    read_length_file,
    read_sorting_folder,
    shell_cells,
)
from groundswell import Budget, Checkpointing, ConfigError, Evaluation, Every, Experiment, commands
from groundswell.probes import (
    answers,
    answers_over_time,
    ask,
    look_over_time,
    open_checkpoint,
    parts_left,
    run_probes,
    scalars,
)
from groundswell.protocols import IGNORE, Model, Split
from groundswell.training.trainer import PackTrainer
from models.decoder import Decoder
from models.objectives import AnswerLoss
from models.recurrent import RecurrentDecoder
from tasks.arithmetic import Arithmetic
from tasks.arithmetic_grading import exact, exact_without_end
from tasks.arithmetic_vocabulary import EOS
from tasks.positional_or import PositionalOr
from tasks.sorting import Sorting

GOLDEN = Path(__file__).parents[1] / "golden" / "arithmetic" / "grading.json"
TINY = {"num_layers": 1, "num_recurrences": 2, "width": 16, "num_heads": 2, "abacus_max_offset": 8}
TASKS = {
    "addition": Arithmetic(max_first=3, max_second=3),
    "subtraction": Arithmetic(operation="subtraction", max_first=3, max_second=3),
    "multiplication": Arithmetic(operation="multiplication", max_first=3, max_second=3),
    "sorting": Sorting(max_digits=3, max_numbers=3),
    "or": PositionalOr(max_first=3, max_second=3, test_fraction=0.2),
}


def draw(model, task, seed=0, end=0.0):
    """Initial weights; `end`: how much likelier EOS is than others."""
    torch.manual_seed(seed)
    parameters = {}
    for spec in model.parameters(task.vocab_size, task.max_length):
        values = torch.full((1, *spec.shape), spec.init_value)
        parameters[spec.name] = values if spec.init_std is None else torch.randn(1, *spec.shape)
    if end:
        parameters["decoder.bias"][0, EOS] = end
    return parameters


@pytest.fixture(scope="module", params=list(TASKS))
def answered(request):
    """A random network and problems, the answers to which are what it says, until its first EOS; of every third row
    one token is another one."""
    task = TASKS[request.param]
    model = RecurrentDecoder(**TINY, biases=True)
    parameters = draw(model, task, end=30.0 if request.param == "sorting" else 8.0)
    splits, whole = {}, {}
    for cell in [(1, 1), (2, 5), (3, 2), (6, 4)]:
        split = task.cell(*cell, 12, 0)
        count = split.targets.shape[1] + 3
        tokens, targets, lengths = [], [], []
        for row in range(len(split)):
            prompt = split.tokens[row, : split.positions[row, 0] + 1]
            said = Model.generate(model, parameters, prompt[None, None], count)[0, 0].tolist()
            said = [*said[: said.index(EOS)], EOS] if EOS in said else [*said[:-1], EOS]
            if row % 3 == 2:
                said[len(said) // 2 - 1 if len(said) > 1 else 0] = 7
            tokens.append([*prompt.tolist(), *said[:-1]])
            targets.append(said)
            lengths.append(len(prompt))
        splits[cell] = rectangle(tokens, targets, lengths)
        whole[cell] = (tokens, targets, lengths)
    return model, parameters, splits


def rectangle(tokens, targets, lengths):
    longest, most = max(map(len, tokens)), max(map(len, targets))
    places = [[min(length - 1 + n, longest - 1) for n in range(most)] for length in lengths]
    return Split(
        torch.tensor([row + [0] * (longest - len(row)) for row in tokens]),
        torch.tensor(places),
        torch.tensor([row + [IGNORE] * (most - len(row)) for row in targets]),
    )


@pytest.mark.parametrize("batch_tokens", [1, 300, 10**6])
def test_one_pass_in_batches_says_what_decoding_says(answered, batch_tokens):
    """Of each row: with the original's way, all tokens again for each new one, row by row."""
    model, parameters, splits = answered
    found = evaluate_cells(model, parameters, splits, batch_tokens)
    verdicts = []
    for cell, split in splits.items():
        count = split.targets.shape[1]
        for row in range(len(split)):
            prompt = split.tokens[row, : split.positions[row, 0] + 1]
            said = Model.generate(model, parameters, prompt[None, None], count)[0]
            gold = split.targets[row : row + 1]
            assert bool(found[cell]["accuracy"][row]) == bool(exact(said, gold))
            assert bool(found[cell]["accuracy_without_end"][row]) == bool(exact_without_end(said, gold))
            assert bool(found[cell]["first_accuracy"][row]) == bool(said[0, 0] == gold[0, 0])
            verdicts.append(bool(found[cell]["accuracy"][row]))
    assert 0.1 < np.mean(verdicts) < 0.9  # both verdicts are there


def test_wrong_rows_are_decoded(answered):
    model, parameters, splits = answered
    split = splits[6, 4]
    rows = [0, 1, 3]
    count = split.targets.shape[1]
    for row, output in zip(rows, decode_rows(model, parameters, split, rows), strict=True):
        prompt = split.tokens[row, : split.positions[row, 0] + 1]
        said = Model.generate(model, parameters, prompt[None, None], count)[0, 0].tolist()
        assert output == (said[: said.index(EOS) + 1] if EOS in said else said)


def test_metrics_of_a_row():
    targets = torch.tensor([[4, 5, 6, EOS], [4, 5, EOS, IGNORE]])
    split = Split(torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long), targets)
    for choices, expected in [
        ([[4, 5, 6, EOS], [4, 5, EOS, 9]], [(1, 1, 1, 1)] * 2),  # what comes after EOS does not count
        ([[4, 5, 6, 9], [4, 5, 9, EOS]], [(0, 1, 1, 1)] * 2),  # no EOS at its place
        ([[4, 9, 6, EOS], [9, 5, EOS, 0]], [(0, 0, 2 / 3, 1), (0, 0, 1 / 2, 0)]),
        ([[4, EOS, 6, EOS], [EOS] * 4], [(0, 0, 2 / 3, 1), (0, 0, 0, 0)]),  # ends too early
    ]:
        found = grade(torch.tensor(choices), split.targets)
        for row, values in enumerate(expected):
            assert [float(found[name][row]) for name in METRICS] == pytest.approx(values)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=30), st.integers(1, 400))
def test_batches_are_bounded_and_have_each_cell_once(shapes, batch_tokens):
    splits = {}
    for number, (rows, length) in enumerate(shapes):
        empty = torch.zeros(rows, length, dtype=torch.long)
        splits[number, 0] = Split(empty, empty[:, :1], empty[:, :1])
    found = list(batches(splits, batch_tokens))
    assert sorted(cell for batch in found for cell in batch) == sorted(splits)
    for batch in found:
        lengths = [splits[cell].tokens.shape[1] for cell in batch]
        assert max(lengths) <= STRETCH * min(lengths)
        assert len(batch) == 1 or sum(len(splits[cell]) for cell in batch) * max(lengths) <= batch_tokens


def test_padding_changes_nothing(answered):
    model, parameters, splits = answered
    joined = join_splits(list(splits.values()))
    together = first_choices(model, parameters, joined, 10**6)
    start = 0
    for split in splits.values():
        alone = first_choices(model, parameters, split, 10**6)
        counted = split.targets != IGNORE
        mine = together[start : start + len(split), : alone.shape[1]]
        assert torch.equal(alone[counted], mine[counted])
        start += len(split)


# ---- parts ----


@pytest.fixture
def experiment():
    return Experiment(
        task=Arithmetic(max_first=2, max_second=2, num_examples=512, num_test=8),
        model=RecurrentDecoder(**TINY),
        objective=AnswerLoss(),
        budget=Budget(steps=4, batch_size=8),
        metrics_every=2,
        evaluation=Evaluation(schedule=Every(every=4)),
        checkpointing=Checkpointing(schedule=Every(every=2)),
    )


def write_cells(folder, cells, value=0.5):
    folder.mkdir(parents=True)
    rows = [{"first": a, "second": b, "samples": 4} | dict.fromkeys(METRICS, value) for a, b in cells]
    pd.DataFrame(rows).to_csv(folder / "cells.csv", index=False)
    return folder


def test_parts_have_each_cell_once(experiment):
    grid = LengthGrid(max_first=40, max_second=30, equal_lengths=(35, 60))
    parts = grid.parts(experiment, [])
    cells = [cell for part in parts for cell in part.items]
    assert len(cells) == len(set(cells)) == 40 * 30 + 26
    assert len({part.name for part in parts}) == len(parts) > 10
    for part in parts:
        lengths = [sum(experiment.task.cell_shape(*cell)) - 1 for cell in part.items]
        assert 100 * sum(lengths) <= 2**18
        assert part.cost > 0
    one = {cell: part.name for part in grid.parts(experiment, []) for cell in part.items}
    assert one == {cell: part.name for part in parts for cell in part.items}  # the same names each time


def test_a_grown_grid_asks_for_the_new_cells_only(experiment, tmp_path):
    small, large = LengthGrid(max_first=3), LengthGrid(max_first=5, max_second=4, grading="without_end")
    assert small.part_question() == large.part_question()
    stored = [write_cells(tmp_path / "part", small.cells())]
    assert small.parts(experiment, stored) == []
    new = {cell for part in large.parts(experiment, stored) for cell in part.items}
    assert new == set(large.cells()) - set(small.cells())
    for change in ({"samples": 50}, {"seed": 1}, {"max_recurrences": 3}, {"outputs": True}):
        assert small.with_overrides(change).part_question() != small.part_question()


def test_regions(experiment, tmp_path):
    grid = LengthGrid(max_first=3, equal_lengths=(100, 102))
    inside = [(a, b) for a, b in grid.cells() if max(a, b) <= 2]
    outside = [(a, b) for a, b in grid.cells() if 2 < max(a, b) <= 100]
    stored = [
        write_cells(tmp_path / "a", inside, 1.0),
        write_cells(tmp_path / "b", [*outside, (9, 9)], 0.25),  # (9, 9) is of another grid
        write_cells(tmp_path / "c", [(101, 101), (102, 102)], 0.125),
    ]
    found = grid.join(experiment, stored)
    means = {"in_distribution": 1.0, "out_of_distribution": 0.25, "over_100": 0.125}
    for region, value in means.items():
        for metric in ("accuracy", "token_accuracy", "first_accuracy"):
            assert found.scalars[f"grid/{region}/{metric}"] == value
    assert len(found.scalars) == 9
    assert found.arrays["accuracy"].shape == (102, 102)
    assert np.isnan(found.arrays["accuracy"]).sum() == 102**2 - 12
    assert found.arrays["accuracy"][0, 2] == 0.25 and found.arrays["trained"].tolist() == [2, 2]
    assert len(found.tables["cells"]) == 12


def test_the_grading_decides_the_mean():
    arrays = {name: np.array([[value]]) for name, value in zip(METRICS, (0.1, 0.2, 0.3, 0.4), strict=True)}
    assert region_means(arrays, (1, 1), "accuracy") == {
        "grid/in_distribution/accuracy": 0.1,
        "grid/in_distribution/token_accuracy": 0.3,
        "grid/in_distribution/first_accuracy": 0.4,
    }
    assert region_means(arrays, (1, 1), "accuracy_without_end")["grid/in_distribution/accuracy"] == 0.2


def test_first_is_the_row():
    array = as_array({(1, 3): 0.5, (2, 1): 0.25})
    assert array.shape == (2, 3) and array[0, 2] == 0.5 and array[1, 0] == 0.25
    assert np.isnan(array[0, 0])


# ---- on a run ----


@pytest.fixture
def run(experiment, make_run):
    folder = make_run(experiment)
    trainer = PackTrainer([folder])
    while not trainer.finished:
        trainer.advance()
    return folder


def test_a_run_is_asked_in_parts(run, monkeypatch):
    """What is there when the process dies is not computed again; a larger grid keeps its cells."""
    monkeypatch.setattr("analysis.arithmetic_grid.PART_TOKENS", 200)
    asked, run_part = [], LengthGrid.run_part

    def dies(self, opened, part):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(part.items)
        return run_part(self, opened, part)

    grid = LengthGrid(max_first=3, samples=10)
    total = len(parts_left(run, 4, grid))
    assert total > 3
    monkeypatch.setattr(LengthGrid, "run_part", dies)
    with pytest.raises(KeyboardInterrupt):
        ask(run, 4, [grid])
    assert len(parts_left(run, 4, grid)) == total - 2 and not answers(run)
    monkeypatch.setattr(LengthGrid, "run_part", run_part)
    (path,) = run_probes(run, [grid])
    found = read_cells([path])
    assert set(found) == set(grid.cells())
    assert all(values["samples"] == 10 for values in found.values())
    assert (path / "grid.png").exists() and np.load(path / "accuracy.npy").shape == (3, 3)
    before = {part: part.stat().st_mtime_ns for part in run.path.glob("probes/parts/*/*/*/cells.csv")}
    run_probes(run, [grid.with_overrides({"max_first": 4, "max_second": 4})])
    parts = sorted(run.path.glob("probes/parts/*/*/*"))
    cells = [cell for part in parts for cell in read_cells([part])]
    assert len(cells) == len(set(cells)) == 16  # none twice
    assert all(part.stat().st_mtime_ns == time for part, time in before.items())


def test_the_answer_is_that_of_single_cells(run):
    """Equal to each cell alone, by its task and its network; wrong answers are what the network says."""
    grid = LengthGrid(max_first=3, max_second=2, samples=6, outputs=True, seed=3)
    (path,) = run_probes(run, [grid], step=2)
    opened = open_checkpoint(run, 2)
    task, model = opened.experiment.task, opened.experiment.model
    symbols = task.characters.tokens
    wrong = pd.read_csv(path / "wrong_answers.csv", dtype=str, keep_default_na=False)
    found = read_cells([path])
    for (first, second), values in found.items():
        split = task.cell(first, second, 6, 3)
        prompts = split.tokens[:, : first + second + 2]
        said = Model.generate(model, opened.parameters, prompts[None], split.targets.shape[1])[0]
        right = exact(said, split.targets)
        assert values["accuracy"] == pytest.approx(float(right.double().mean()))
        mine = wrong[(wrong["first"] == str(first)) & (wrong["second"] == str(second))]
        assert len(mine) == int((~right).sum())
        for row in mine.to_dict("records"):
            a, b = row["prompt"].removesuffix("=").split("+")
            total = str(int(a[::-1]) + int(b[::-1]))[::-1]
            assert row["answer"] == total + "[EOS]" != row["output"]
            text = "".join(symbols[token] for token in said[int(row["row"])].tolist())
            assert text.startswith(row["output"])
    assert len(wrong) > 0
    assert scalars(path)["grid/in_distribution/accuracy"] == pytest.approx(
        np.mean([values["accuracy"] for cell, values in found.items() if max(cell) <= 2])
    )


def test_more_recurrences_change_the_answer(run):
    (path,) = run_probes(run, [LengthGrid(max_first=2, samples=20)])
    few = np.load(path / "token_accuracy.npy")
    (path,) = run_probes(run, [LengthGrid(max_first=2, samples=20, max_recurrences=7)])
    assert not np.array_equal(few, np.load(path / "token_accuracy.npy"))


def test_questions_that_cannot_be_asked(tiny, experiment):
    assert "no problems of given lengths" in LengthGrid().objection(tiny)
    assert LengthGrid().objection(experiment) is None
    plain = experiment.model_copy(update={"model": Decoder(width=16, num_heads=2)})
    assert "not looped" in LengthGrid(max_recurrences=3).objection(plain)
    for fields, message in [
        ({"max_first": 0}, "max_first: 0 leaves no cell; give equal_lengths too"),
        ({"equal_lengths": (5, 4)}, "equal_lengths: 5 4: give the shortest and the longest"),
        ({"samples": 0}, "samples"),
    ]:
        with pytest.raises(ConfigError, match=message):
            LengthGrid.from_dict(fields)


def test_the_command(run, experiment, tmp_path, capsys, monkeypatch):
    """`groundswell grid`, which finds that all has been answered."""
    grid = LengthGrid(max_first=2, equal_lengths=(3, 4), samples=5)
    run_probes(run, [grid], step=2)
    run_probes(run, [grid], step=4)
    assert look_over_time(run, grid)
    assert (answers_over_time(run)["length_grid"] / "regions.png").exists()
    monkeypatch.setattr("groundswell.probing.AnswerTracking.close", lambda self: None)
    options = ["--sweep", "sweep", "--output", str(tmp_path), "--steps", "last"]
    code = commands.main(["grid", *options, "--max-first", "2", "--equal-lengths", "3", "4", "--samples", "5"])
    printed = capsys.readouterr()
    assert code == 0, printed
    assert "1 checkpoints of 1 runs: nothing was left to ask" in printed.out
    assert "grid/*/accuracy" in printed.out and "out_of_distribution" in printed.out


# ---- the original's files ----


def test_shells_have_the_published_cells():
    published = json.loads(GOLDEN.read_text())["eval_grid"]
    seen = set()
    for shell in range(1, 11):
        for parity in ("even", "odd"):
            cells, theirs = shell_cells(shell, parity), published[f"step{shell}_{parity}"]
            assert len(cells) == theirs["n_cells"]
            assert [list(cells[0]), list(cells[-1])] == [theirs["first"], theirs["last"]]
            assert not seen & set(cells)
            seen |= set(cells)
    assert len(seen) == 10_000
    large = {(a, b) for a in range(1, 31) for b in range(1, 31)} - {(a, b) for a in range(1, 24) for b in range(1, 24)}
    assert len(large) == published["ood_only"]["n_cells"]


def test_grids_are_written_and_read_in_the_published_form(tmp_path):
    grid = np.random.default_rng(0).random((100, 100)).round(2)
    files = original_grid_files(grid)
    assert len(files) == 20
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert np.array_equal(read_grid_folder(tmp_path), grid)
    whole, first, second = json.loads(files["accs_grid_quick_big_eval_2_odd.json"])
    assert (first, second) == (58, 57) and np.shape(whole) == (100, 100)
    assert whole[45][45] == whole[0][0] == whole[57][57] == 0 and whole[57][56] == grid[57, 56]
    assert list(original_grid_files(grid[:60, :60])) == [f"accs_grid_quick_big_eval_{s}_{p}.json" for s in (1, 2)
                                                         for p in ("even", "odd")]  # fmt: skip
    cut = [whole, 10, 47]  # a job that was stopped there
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / "accs_grid_quick_big_eval_2_odd.json").write_text(json.dumps(cut))
    read = read_grid_folder(tmp_path)
    assert read[9, 46] == grid[9, 46] and np.isnan(read[9, 48]) and np.isnan(read[57, 56])
    (tmp_path / "accs_grid_quick_big_eval_3_odd.json").write_text("[[1]]")
    with pytest.raises(ValueError, match="accs_grid_quick_big_eval_3_odd"):
        read_grid_folder(tmp_path)


def test_long_sums_and_sorting_in_the_published_form(tmp_path):
    grid = np.full((103, 103), np.nan)
    np.fill_diagonal(grid, 0.5)
    grid[102, 102] = 0.75
    for name, text in original_length_file(grid, (101, 103)).items():
        (tmp_path / name).write_text(text)
    assert read_length_file(tmp_path / "over_100_1.json") == {101: 0.5, 102: 0.5, 103: 0.75}
    exact_grid, first = np.array([[0.25, np.nan]]), np.array([[0.5, 0.125]])
    files = original_sorting_files(exact_grid, first)
    assert files == {"acc_for_1_1.txt": "25.0", "top_1_acc_for_1_1.txt": "50.0", "top_1_acc_for_1_2.txt": "12.5"}
    folder = tmp_path / "sorting"
    folder.mkdir()
    with pytest.raises(ValueError, match="no acc_for"):
        read_sorting_folder(folder)
    for name, text in files.items():
        (folder / name).write_text(text)
    read_exact, read_first = read_sorting_folder(folder)
    assert np.array_equal(read_exact, exact_grid, equal_nan=True) and np.array_equal(read_first, first)


def test_a_probe_writes_them(experiment, tmp_path):
    grid = LengthGrid(max_first=46, equal_lengths=(101, 102), original_files=True)
    texts = grid.join(experiment, [write_cells(tmp_path / "a", grid.cells())]).texts
    assert set(texts) == {
        "accs_grid_quick_big_eval_1_even.json", "accs_grid_quick_big_eval_1_odd.json", "over_100_1.json"
    }  # fmt: skip
    grid = LengthGrid(max_first=2, max_second=3, grading="without_end", original_files=True)
    found = grid.join(experiment, [write_cells(tmp_path / "b", grid.cells())])
    assert len(found.texts) == 12 and found.texts["acc_for_2_3.txt"] == "50.0"
    assert set(found.figures) == {"grid", "pair"}
