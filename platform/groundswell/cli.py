"""The command line of a sweep file: its options, and every field of its experiment as --dotted.path VALUE."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from groundswell.config import CLASS_KEY, ConfigError, hash_of, parse_value, suggest
from groundswell.experiment import Experiment
from groundswell.stages import Stage
from groundswell.sweep import Axis, Sweep

PLAIN_WIDTH = 160  # columns of a table that goes to a file or a pipe


@dataclasses.dataclass
class Options:
    """Any field of the experiment can be set too: --optimizer.lr 3e-4 (listed below with this preset's values).

    A part is replaced by naming its class: --task.class tasks.folder.Folder --task.path DIR.
    """

    preset: str = "demo"
    """size of the sweep"""
    output: Path = Path("results")
    """folder for runs, tables, figures and the tracking store"""
    search: Literal["grid", "random", "optuna"] = "grid"
    """every combination; independent draws; or Optuna's TPE, whose study is kept on disk"""
    num_samples: int = 20
    """settings to draw (random, optuna); each is run once per replicate"""
    search_seed: int = 0
    """seed of random search and of Optuna's sampler"""
    scheduler: Literal["none", "asha", "median"] = "none"
    """stop runs that fall behind (Ray Tune's ASHA or median stopping rule)"""
    pack: str = "auto"
    """runs trained as one program: a number, or auto (1 on a CPU unless the model is tiny)"""
    axis: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """PATH=V1,V2,... replaces or adds an axis of the grid (may be given several times)"""
    stages: str | None = None
    """of a pipeline: only these (A,B,...) and those that they start from"""
    address: str | None = None
    """Ray cluster to use (default: RAY_ADDRESS, else a local one for this sweep)"""
    storage: str | None = None
    """URI (s3://bucket/folder, file:///folder) where results and states are kept too; whoever starts there goes on"""
    num_cpus: int | None = None
    """CPUs of the local cluster (default: all of this machine)"""
    dry_run: bool = False
    """print the runs, the packs and an estimate of time and memory, and stop"""


def main(build: Callable[[str], Sweep], presets: Mapping[str, str], default: str = "demo") -> None:
    """Entry point of a sweep file; ends the process with the sweep's exit code (2: bad input)."""
    sys.exit(run(build, presets, default, sys.argv[1:]))


def run(build: Callable[[str], Sweep], presets: Mapping[str, str], default: str, arguments: Sequence[str]) -> int:
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    try:
        fields, rest = split_dotted(arguments)
        preset = _preset(rest, presets, default)
        sweep = build(preset)
        options = _parse(sweep, rest, presets, preset)
        sweep = customise(sweep, preset, options, fields)
        from groundswell.driver import SweepOptions, run_sweep

        chosen = SweepOptions(
            output=options.output,
            search=options.search,
            num_samples=_positive(options.num_samples, "--num-samples"),
            search_seed=options.search_seed,
            scheduler=options.scheduler,
            pack=_pack(options.pack),
            address=options.address or os.environ.get("RAY_ADDRESS"),
            num_cpus=options.num_cpus,
            storage=options.storage,
        )
        if options.dry_run:
            from groundswell.dryrun import dry_run

            return dry_run(sweep, chosen, console)
        return run_sweep(sweep, chosen, console)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the runs' last checkpoints", file=sys.stderr)
        return 130


def split_dotted(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the experiment's fields out: `--a.b VALUE`, `--a.b=VALUE`, `--a.flag`, `--a.no-flag`, and `--seed VALUE`.

    Returns dotted path -> value, and the rest.
    """
    fields: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        token = queue.pop(0)
        name, equals, value = token.partition("=")
        path = name[2:].replace("-", "_")
        if not (name.startswith("--") and ("." in path or path in Experiment.model_fields)):
            rest.append(token)
            continue
        if equals:
            fields[path] = parse_value(value)
        elif queue and not queue[0].startswith("--"):
            fields[path] = parse_value(queue.pop(0))
        else:
            parent, _, last = path.rpartition(".")
            off = last.startswith("no_")
            fields[f"{parent}.{last.removeprefix('no_')}"] = not off
    return fields, rest


def customise(sweep: Sweep, preset: str, options: Options, fields: Mapping[str, Any]) -> Sweep:
    """Apply the command line to a sweep; what it changes besides axis values becomes part of the sweep's name."""
    if options.stages is not None:
        sweep = dataclasses.replace(sweep, stages=_choose_stages(sweep, options.stages))
    before = _bases(sweep)
    for path, value in fields.items():
        if path in sweep.axes:
            raise ConfigError(f"{path} is an axis of this sweep; set its values with --axis {path}=V1,V2")
        base = next((base for base in before.values() if base.has(path)), sweep.base)
        if isinstance(value, bool) and base.has(path) and not isinstance(base.get(path), bool):
            raise ConfigError(f"{path}: needs a value, for instance --{path} {base.get(path)}")
    replaced = {path.removesuffix(f".{CLASS_KEY}") for path in fields if path.endswith(f".{CLASS_KEY}")}
    axes = _replace_axes({path: axis for path, axis in sweep.axes.items() if path not in replaced}, options.axis)
    if sweep.stages:
        changed = dataclasses.replace(sweep, axes=axes, fields=dict(fields), stages=_change_stages(sweep, fields))
        _check_axes(changed)
        is_another = hash_of(_identities(changed)) != hash_of(_identities(sweep))
        digest = hash_of(_identities(changed))
    else:
        start = sweep.base  # with what the first value of each named axis stands for: fields are checked against it
        for path, axis in axes.items():
            if axis.named is not None:
                start = start.with_overrides(axis.overrides(path, axis.values[0]))
        base = start.with_overrides(dict(fields))
        for path, axis in axes.items():
            if axis.named is None:
                base.get(path)  # names a misspelt field
                # a part that was replaced need not have all that the axis used to set
                axes[path] = axis.model_copy(update={"also": tuple(other for other in axis.also if base.has(other))})
        changed = dataclasses.replace(sweep, base=base, axes=axes, fields=dict(fields))
        is_another = base.identity != start.identity or bool(replaced)  # another number of workers is the same sweep
        digest = base.identity
    parts = [sweep.name, preset]
    if options.search != "grid":
        parts.append(options.search)
    if options.scheduler != "none":
        parts.append(options.scheduler)
    if is_another:
        parts.append(digest[:6])
    return dataclasses.replace(changed, name="-".join(parts))


# ---- pipelines ----


def _bases(sweep: Sweep) -> dict[str, Experiment]:
    """Of each stage; of an ordinary sweep the one there is."""
    return {stage.name: sweep.stage_base(stage) for stage in sweep.stages} or {"": sweep.base}


def _identities(sweep: Sweep) -> dict[str, Any]:
    return {name: base.identity for name, base in _bases(sweep).items()}


def _choose_stages(sweep: Sweep, text: str) -> tuple[Stage, ...]:
    """Those named and, transitively, those that they start from, in order."""
    known = {stage.name: stage for stage in sweep.stages}
    if not known:
        raise ConfigError("--stages: this sweep has none; leave it out")
    wanted = text.split(",")
    for name in wanted:
        if name not in known:
            raise ConfigError(f"--stages {name}: {suggest(name, list(known))}")
        wanted += [source for source, _ in known[name].sources().values() if source not in wanted]
    return tuple(stage for stage in sweep.stages if stage.name in wanted)


def _change_stages(sweep: Sweep, fields: Mapping[str, Any]) -> tuple[Stage, ...]:
    """A field goes to every stage that has it; one that begins with a stage's name to that stage alone."""
    bases, stages = _bases(sweep), []
    for path in fields:
        first, _, rest = path.partition(".")
        if first in bases:
            bases[first].with_overrides({rest: fields[path]})  # names a misspelt field
        elif not any(base.has(path) for base in bases.values()):
            sweep.base.get(path)  # names it
            raise ConfigError(f"{path}: no stage has this field")
    for stage in sweep.stages:
        common = {path: value for path, value in fields.items() if bases[stage.name].has(path)}
        prefix = f"{stage.name}."
        own = {path.removeprefix(prefix): value for path, value in fields.items() if path.startswith(prefix)}
        stages.append(dataclasses.replace(stage, changes={**stage.changes, **common, **own}))
    return tuple(stages)


def _check_axes(sweep: Sweep) -> None:
    bases = _bases(sweep).values()
    for path, axis in sweep.axes.items():
        if axis.named is None and not any(base.has(other) for base in bases for other in (path, *axis.also)):
            sweep.base.get(path)  # names the misspelt field


def _replace_axes(axes: dict[str, Axis], options: Sequence[str]) -> dict[str, Axis]:
    """Apply --axis PATH=V1,V2."""
    for text in options:
        path, equals, values = text.partition("=")
        path = path.replace("-", "_")
        if not equals or not values:
            raise ConfigError(f"--axis {text}: write PATH=V1,V2,..., for instance --axis optimizer.lr=1e-3,3e-3")
        parsed = tuple(parse_value(value) for value in values.split(","))
        old = dict(axes[path]) if path in axes else {}
        try:
            axes[path] = Axis.from_dict(old | {"values": parsed, "low": None, "high": None})
        except ConfigError as error:
            raise ConfigError(f"--axis {path}: {error}") from None
    return axes


def _preset(arguments: Sequence[str], presets: Mapping[str, str], default: str) -> str:
    """The preset decides the defaults of all other options, so it is looked for first."""
    chosen = default
    for index, token in enumerate(arguments):
        if token == "--preset" and index + 1 < len(arguments):
            chosen = arguments[index + 1]
        elif token.startswith("--preset="):
            chosen = token.partition("=")[2]
    if chosen not in presets:
        raise ConfigError(f"--preset {chosen}: {suggest(chosen, list(presets))}")
    return chosen


def _parse(sweep: Sweep, arguments: Sequence[str], presets: Mapping[str, str], preset: str) -> Options:
    """Parse the plain options; --help lists the experiment's fields along with them."""
    told = "; ".join(f"{name}: {text}" for name, text in presets.items())
    choice: Any = Annotated[Literal[tuple(presets)], tyro.conf.arg(help=told)]  # type: ignore[valid-type]
    fields: list[Any] = [("preset", choice, dataclasses.field(default=preset))]
    if "-h" in arguments or "--help" in arguments:
        for name in Experiment.model_fields:
            part = getattr(sweep.base, name)
            kind: Any = Annotated[type(part), tyro.conf.AvoidSubcommands]
            fields.append((name, kind, dataclasses.field(default=part)))
    command: Any = dataclasses.make_dataclass("Command", fields, bases=(Options,))
    options, unknown = tyro.cli(
        command,
        prog=f"python {Path(sys.argv[0]).name}",
        args=list(arguments),
        description=inspect.cleandoc(Options.__doc__ or ""),
        return_unknown_args=True,
    )
    if unknown:
        known = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(Options)]
        raise ConfigError(f"{unknown[0]}: no such option; {suggest(unknown[0], known)}")
    return options


def _positive(value: int, name: str) -> int:
    if value <= 0:
        raise ConfigError(f"{name} {value}: must be at least 1")
    return value


def _pack(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--pack {text}: write auto or a number from 1 on")
    return int(text)
