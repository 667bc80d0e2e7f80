"""Sequences of compiled transformers against what those put out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from groundswell.config import ConfigError
from models.tracr_compiler import compile_program
from models.tracr_network import TracrNetwork
from models.tracr_programs import PROGRAMS
from tasks.tracr_tasks import TracrProportion, TracrReverse

GOLDEN = Path(__file__).parent.parent / "golden" / "edge_pruning"
TASKS = {"reverse": TracrReverse(), "xproportion": TracrProportion()}


@pytest.mark.parametrize("name", TASKS)
def test_tokens_are_those_of_the_compiled_model(name: str) -> None:
    split = TASKS[name].build().evaluation["test"]
    golden = np.load(GOLDEN / f"tracr_{name}.npz")
    assert torch.equal(split.tokens[:, : TASKS[name].text_length], torch.from_numpy(golden["token_ids"]).long())


def test_reversed_sequences() -> None:
    split = TASKS["reverse"].build().evaluation["test"]
    decoded = json.loads((GOLDEN / "tracr_reverse.json").read_text())["decoded"]
    assert (split.targets + 1).tolist() == [row[1:] for row in decoded]
    assert split.positions[0].tolist() == [1, 2, 3]


def test_numbers_of_two_digits_are_ordered_as_the_compiler_orders_them() -> None:
    program = PROGRAMS["reverse"]
    network = TracrNetwork(compile_program(program.expression, tuple(range(1, 13)), 2))
    task = TracrReverse(symbols=tuple(map(str, range(1, 13))), size=2, pairs=False)
    assert task.vocabulary() == tuple(map(str, network.program.vocabulary))
    split = task.build().evaluation["test"]
    assert torch.equal(network.run(split.tokens, split.positions).logits.argmax(-1), split.targets)


def test_fractions_of_the_compiled_model_are_right() -> None:
    task = TASKS["xproportion"]
    split = task.build().evaluation["test"]
    outputs = torch.from_numpy(np.load(GOLDEN / "tracr_xproportion.npz")["final_residual"])[..., :1]
    assert torch.allclose(task.fractions(split), outputs[..., 0], atol=1e-6)
    grades = task.grade(outputs, outputs, split)
    assert {name: values.mean().item() for name, values in grades.items()} == {"accuracy": 1, "exact_match": 1, "kl": 0}
    wrong = outputs.clone()
    wrong[0, 2] += 0.051
    grades = task.grade(wrong, outputs, split)
    assert grades["accuracy"].sum() == grades["exact_match"].sum() == 255 and grades["kl"][0] > 0


def test_grades_of_reversal() -> None:
    task = TASKS["reverse"]
    split = task.build().evaluation["test"]
    logits = 5.0 * torch.nn.functional.one_hot(split.targets, 3)
    assert task.grade(logits, logits, split)["accuracy"].mean() == 1
    wrong = logits.clone()
    wrong[3, 1] = wrong[3, 1].roll(1)
    grades = task.grade(wrong, logits, split)
    assert grades["accuracy"].sum() == grades["exact_match"].sum() == 26 and grades["kl"].count_nonzero() == 1
    with pytest.raises(ConfigError, match="5 outputs a position where 3 are graded"):
        task.grade(torch.zeros(27, 3, 5), torch.zeros(27, 3, 5), split)


@pytest.mark.parametrize("name", TASKS)
def test_corrupted_sequences_differ_everywhere_but_in_bos(name: str) -> None:
    task = TASKS[name]
    clean, corrupted = task.build().train.tokens.chunk(2, 1)
    assert torch.equal(clean[:, 0], corrupted[:, 0]) and (clean[:, 1:] != corrupted[:, 1:]).all()
    assert (corrupted != task.vocabulary().index("compiler_pad")).all()
    assert not torch.equal(corrupted, task.with_overrides({"seed": 1}).build().train.tokens.chunk(2, 1)[1])
    alone = task.with_overrides({"pairs": False}).build().train
    assert torch.equal(alone.tokens, clean)


def test_other_symbols_and_sizes() -> None:
    task = TracrReverse(symbols=("b", "a"), size=2)
    split = task.build().train
    assert task.vocabulary() == ("BOS", "a", "b", "compiler_pad")
    assert split.tokens[1, :3].tolist() == [0, 2, 1] and split.targets[1].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"symbols": ["a", "BOS"]}, "symbols: must be two or more different ones"),
        ({"symbols": ["a", "a"]}, "symbols: must be"),
        ({"size": 20}, "size: 20 gives more than"),
        ({"counted": "y"}, "counted: 'y' is no symbol"),
    ],
)
def test_bad_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TracrProportion.from_dict(fields)
