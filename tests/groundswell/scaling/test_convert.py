"""DeepSpeed's states made readable for any number of workers."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from groundswell import commands
from groundswell.config import ConfigError
from groundswell.rundir import RunFolder, SweepFolder
from groundswell.scaling import portable, zero_states
from groundswell.scaling.portable import Pieces
from groundswell.sweep import PlannedRun
from tests.groundswell.scaling.test_resume import GROUPS, ZERO, assert_equal_runs, curves
from tests.groundswell.scaling.workers import run_workers, states

# ---- going on ----


def convert(folder):
    assert commands.main(["convert", str(folder.path)]) == 0


def copy_of(folder, name):
    path = folder.path.parents[2] / name / "runs" / folder.run_id
    shutil.copytree(folder.path, path)
    return RunFolder(path)


def assert_near(one, other):
    """Losses, norms and evaluations of every step."""
    assert one.status().state == other.status().state == "finished"
    for (step, mine), (other_step, others) in zip(curves(one), curves(other), strict=True):
        assert step == other_step
        assert mine == pytest.approx(others, abs=1e-5, rel=1e-5), step


def settings(stage):
    return ZERO[f"zero_{stage}"] | GROUPS | {"scaling.num_workers": 2, "metrics_every": 1}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """experiment -> its run by two workers from beginning to end, trained once."""
    known = {}

    def make(experiment):
        if experiment.run_id not in known:
            planned = PlannedRun(experiment, {}, "run")
            known[experiment.run_id] = SweepFolder(tmp_path_factory.mktemp("whole")).create_run(planned, "pack", 0)
            run_workers(known[experiment.run_id], 2)
        return known[experiment.run_id]

    return make


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_converted_run_goes_on_with_any_number_of_workers(tiny, make_run, undisturbed, stage):
    experiment = tiny.with_overrides(settings(stage))
    whole, cut = undisturbed(experiment), make_run(experiment, "cut")
    run_workers(cut, 2, stop_after=40)
    exported = load_file(cut.checkpoint_folder(40) / "model.safetensors")
    convert(cut)
    assert sorted(path.name for path in states(cut)[-1].iterdir()) == ["portable", "run_state.safetensors"]
    (file,) = (states(cut)[-1] / "portable").iterdir()
    saved = load_file(file)
    assert saved["optimizer_step"] == 40
    assert all(torch.equal(saved[f"weights/{name}"], tensor) for name, tensor in exported.items())
    assert {name for name in exported if f"exp_avg/{name}" not in saved} == {"transformer.wpe.weight"}  # the frozen one
    alone = copy_of(cut, "alone")
    run_workers(alone, 1)
    assert_near(alone, whole)
    run_workers(cut, 2)
    assert_equal_runs(cut, whole)  # bit for bit: with as many workers nothing has changed


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_the_number_of_workers_changes_twice(tiny, make_run, undisturbed, stage):
    """Three workers do not share the tensors evenly: parts are padded."""
    experiment = tiny.with_overrides(settings(stage))
    whole, cut = undisturbed(experiment), make_run(experiment, "cut")
    run_workers(cut, 2, stop_after=20)
    convert(cut)
    run_workers(cut, 3, stop_after=40)
    convert(cut)
    run_workers(cut, 1)
    assert_near(cut, whole)


@pytest.mark.slow
def test_a_state_in_shared_storage(tiny, make_run, tmp_path):
    """The same files as of a conversion on disk, and nothing else."""
    here = make_run(tiny.with_overrides(settings(2)), "here")
    run_workers(here, 2, stop_after=40)
    there = tmp_path / "storage" / "here" / "runs" / here.run_id
    there.mkdir(parents=True)
    shutil.copytree(here.path / "training", there / "training")
    convert(here)
    shutil.rmtree(here.path / "training" / "step-00000020")
    wanted = {path.relative_to(here.path): path.read_bytes() for path in states(here)[-1].rglob("*") if path.is_file()}
    shutil.rmtree(here.path / "training")
    uri = (tmp_path / "storage").as_uri()
    for _ in range(2):  # the second time there is nothing left to do
        assert commands.main(["convert", str(here.path), "--storage", uri]) == 0
        newest = there / "training" / "step-00000040"
        assert {path.relative_to(there): path.read_bytes() for path in newest.rglob("*") if path.is_file()} == wanted
    assert not (here.path / "training").exists()


# ---- the format ----


@given(sizes=st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=6), num_workers=st.integers(1, 7))
def test_padded_parts_make_whole_tensors(sizes, num_workers):
    """A state of stage 3 with any shapes, cut as DeepSpeed cuts it (runtime/zero/partition_parameters.py)."""
    shapes = {f"network.t{number}": torch.Size(size) for number, size in enumerate(sizes)}
    wholes = {name: torch.randn(shape) for name, shape in shapes.items()}
    parts: list[list[torch.Tensor]] = [[] for _ in range(num_workers)]
    for whole in wholes.values():
        each = -(-whole.numel() // num_workers)
        padded = torch.cat([whole.flatten(), torch.full((each * num_workers - whole.numel(),), torch.nan)])
        for part, piece in zip(parts, padded.split(each), strict=True):
            part.append(piece)
    flats = [torch.cat(part) for part in parts]
    optimizers = [
        {
            "fp32_flat_groups": [flat],
            "optimizer_state_dict": {"state": {0: {"step": 3, "exp_avg": -flat, "exp_avg_sq": flat**2}}},
        }
        for flat in flats
    ]
    models = [{"param_shapes": [shapes], "frozen_param_shapes": None}] * num_workers
    tensors = zero_states._stage_3(optimizers, models)
    assert len(tensors) == 3 * len(wholes)
    for name, whole in wholes.items():
        plain = name.removeprefix("network.")
        assert torch.equal(tensors[f"weights/{plain}"].whole(), whole)
        assert torch.equal(tensors[f"exp_avg/{plain}"].whole(), -whole)
        assert torch.equal(tensors[f"exp_avg_sq/{plain}"].whole(), whole**2)


@pytest.mark.parametrize(("file_bytes", "num_files"), [(2**20, 1), (64, 3), (1, 5)])
def test_large_states_are_several_files(tmp_path, file_bytes, num_files):
    wholes = {f"weights/{number}": torch.randn(2, number + 3) for number in range(4)}
    pieces = {name: Pieces(tuple(x.shape), x.flatten().split(5)) for name, x in wholes.items()}
    portable.write(tmp_path, pieces, 7, file_bytes)
    assert len(list((tmp_path / "portable").iterdir())) == num_files
    with portable.Reader(tmp_path) as reader:
        assert reader.optimizer_step() == 7
        assert all(torch.equal(reader.read(name, x.shape), x) for name, x in wholes.items())
        with pytest.raises(ConfigError, match=r"weights/9 is missing.*delete"):
            reader.read("weights/9", (2,))
        with pytest.raises(ConfigError, match=r"weights/0 is \(2, 3\), not \(3, 2\)"):
            reader.read("weights/0", (3, 2))


# ---- mistakes ----


@pytest.fixture
def saved(tiny, make_run):
    """A run with a state, whose DeepSpeed part is empty."""
    folder = make_run(tiny.with_overrides(settings(2)))
    state = folder.path / "training" / "step-00000040"
    (state / "state").mkdir(parents=True)
    save_file({"world_size": torch.tensor(2)}, state / "run_state.safetensors")
    return folder


def says(capsys, folder, *words):
    """One line, and exit code 2."""
    assert commands.main(["convert", folder.run_id, "--output", str(folder.path.parents[2])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


def test_a_run_of_another_strategy(tiny, make_run, capsys):
    folder = make_run(tiny.with_overrides({"scaling.strategy": "fsdp", "scaling.num_workers": 2}))
    says(capsys, folder, "has no DeepSpeed state: its scaling.strategy is fsdp", "no conversion")


def test_a_run_without_a_state(tiny, make_run, capsys):
    says(capsys, make_run(tiny.with_overrides(settings(2))), "no training state in")


def test_an_unknown_run(saved, capsys):
    assert commands.main(["convert", "zzz", "--output", str(saved.path.parents[2])]) == 2
    assert "no run 'zzz'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["training.lock", "workers.lock"])
def test_a_run_that_is_being_trained(saved, capsys, name):
    with FileLock(saved.path / name):
        says(capsys, saved, "is being trained", "Ctrl-C")


def test_a_worker_s_file_is_missing(saved, capsys):
    (saved.path / "training" / "step-00000040" / "state" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").touch()
    says(capsys, saved, "2 workers have saved it, and 1 files of optim states are there", "delete")


class Trap:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def damage(kind, path):
    content = {"optimizer_state_dict": Trap(path.parent / "sprung") if kind == "trap" else {"zero_stage": 2}}
    torch.save(content, path)
    if kind == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    if kind == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize("kind", ["torn", "empty", "foreign", "trap"])
def test_a_damaged_file(saved, capsys, kind):
    """Nothing that a file asks for is called, and the state stays as it is."""
    state = saved.path / "training" / "step-00000040"
    for rank in range(2):
        damage(kind, state / "state" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    save = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    says(capsys, saved, "cannot be read", "the state is damaged")
    assert {path: path.read_bytes() for path in state.rglob("*") if path.is_file()} == save
    assert not (state / "state" / "sprung").exists()


def test_a_damaged_description(saved, capsys):
    (saved.path / "training" / "step-00000040" / "run_state.safetensors").write_bytes(b"half")
    says(capsys, saved, "run_state.safetensors cannot be read")


def test_a_damaged_record_of_ray_train(saved, capsys):
    record = saved.path / "training" / "checkpoint_manager_snapshot.json"
    for content in (b"{", b"[]", b'{"latest_checkpoint_result": {"checkpoint_dir_name": "../../x"}}'):
        record.write_bytes(content)
        assert commands.main(["convert", str(saved.path)]) == 2
        assert str(record) in capsys.readouterr().err


# ---- which state, and in which order ----


def test_the_state_that_ray_train_has_recorded_counts(saved, capsys):
    """A newer folder beside it may be half written."""
    newer = saved.path / "training" / "step-00000060"
    newer.mkdir()
    record = {"latest_checkpoint_result": {"checkpoint_dir_name": "step-00000040"}}
    (saved.path / "training" / "checkpoint_manager_snapshot.json").write_text(json.dumps(record))
    says(capsys, saved, "step-00000040")


def test_an_interrupted_conversion_is_finished(saved, capsys):
    state = saved.path / "training" / "step-00000040"
    portable.write(state, {"weights/a": Pieces((2,), [torch.ones(2)])}, 40)
    (state / "zero_to_fp32.py").touch()
    for _ in range(2):  # the second time there is nothing left to do
        convert(saved)
        assert sorted(path.name for path in state.iterdir()) == ["portable", "run_state.safetensors"]
    assert "converted already" in capsys.readouterr().out


def test_a_full_disk_leaves_the_state(saved, monkeypatch):
    state = saved.path / "training" / "step-00000040"

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(portable, "save_file", full)
    with pytest.raises(ConfigError, match=r"cannot write 0 MiB \(.*No space.*make room"):
        portable.write(state, {"weights/a": Pieces((2,), [torch.ones(2)])}, 40)
    assert sorted(path.name for path in Path(state).iterdir()) == ["run_state.safetensors", "state"]
