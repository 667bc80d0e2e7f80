"""The published parsers' own verdicts on hand-made answers."""

import json
from pathlib import Path

import pytest

from analysis.in_context_scores import parse, parse_cot, parse_direct

GOLDEN = Path(__file__).parents[1] / "golden" / "grokking" / "eval_edge_cases.json"
CASES = json.loads(GOLDEN.read_text())["llm_parsers"]


def test_there_are_fourteen() -> None:
    assert len(CASES) == 14


@pytest.mark.parametrize("case", CASES, ids=[case["text"] for case in CASES])
def test_parsers_agree_with_the_published(case: dict) -> None:
    assert parse_direct(case["text"]) == parse(case["text"], "direct") == case["direct"]
    assert parse_cot(case["text"]) == parse(case["text"], "CoT") == case["cot"]
