"""`groundswell evaluate`, `trace`, `grid`, `probe`: ask probes of checkpoints. Probes' fields are their options."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from groundswell.config import CLASS_KEY, ConfigError, import_component, import_path
from groundswell.probes import Probe, probe_folder, scalars, unanswered
from groundswell.selection import select_runs, select_steps

if TYPE_CHECKING:
    from groundswell.probing import Outcome, Target

PROBES = {  # the probes behind a command; those of `probe` are named on its command line
    "evaluate": ("analysis.evaluation.Evaluate",),
    "trace": ("analysis.logit_lens.LogitLens", "analysis.causal_tracing.CausalTracing"),
    "grid": ("analysis.arithmetic_grid.LengthGrid",),
    "probe": (),
}
HELP = {
    "evaluate": "Evaluate checkpoints on whole splits with a pool of actors: exact match, losses, answers as text.",
    "trace": "Look into checkpoints: what is known where in the network, and which states matter (lens, tracing).",
    "grid": "Evaluate checkpoints of arithmetic tasks on a grid of operand lengths, in parts by a pool of actors.",
    "probe": "Ask any probes of checkpoints: --probe some.module.ClassName ...; their fields become options.",
}
MAX_HEADLINES = 8


@dataclasses.dataclass
class Selection:
    """Which checkpoints, and with how many processes."""

    sweep: str | None = None
    """only runs of this sweep"""
    filter: str | None = None
    """conditions on runs as of `groundswell runs`, for instance 'weight_decay >= 0.3 and state = finished'"""
    runs: tuple[str, ...] = ()
    """ids of runs, their first characters, or names"""
    steps: str = "all"
    """which checkpoints of a run: all, last, every:N (every N-th, back from the last one), or 100,200,500"""
    workers: int | None = None
    """actors (default: one a core, or one a GPU)"""
    address: str | None = None
    """Ray cluster to use (default: RAY_ADDRESS, else a local one)"""
    output: Path = Path("results")
    """folder of the sweeps"""


def run(command: str, arguments: Sequence[str], console: Console) -> int:
    """Exit code: 0, 1 when something could not be probed, 130 after Ctrl-C. Raises ConfigError for a user's mistake."""
    from groundswell.probing import Target, print_failures, probe_checkpoints

    named, rest = _take_probes(arguments) if command == "probe" else (PROBES[command], list(arguments))
    classes = [_import_probe(path) for path in named]
    options, probes = _parse(command, classes, rest)
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"workers {options.workers}: must be at least 1")
    chosen = select_runs(options.output, options.sweep, options.filter, options.runs)
    targets = [Target(sweep, run, tuple(select_steps(run, options.steps))) for sweep, run in chosen]
    if not any(target.steps for target in targets):
        raise ConfigError(f"none of the {len(targets)} selected runs has a checkpoint yet")
    address = options.address or os.environ.get("RAY_ADDRESS")
    try:
        outcome = probe_checkpoints(targets, probes, options.workers, address, console)
    except ConfigError as error:
        raise ConfigError(f"{command}: {error}") from None
    console.print(results_table(targets, outcome))
    print_failures(outcome.failures, console)
    for text, count in outcome.objections.items():
        console.print(f"not asked in {count} of {len(targets)} runs: {text}", soft_wrap=True, highlight=False)
    _say_where(targets, outcome, console)
    return outcome.exit_code


def _say_where(targets: Sequence[Target], outcome: Outcome, console: Console) -> None:
    news = f"{outcome.answered} newly answered" if outcome.answered else "nothing was left to ask"
    if outcome.interrupted or outcome.failures:
        news = f"{outcome.answered} newly answered, {len(outcome.failures)} failed"
    counts = f"{sum(len(target.steps) for target in targets)} checkpoints of {len(targets)} runs: {news}"
    console.print(counts, highlight=False)
    for path in dict.fromkeys(target.sweep.path for target in targets):
        console.print(f"answers are in {path}/runs/<id>/probes/", soft_wrap=True, highlight=False)
    if outcome.interrupted:
        console.print("Stopped. The same command goes on.", highlight=False)


# ---- options ----


def _take_probes(arguments: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """--probe A B --probe=C ... -> import paths, the other arguments."""
    paths: list[str] = []
    rest: list[str] = []
    taking = False
    for token in arguments:
        if token.startswith("-"):
            taking = token == "--probe"
        if token.startswith("--probe="):
            paths.append(token.partition("=")[2])
        elif taking and token != "--probe":
            paths.append(token)
        elif not taking:
            rest.append(token)
    if not paths and not {"-h", "--help"} & set(rest):
        raise ConfigError("probe: name one or more classes with --probe some.module.ClassName")
    return tuple(paths), rest


def _import_probe(path: str) -> type[Probe]:
    try:
        return import_component(path, Probe)
    except ValueError as error:
        raise ConfigError(f"probe: {error}") from None


def _parse(command: str, classes: Sequence[type[Probe]], arguments: Sequence[str]) -> tuple[Any, list[Probe]]:
    """A field that probes share is one option."""
    fields = _shared_fields(classes)
    for name in fields.keys() & {field.name for field in dataclasses.fields(Selection)}:
        raise ConfigError(f"field '{name}' of a probe has the name of an option; call it otherwise")
    kind = dataclasses.make_dataclass("Command", list(fields.values()), bases=(Selection,), kw_only=True)
    text = HELP[command] + "".join(f"\n\n{path.__name__}: {inspect.getdoc(path)}" for path in classes)
    options: Any = tyro.cli(kind, prog=f"groundswell {command}", args=list(arguments), description=text)
    probes = []
    for each in classes:
        values = {name: value for name in each.model_fields if (value := getattr(options, name, None)) is not None}
        probes.append(each.from_dict({CLASS_KEY: import_path(each), **values}))
    return options, probes


def _shared_fields(classes: Sequence[type[Probe]]) -> dict[str, Any]:
    """Name -> what `make_dataclass` takes. Where defaults differ the option has none: each probe keeps its own."""
    fields: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in classes for name in each.model_fields):
        mine = [each.model_fields[name] for each in classes if name in each.model_fields]
        values = [field.get_default(call_default_factory=True) for field in mine]
        kind: Any = mine[0].annotation
        default = values[0]
        if any(value != default for value in values):
            kind, default = kind | None, None
        told = Annotated[kind, tyro.conf.arg(help=mine[0].description or f"of {', '.join(_owners(classes, name))}")]
        required = any(field.is_required() for field in mine)
        fields[name] = (name, told) if required else (name, told, dataclasses.field(default=default))
    return fields


def _owners(classes: Sequence[type[Probe]], name: str) -> list[str]:
    return [each.__name__ for each in classes if name in each.model_fields]


# ---- the table ----


def results_table(targets: Sequence[Target], outcome: Outcome) -> Table:
    """One row a run: checkpoints that all probes have answered, and each probe's headline scalars at its last one."""
    rows = [_row(target, outcome.asked.get(target.run.path, ())) for target in targets]
    headlines = list(dict.fromkeys(name for *_, found in rows for name in found))[:MAX_HEADLINES]
    pattern, columns = _shorten(headlines)
    table = Table(title=pattern, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("name", "id", "answered", "last step", *columns):
        left = column in ("name", "id")
        table.add_column(column, justify="left" if left else "right", no_wrap=column == "id", overflow="fold")
    for name, run_id, count, step, found in rows:
        values = [f"{found[headline]:.4g}" if headline in found else "" for headline in headlines]
        table.add_row(name, run_id, count, step, *values)
    return table


def _shorten(names: Sequence[str]) -> tuple[str, list[str]]:
    """evaluate/iid/accuracy, evaluate/ood/accuracy -> "evaluate/*/accuracy", [iid, ood]."""
    parts = [name.split("/") for name in names]
    spare = min(map(len, parts), default=1) - 1  # of each name something is left
    if len(names) < 2 or not spare:
        return "", list(names)
    first = parts[0]
    start = next((n for n in range(spare) if any(each[n] != first[n] for each in parts)), spare)
    end = next((n for n in range(spare - start) if any(each[-1 - n] != first[-1 - n] for each in parts)), spare - start)
    pattern = "/".join([*first[:start], "*", *first[len(first) - end :]])
    return pattern if start + end else "", ["/".join(each[start : len(each) - end]) for each in parts]


def _row(target: Target, probes: Sequence[Probe]) -> tuple[str, str, str, str, Mapping[str, float]]:
    left = {step: unanswered(target.run, step, probes) for step in target.steps}
    num_whole = sum(1 for missing in left.values() if probes and not missing)
    last = [step for step, missing in left.items() if len(missing) < len(probes)][-1:]
    found: dict[str, float] = {}
    for probe in probes:
        mine = [step for step, missing in left.items() if probe not in missing]
        known = scalars(probe_folder(target.run, mine[-1], probe.name())) if mine else {}
        found |= {key: known[key] for pattern in probe.headlines for key in known if fnmatchcase(key, pattern)}
    name = str(target.run.description()["name"])
    return name, target.run.run_id, f"{num_whole}/{len(left)}", "".join(map(str, last)), found
