"""The published grading rule on its recorded edge cases, and its files."""

import gzip
import json
from pathlib import Path

import pytest

from tasks.grading import accuracy_by_type, is_right, read_items

GOLDEN = Path(__file__).parents[1] / "golden" / "grokking"


def test_edge_cases_are_graded_as_published() -> None:
    cases = json.loads((GOLDEN / "eval_edge_cases.json").read_text())["eval_res"]
    assert [int(is_right(case["pred"], case["gold"])) for case in cases] == [case["score"] for case in cases]
    assert len(cases) == 12


@pytest.mark.parametrize("gold", ["<e_1></a></a>", "<a><x><a><x></a>"])
def test_two_answers_in_a_gold_text_are_refused(gold: str) -> None:
    with pytest.raises(ValueError, match="more than one"):
        is_right("<e_1></a>", gold)


@pytest.mark.parametrize("name", ["composition", "comparison"])
def test_recorded_answers_get_the_published_accuracies(name: str, tmp_path: Path) -> None:
    path = tmp_path / "all_items.json"
    path.write_bytes(gzip.decompress((GOLDEN / f"all_items_{name}_ckpt300.json.gz").read_bytes()))
    found = accuracy_by_type(read_items(path))
    published = dict(json.loads((GOLDEN / "eval_qa_results.json").read_text())[name])["checkpoint-300"]
    assert [[kind, round(share, 3)] for kind, (share, _) in found.items()] == published
    assert sum(count for _, count in found.values()) == len(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[]", "must be a list of objects"), ('[{"target_text": "<a>"}]', "item 0 lacks")],
)
def test_damaged_files_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "all_items.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"all_items.json: {message}"):
        read_items(path)
    with pytest.raises(ValueError, match="No such file"):
        read_items(tmp_path / "none.json")
