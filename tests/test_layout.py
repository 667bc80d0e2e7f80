"""The folder named platform must stay a plain folder: as a package it would shadow the standard library's module."""

import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_platform_is_not_a_package():
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "platform").iterdir() if path.suffix == ".py"] == []


def test_the_standard_library_module_wins():
    """Also for a script started from the root, which puts the root first on the search path."""
    assert platform.python_version()
    code = "import sys; sys.path.insert(0, ''); import platform, groundswell; print(platform.python_version())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == platform.python_version()


def test_top_level_folders():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert {"platform", "sweeps", "models", "tasks", "analysis", "tests"} <= folders
