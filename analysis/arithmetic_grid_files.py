"""Files in which the published evaluation keeps its grids: JSON of shells and of long sums, texts of sorting."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

SHELLS = (46, 58, 67, 74, 80, 85, 90, 94, 97, 100)  # the larger operand's upper bound in each of the ten jobs
SIZE = SHELLS[-1]
PARITIES = ("even", "odd")  # of the sum of both lengths
_GRID_FILE = re.compile(r"accs_grid_quick_big_eval_(?P<shell>\d+)_(?P<parity>even|odd)\.json")
_SORTING_FILE = re.compile(r"(?P<kind>acc|top_1_acc)_for_(?P<first>\d+)_(?P<second>\d+)\.txt")


def shell_cells(shell: int, parity: str) -> list[tuple[int, int]]:
    """Cells of the published job `shell` (1 to 10), in its order."""
    low, high = (0, *SHELLS)[shell - 1], SHELLS[shell - 1]
    rest = PARITIES.index(parity)
    lengths = range(1, high + 1)
    return [(a, b) for a in lengths for b in lengths if max(a, b) > low and (a + b) % 2 == rest]


def original_grid_files(accuracy: np.ndarray) -> dict[str, str]:
    """File name -> `[grid, n1, n2]` for each published job whose cells are all in this grid [first, second].

    `grid` is the whole 100 x 100 grid with zeros outside of the job; n1 and n2 are its last cell.
    """
    files = {}
    for shell in range(1, len(SHELLS) + 1):
        for parity in PARITIES:
            cells = shell_cells(shell, parity)
            if min(accuracy.shape) < SHELLS[shell - 1] or any(np.isnan(accuracy[a - 1, b - 1]) for a, b in cells):
                continue
            grid = np.zeros((SIZE, SIZE))
            for a, b in cells:
                grid[a - 1, b - 1] = accuracy[a - 1, b - 1]
            name = f"accs_grid_quick_big_eval_{shell}_{parity}.json"
            files[name] = json.dumps([grid.tolist(), *cells[-1]])
    return files


def original_length_file(accuracy: np.ndarray, lengths: tuple[int, int]) -> dict[str, str]:
    """The diagonal of these lengths as `over_100_1.json`: length -> accuracy."""
    low, high = lengths
    return {"over_100_1.json": json.dumps({str(n): float(accuracy[n - 1, n - 1]) for n in range(low, high + 1)})}


def original_sorting_files(exact: np.ndarray, first: np.ndarray) -> dict[str, str]:
    """`acc_for_<digits>_<numbers>.txt` and `top_1_acc_for_...txt`, one percentage each."""
    files = {}
    for prefix, grid in (("acc", exact), ("top_1_acc", first)):
        for (a, b), value in np.ndenumerate(grid):
            if not np.isnan(value):
                files[f"{prefix}_for_{a + 1}_{b + 1}.txt"] = f"{100 * value}"
    return files


def read_grid_folder(folder: Path) -> np.ndarray:
    """The published jobs' grids put together [100, 100]; NaN where no job's file is there. A job that was cut off
    counts up to the cell that its file names. Raises ValueError for a file that is no grid."""
    whole = np.full((SIZE, SIZE), np.nan)
    for path in sorted(folder.iterdir()):
        match = _GRID_FILE.fullmatch(path.name)
        if match is None:
            continue
        try:
            grid, first, second = json.loads(path.read_bytes())
            values = np.asarray(grid, dtype=float)
            cells = shell_cells(int(match["shell"]), match["parity"])
            for a, b in cells[: cells.index((first, second)) + 1]:
                whole[a - 1, b - 1] = values[a - 1, b - 1]
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: not [grid, n1, n2] of shell {match['shell']} ({error})") from None
    return whole


def read_length_file(path: Path) -> dict[int, float]:
    """`over_100_1.json`: length -> accuracy."""
    return {int(length): float(value) for length, value in json.loads(path.read_bytes()).items()}


def read_sorting_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Exact and first-element accuracy [digits, numbers] as fractions, NaN where a file is missing.
    Raises ValueError where there is no such file."""
    found: dict[str, dict[tuple[int, int], float]] = {"acc": {}, "top_1_acc": {}}
    for path in sorted(folder.iterdir()):
        if match := _SORTING_FILE.fullmatch(path.name):
            found[match["kind"]][int(match["first"]), int(match["second"])] = float(path.read_text()) / 100
    cells = [*found["acc"], *found["top_1_acc"]]
    if not cells:
        raise ValueError(f"{folder}: no acc_for_<digits>_<numbers>.txt there")
    shape = max(a for a, _ in cells), max(b for _, b in cells)
    grids = {kind: np.full(shape, np.nan) for kind in found}
    for kind, values in found.items():
        for (a, b), value in values.items():
            grids[kind][a - 1, b - 1] = value
    return grids["acc"], grids["top_1_acc"]
