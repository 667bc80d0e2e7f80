"""Training states that are not whole are passed over; Ray Train itself reads the records."""

import re
from pathlib import Path

import pytest

from groundswell.config import ConfigError
from groundswell.scaling import states
from groundswell.scaling.states import RECORD, States

WORKERS = 2


def write_state(run: Path, step: int, workers: int = WORKERS) -> Path:
    folder = run / "training" / f"step-{step:08d}"
    for rank in range(workers):
        part = run / "part"
        (part / "deep").mkdir(parents=True)
        (part / "deep" / f"tensors-{rank}.bin").write_bytes(b"x" * (100 + rank))
        states.list_files(part, rank, workers)
        for path in [p for p in part.rglob("*") if p.is_file()]:
            target = folder / path.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        (part / "deep").rmdir()
        part.rmdir()
    return folder


def recorded(run: Path) -> list[str]:
    """The states that Ray Train would know, oldest first, by its own reading of its record."""
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

    record = _CheckpointManagerState.model_validate_json((run / "training" / RECORD).read_text())
    names = [result.checkpoint_dir_name for result in record.checkpoint_results]
    assert len(record.checkpoint_report_indices) == len(names)
    assert (record.latest_checkpoint_result.checkpoint_dir_name if names else None) == (names[-1] if names else None)
    return names


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "training").glob("step-*"))


@pytest.fixture
def place(tmp_path):
    for step in (20, 40):
        write_state(tmp_path, step)
    place = States.local(tmp_path)
    place._write_record(["step-00000020", "step-00000040"])
    return place


def test_whole_states_are_left_alone(place, tmp_path):
    record = tmp_path / "training" / RECORD
    before = record.read_bytes()
    place.mend()
    assert record.read_bytes() == before
    assert place.newest() == "step-00000040" and folders(tmp_path) == ["step-00000020", "step-00000040"]


def shorten(state: Path):
    (state / "deep" / "tensors-1.bin").write_bytes(b"x" * 50)


def lose_a_file(state: Path):
    (state / "deep" / "tensors-0.bin").unlink()


def lose_a_part(state: Path):
    (state / "deep" / "tensors-1.bin").unlink()
    (state / "files-1-of-2.json").unlink()


def break_a_list(state: Path):
    (state / "files-0-of-2.json").write_bytes(b"")


@pytest.mark.parametrize(("hurt", "reason"), [
    (shorten, "deep/tensors-1.bin has 50 bytes, not 101"),
    (lose_a_file, "deep/tensors-0.bin has 0 bytes, not 100"),
    (lose_a_part, "it has the parts of 1 of 2 workers"),
    (break_a_list, "files-0-of-2.json"),
])  # fmt: skip
def test_the_state_before_a_damaged_one(place, tmp_path, caplog, hurt, reason):
    hurt(tmp_path / "training" / "step-00000040")
    place.mend()
    assert recorded(tmp_path) == folders(tmp_path) == ["step-00000020"]
    assert place.newest() == "step-00000020"
    assert reason in caplog.text and "falling back" in caplog.text


def test_no_whole_state_is_left(place, tmp_path):
    for step in (20, 40):
        shorten(tmp_path / "training" / f"step-{step:08d}")
    with pytest.raises(ConfigError, match=r"step-00000040 cannot be read .*50 bytes.*delete the run's folder training"):
        place.mend()
    assert len(folders(tmp_path)) == 2  # nothing is deleted


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"latest_checkpoint_result": {"checkpoint_dir_name": "../x"}}']
)
def test_a_damaged_record_is_made_again(place, tmp_path, content):
    (tmp_path / "training" / RECORD).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(RECORD)):
        place.newest()
    place.mend()
    assert recorded(tmp_path) == ["step-00000020", "step-00000040"]


def test_what_was_never_recorded_goes(place, tmp_path):
    """Half of a state of three workers would mix with the state of two that takes its name."""
    write_state(tmp_path, 60, workers=3)
    place.mend()
    assert folders(tmp_path) == ["step-00000020", "step-00000040"]


def test_nothing_to_mend(tmp_path):
    place = States.local(tmp_path)
    place.mend()
    assert place.newest() is None and list(tmp_path.iterdir()) == []


def test_a_converted_state_has_no_lists(place, tmp_path):
    for path in (tmp_path / "training" / "step-00000040").glob(states.LISTS):
        path.unlink()
    assert place.fault("step-00000040") is None
    assert place.fault("step-00000099") == "no files"
