"""`groundswell tracr`."""

from __future__ import annotations

import dataclasses

import pytest

from groundswell.commands import main
from groundswell.config import ConfigError
from models.rasp import evaluate
from models.tracr_command import check, find_program
from models.tracr_compiler import compile_program
from models.tracr_network import TracrNetwork
from models.tracr_programs import PROGRAMS, Program, all_inputs, reverse, sort

MINE = Program(sort(), (3, 1, 2), max_length=3)


def test_compiles_into_a_folder(tmp_path, capsys):
    assert main(["tracr", "reverse", "--out", str(tmp_path / "reverse")]) == 0
    output = capsys.readouterr().out
    assert "243 sequences" in output and "94" in output
    assert TracrNetwork.load(tmp_path / "reverse")([(1, 2, 3, 1, 1)]) == [[1, 1, 3, 2, 1]]


def test_other_sizes(tmp_path):
    folder = tmp_path / "x"
    arguments = ["--out", str(folder), "--max-length", "30", "--vocabulary", "x", "y"]
    assert main(["tracr", "xproportion", *arguments]) == 0
    network = TracrNetwork.load(folder)
    assert (network.program.max_length, network.program.vocabulary) == (30, ("BOS", "compiler_pad", "x", "y"))


def test_own_program(tmp_path):
    assert main(["tracr", f"{__name__}.MINE", "--out", str(tmp_path / "mine")]) == 0
    assert TracrNetwork.load(tmp_path / "mine")([(3, 1, 1)]) == [[1, 1, 3]]


def test_a_wrong_network_is_found():
    program = PROGRAMS["reverse"]
    network = TracrNetwork(compile_program(program.expression, (1, 2, 3), 3))
    network.weights["value"][-1] = 0
    assert check(program, network, (1, 2, 3)) == (27, 27)
    other = dataclasses.replace(program, expression=sort())
    right = TracrNetwork(compile_program(reverse(), (1, 2, 3), 3))
    expected = sum(evaluate(sort(), s) != evaluate(reverse(), s) for s in all_inputs((1, 2, 3), 3))
    assert check(other, right, (1, 2, 3)) == (27, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["revers"], "did you mean 'reverse'?"),
        (["no.such.PROGRAM"], "no.such.PROGRAM"),
        (["models.tracr_programs.reverse"], "is no models.tracr_programs.Program"),
        (["reverse", "--vocabulary", "1", "1"], "different tokens"),
        (["reverse", "--vocabulary", "[1]"], "numbers or words"),
        (["reverse", "--max-length", "0"], "max_length"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    assert main(["tracr", *arguments, "--out", str(tmp_path / "folder")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_find_program():
    assert find_program("sort") is PROGRAMS["sort"]
    with pytest.raises(ConfigError):
        find_program("")
