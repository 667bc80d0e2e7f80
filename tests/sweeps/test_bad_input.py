"""What a user may get wrong on the command line of the real sweep file: one clear line, exit code 2, nothing made."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path):
    """Run a sweep file as a user does, in an empty folder."""

    def run(*arguments, sweep="grok_wd_layers.py", **environment):
        return subprocess.run(
            [sys.executable, str(ROOT / "sweeps" / sweep), *arguments],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def slow(*case):
    """Each of these commands takes seconds to start; the first of every kind is enough for `make test`."""
    return pytest.param(*case, marks=pytest.mark.slow)


def assert_one_line(result, message):
    assert (result.returncode, result.stdout) == (2, ""), result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--optimizer.weight-decey", "0.1"),
            "optimizer.weight_decey: 'optimizer' has no field 'weight_decey'; did you",
        ),
        slow(("--axis", "model.num_layers=2,-1"), "model.num_layers: Input should be greater than 0, got -1"),
        slow(("--task.phi", "1000"), "task.phi"),
        slow(("--model.num-heads", "5"), "model.num_heads: 5 does not divide width 64"),
    ],
)
def test_impossible_experiment(command, tmp_path, arguments, message):
    assert_one_line(command(*arguments), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--axis", "task=reverse", "--task.entity-vocab-size", "6"), "task.entity_vocab_size: 6 gives alphabets of 1"),
        slow(
            ("--axis", "task=chain", "--task.num-triples", "99"),
            "task.num_triples: 99 is out of range; word_size 1",
        ),
        slow(
            ("--model.position-encoding", "rotary", "--model.num-heads", "4"),
            "model.num_heads: 4 gives heads of 16 dimensions, rotary turns 32; at width 64 use 1 to 2 heads",
        ),
        slow(("--axis", "task=reversed"), "--axis task: no such value 'reversed'; did you mean 'reverse'?"),
        slow(("--task.word-size", "2"), "task.word_size: no such field"),  # of two of the four tasks
    ],
)
def test_impossible_facts(command, tmp_path, arguments, message):
    assert_one_line(command(*arguments, sweep="reversal_curse.py"), message)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_data_folder(command, tmp_path):
    folder_task = ("--task.class", "tasks.folder.Folder")
    assert_one_line(command(*folder_task), "task.path: is required")
    result = command(*folder_task, "--task.path", "nowhere")
    assert_one_line(result, "nowhere/vocab.json: No such file or directory; task.path must be a folder with train.json")
    (tmp_path / "empty").mkdir()
    assert_one_line(command(*folder_task, "--task.path", "empty"), "task.path must be a folder with train.json")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_unwritable_output(command, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line(command("--output", "file/results"), "output: cannot write to 'file/results'")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_cluster_at_the_address(command, tmp_path):
    """Nobody listens there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    result = command("--preset", "smoke", "--address", address)
    assert time.monotonic() - start < 40
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert f"error: no Ray cluster answers at {address}" in result.stderr


@pytest.mark.slow
def test_something_else_at_the_address(command):
    """Somebody listens, but it is no Ray."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        start = time.monotonic()
        result = command("--preset", "smoke", "--address", address)
        assert time.monotonic() - start < 90
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert f"error: no Ray cluster answers at {address}" in result.stderr
