"""The published files of implicit chain of thought, for tests that need them."""

from pathlib import Path

import pytest

DATA = Path(__file__).parents[3] / "shared" / "data" / "implicit_cot"


def published(*names: str) -> list[Path]:
    """Files below DATA that are there; skips the test where none is."""
    found = [DATA / name for name in names if (DATA / name).is_file()]
    if not found:
        pytest.skip(f"needs one of {', '.join(names)} in ../shared/data/implicit_cot")
    return found
