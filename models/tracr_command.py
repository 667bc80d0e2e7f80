"""`groundswell tracr`: compile a RASP program into a folder, a network whose circuit is known."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from groundswell.cli import PLAIN_WIDTH
from groundswell.config import ConfigError, parse_value, suggest
from groundswell.files import check_name
from models.rasp import Value, evaluate
from models.tracr_compiler import compile_program
from models.tracr_network import TracrNetwork
from models.tracr_programs import PROGRAMS, Program, all_inputs

MAX_CHECKED = 2_000  # sequences: up to so many all of them, else so many drawn ones
NEAR = 1e-3  # numbers of the network and of the program


def compiled_folder(name: str, parent: str | Path = "results/networks") -> str:
    """Folder of a program of `PROGRAMS` as a network, compiled where it is not there yet (milliseconds)."""
    folder = Path(parent) / check_name(name, "program")
    if not (folder / "config.json").exists():
        program = find_program(name)
        TracrNetwork(compile_program(program.expression, program.vocabulary, program.max_length)).save(folder, name)
    return str(folder)


def compile_folder(
    program: Annotated[str, tyro.conf.Positional],
    out: Path,
    vocabulary: tuple[str, ...] = (),
    max_length: int | None = None,
) -> int:
    """Compile a RASP program into the weights of a transformer, without training, and check it against its meaning.

    Args:
        program: reverse, xproportion, histogram, sort, or package.module.NAME of a models.tracr_programs.Program.
        out: New folder for config.json and model.safetensors; its edges can be pruned as any network's.
        vocabulary: Tokens, numbers or words (default: the program's own).
        max_length: Most tokens of a sequence, BOS not counted (default: the program's own, 5).
    """
    chosen = find_program(program)
    tokens = tuple(parse_value(token) for token in vocabulary) or chosen.vocabulary
    length = chosen.max_length if max_length is None else max_length
    if not all(isinstance(token, int | float | str) for token in tokens):
        raise ConfigError(f"vocabulary: {list(vocabulary)} must be numbers or words")
    network = TracrNetwork(compile_program(chosen.expression, tokens, length))
    checked, wrong = check(chosen, network, tokens)
    if wrong:
        raise ConfigError(
            f"program: {program} gives other values than it means on {wrong:,} of {checked:,} sequences of length "
            f"{length}; take a smaller max_length or vocabulary"
        )
    network.save(out, program)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(sizes(network))
    which = "all" if checked == len(tokens) ** length else "drawn"
    console.print(
        f"{out}: right on {checked:,} sequences of length {length}, {which} of them", soft_wrap=True, highlight=False
    )
    return 0


def find_program(name: str) -> Program:
    """A program of ours by its name, anyone's by its import path. Raises ConfigError."""
    if name in PROGRAMS:
        return PROGRAMS[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ConfigError(f"program: there is no '{name}'; {suggest(name, list(PROGRAMS))}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        raise ConfigError(f"program: nothing at import path '{name}'; write package.module.NAME") from None
    if not isinstance(found, Program):
        raise ConfigError(f"program: '{name}' is no models.tracr_programs.Program")
    return found


def check(program: Program, network: TracrNetwork, vocabulary: Sequence[Value]) -> tuple[int, int]:
    """How many sequences of the greatest length were compared with the program's meaning, and how many differ."""
    length = network.program.max_length
    if len(vocabulary) ** length <= MAX_CHECKED:
        sequences = list(all_inputs(vocabulary, length))
    else:
        drawn = np.random.default_rng(0).integers(len(vocabulary), size=(MAX_CHECKED, length))
        sequences = [tuple(vocabulary[number] for number in row) for row in drawn]
    wrong = 0
    for start in range(0, len(sequences), 256):
        part = sequences[start : start + 256]
        for sequence, found in zip(part, network(part), strict=True):
            wrong += not _same(evaluate(program.expression, sequence), found, program.expression.numerical)
    return len(sequences), wrong


def _same(expected: list[Value | None], found: list[Value | None], numerical: bool) -> bool:
    if numerical:
        return bool(np.allclose(expected, found, atol=NEAR, rtol=0))  # type: ignore[arg-type]
    return expected == found


def sizes(network: TracrNetwork) -> Table:
    """Of the network and of its edge graph."""
    graph, compiled = network.graph, network.program
    values = "a number" if compiled.outputs is None else " ".join(map(str, compiled.outputs))
    rows = {
        "layers x heads": f"{graph.num_layers} x {graph.num_heads}",
        "width": network.width,
        "key size": network.key_size,
        "MLP width": compiled.weights["first"].shape[2],
        "tokens": " ".join(map(str, compiled.vocabulary)),
        "longest sequence": f"{compiled.max_length} and BOS",
        "outputs": values,
        "writers": graph.num_writers,
        "edges": f"{graph.num_edges:,}",
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def main(arguments: Sequence[str]) -> int:
    """`groundswell tracr ...`. Raises ConfigError for a user's mistake."""
    return tyro.cli(compile_folder, prog="groundswell tracr", args=list(arguments))
