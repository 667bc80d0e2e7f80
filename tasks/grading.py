"""How the published evaluation grades text, and the files it keeps: lists of objects with input_text, target_text,
type and model_output (`all_items.json`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tasks.vocabulary import ANSWER, STOP

ITEMS_FILE = "all_items.json"


def is_right(output: str, gold: str) -> bool:
    """Both count up to their first `</a>` only. A gold text with `<a>` is compared from there on, and the output must
    have exactly one `<a>` too; any other must be equal as a whole, prompt included. A gold text that never ends in
    `</a>` has only to begin the output. Raises ValueError for a gold text with more than one of either."""
    if gold.count(STOP) > 1 or gold.count(ANSWER) > 1:
        raise ValueError(f"target_text '{gold}' has more than one {ANSWER} or {STOP}; write one answer a row")
    if STOP not in gold:
        return output.startswith(gold)
    output, gold = output.split(STOP)[0], gold.split(STOP)[0]
    if ANSWER not in gold:
        return output == gold
    return output.count(ANSWER) == 1 and output.split(ANSWER)[1] == gold.split(ANSWER)[1]


def accuracy_by_type(items: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, int]]:
    """type -> share of right items and their number, in the order of first appearance."""
    marks: dict[str, list[bool]] = {}
    for item in items:
        marks.setdefault(str(item.get("type", "test")), []).append(is_right(item["model_output"], item["target_text"]))
    return {kind: (sum(mine) / len(mine), len(mine)) for kind, mine in marks.items()}


def read_items(path: Path) -> list[dict[str, Any]]:
    """Raises ValueError that names the file and what is wrong with it."""
    try:
        items = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not (isinstance(items, list) and items and all(isinstance(item, dict) for item in items)):
        raise ValueError(f"{path}: must be a list of objects with target_text and model_output")
    for number, item in enumerate(items):
        if not all(isinstance(item.get(name), str) for name in ("target_text", "model_output")):
            raise ValueError(f"{path}: item {number} lacks the text fields target_text and model_output")
    return items
