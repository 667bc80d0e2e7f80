import os
import subprocess
import sys

import pytest

from groundswell.config import ConfigError
from groundswell.files import atomic_folder, atomic_write, check_name, ensure_writable


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\\b", "a\0b", "a\nb", " a", "x" * 201, "a:b"])
def test_names_that_cannot_be_a_path_component_are_refused(name):
    with pytest.raises(ConfigError, match="sweep name"):
        check_name(name, "sweep name")


def test_ordinary_names_pass():
    assert check_name("grok_wd_layers-demo.v2") == "grok_wd_layers-demo.v2"


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    atomic_write(tmp_path / "new" / "a.txt", "one")
    atomic_write(tmp_path / "new" / "a.txt", b"two")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"two"
    assert os.listdir(tmp_path / "new") == ["a.txt"]


def test_failed_atomic_write_keeps_the_old_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        atomic_write(tmp_path / "folder", "cannot replace a folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_atomic_folder_appears_only_when_whole(tmp_path):
    target = tmp_path / "step-1"
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("w")
        assert not target.exists()
    assert (target / "weights").read_text() == "w"
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "step-2") as folder:
        (folder / "weights").write_text("w")
        raise RuntimeError
    with pytest.raises(FileExistsError), atomic_folder(target) as folder:
        (folder / "weights").write_text("other")
    assert (target / "weights").read_text() == "w"
    assert os.listdir(tmp_path) == ["step-1"]


def test_leftovers_of_a_killed_writer_are_removed_those_of_a_living_one_are_kept(tmp_path):
    code = """
import os, sys
from groundswell.files import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("h")
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "step-1")], check=False)
    assert len(os.listdir(tmp_path)) == 1
    with atomic_folder(tmp_path / "step-3") as mine, atomic_folder(tmp_path / "step-2"):
        assert mine.exists()
        assert len([name for name in os.listdir(tmp_path) if name.startswith(".step-1")]) == 0
    assert sorted(os.listdir(tmp_path)) == ["step-2", "step-3"]


def test_unwritable_folder_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"output: cannot write to '.*file/results' \(Not a directory\); choose another"
    ):
        ensure_writable(tmp_path / "file" / "results")
    assert ensure_writable(tmp_path / "a" / "b").is_dir()
    assert os.listdir(tmp_path / "a" / "b") == []
