"""The `groundswell` command: look at runs, evaluate and open up their checkpoints, open MLflow's pages."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from rich.console import Console
from rich.table import Table

from groundswell import probe_commands, probes
from groundswell.config import ConfigError
from groundswell.rundir import SweepFolder, list_sweeps
from groundswell.selection import all_sweeps, find_run, find_sweep
from groundswell.tracking.listing import RunRow, filter_rows, read_rows
from groundswell.tracking.view import page_address

ELSEWHERE = {  # commands of modules that are imported only when they are called
    "submit": ("groundswell.submit", "Run a sweep as a job of a Ray cluster; follow, list and stop such jobs."),
    "train": ("groundswell.train_command", "Train the experiment of a file, on one device or on many workers."),
    "plan": ("groundswell.plan_command", "Will a run fit, what binds, how long does it take, what does it cost."),
    "convert": ("groundswell.scaling.convert", "Make a run's DeepSpeed state one that any number of workers can read."),
    "arithmetic": ("tasks.arithmetic_text", "Write arithmetic problems as files, and tokenise folders of them."),
    "tracr": ("models.tracr_command", "Compile a RASP program into a network whose circuit is known."),
    "score": ("analysis.scoring", "Score answers that are files already (all_items.json), ours or the original's."),
    "answers": ("analysis.answer_files", "Score files of answers: JSONL, or the published caches of GPT-4's."),
    "circuit": ("analysis.circuit_commands", "Evaluate, intersect, compare, draw and export circuits of edges."),
    "in-context": ("analysis.in_context", "Compare with language models that read the facts: write, ask, score."),
}
StateName = Literal["waiting", "running", "finished", "stopped", "pruned", "diverged", "failed"]
COLOURS = {
    "finished": "green", "stopped": "green", "running": "cyan", "waiting": "dim",
    "pruned": "yellow", "diverged": "red", "failed": "red",
}  # fmt: skip
MAX_METRIC_COLUMNS = 4
PLAIN_WIDTH = 240  # of tables that go to a file or a pipe
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32


def runs(
    output: Path = Path("results"),
    sweep: str | None = None,
    filter: str | None = None,
    state: tuple[StateName, ...] = (),
) -> int:
    """List runs: where they are, and the last (best) value of their key metrics.

    Args:
        output: Folder of the sweeps.
        sweep: Only this sweep.
        filter: Conditions on axes, params, metrics, state, step, name, joined by "and", for instance
            'weight_decay >= 0.3 and eval/test/accuracy > 0.9'; MLflow's filter strings work too.
        state: Only runs in these states.
    """
    console = _console()
    sweeps = [find_sweep(output, sweep)] if sweep else all_sweeps(output)
    rows = [row for folder in sweeps for row in read_rows(folder)]
    total = len(rows)
    rows = filter_rows(rows, filter) if filter else rows
    rows = [row for row in rows if not state or row.status.state in state]
    console.print(_runs_table(rows, sweeps))
    counts = {name: sum(row.status.state == name for row in rows) for name in COLOURS}
    text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    console.print(f"{len(rows)} of {total} runs: {text}" if rows else f"0 of {total} runs", highlight=False)
    return 0


def show(run: Annotated[str, tyro.conf.Positional], output: Path = Path("results")) -> int:
    """Show one run: its experiment, state, metrics, checkpoints and what probes have found in them.

    Args:
        run: The run's id (or its first characters) or its name.
        output: Folder of the sweeps.
    """
    console = _console()
    sweep, row = find_run(output, run)
    _print_summary(console, sweep, row)
    console.print("\n[bold]Experiment[/]")
    print(yaml.safe_dump(row.folder.experiment_dict(), sort_keys=False), end="")
    console.print("\n[bold]Metrics[/]")
    console.print(_metrics_table(row.folder.journal()))
    console.print("[bold]Checkpoints[/]")
    for step in row.folder.checkpoint_steps():
        folder = row.folder.checkpoint_folder(step)
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        resumable = ", can be resumed" if (folder / "training_state.safetensors").exists() else ""
        console.print(f"{folder}  {size / 2**20:.1f} MiB{resumable}", soft_wrap=True, highlight=False)
    _print_answers(console, row)
    return 0


def ui(output: Path = Path("results"), host: str = "127.0.0.1", port: int = 5000) -> int:
    """Open MLflow's pages on the runs, until Ctrl-C.

    Args:
        output: Folder of the sweeps.
        host: Address to listen on. The pages have no password: leave it on this machine and tunnel to it.
        port: Port to listen on.
    """
    from groundswell.tracking.location import default_uri
    from groundswell.tracking.server import serve

    console = _console()
    uri = default_uri(output)
    if uri.startswith("http"):
        _print_addresses(console, output, uri)
        return 0
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ConfigError(f"output: no runs have been tracked in '{output}' yet; start a sweep, or name its --output")
    stops = [signal.signal(number, _raise_interrupt) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        console.print("Starting MLflow's server ...", highlight=False)
        with contextlib.suppress(KeyboardInterrupt), serve(uri, output, host, port) as process:
            _print_addresses(console, output, f"http://{host}:{port}")
            console.print("Ctrl-C ends it", highlight=False)
            return process.wait()
    finally:
        for number, old in zip((signal.SIGINT, signal.SIGTERM), stops, strict=True):
            signal.signal(number, old)
    return 0


def sync(sweep: Annotated[str, tyro.conf.Positional], output: Path = Path("results"), timeout_s: float = 600.0) -> int:
    """Send to MLflow what it does not have yet, for instance after its store was locked or away.

    Args:
        sweep: Name of the sweep.
        output: Folder of the sweeps.
        timeout_s: Seconds to try.
    """
    from groundswell.tracking.tracker import sync_sweep

    folder = find_sweep(output, sweep)
    leftover = sync_sweep(folder, timeout_s=timeout_s)
    _console().print(str(leftover) if leftover else f"MLflow has all of {sweep}", soft_wrap=True, highlight=False)
    return 1 if leftover else 0


def main(args: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 when something was left undone, 2 for a user's mistake, 130 after Ctrl-C."""
    commands: dict[str, Any] = {"runs": runs, "show": show, "ui": ui, "sync": sync}
    elsewhere = probe_commands.HELP | {name: text for name, (_, text) in ELSEWHERE.items()}
    commands |= {name: _listed(text) for name, text in elsewhere.items()}
    args = sys.argv[1:] if args is None else args
    try:
        if args and args[0] in probe_commands.HELP:  # their options depend on probes, which are slow to import
            return probe_commands.run(args[0], args[1:], _console())
        if args and args[0] in ELSEWHERE:
            return importlib.import_module(ELSEWHERE[args[0]][0]).main(args[1:])
        return tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="groundswell",
            description=__doc__,
            args=args,
        )
    except ConfigError as error:
        print(f"groundswell: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `groundswell runs | head`
        sys.stderr.close()
        return 0


def _listed(text: str) -> Callable[[], None]:
    """Stands in the list of commands for one that parses its own arguments."""

    def command() -> None: ...

    command.__doc__ = text
    return command


# ---- showing ----


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def _key_metrics(rows: Sequence[RunRow], sweeps: Sequence[SweepFolder]) -> list[str]:
    """The sweeps' own metrics first, then other accuracies."""
    known = {name for row in rows for name in row.last}
    own = [str(metric) for sweep in sweeps if (metric := sweep.description().get("metric")) in known]
    accuracies = sorted(name for name in known if name.startswith("eval/") and name.endswith("/accuracy"))
    return list(dict.fromkeys([*own, *accuracies]))[:MAX_METRIC_COLUMNS]


def _runs_table(rows: Sequence[RunRow], sweeps: Sequence[SweepFolder]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    metrics = _key_metrics(rows, sweeps)
    modes = {sweep.description().get("metric"): sweep.description().get("mode", "max") for sweep in sweeps}
    if len(sweeps) > 1:
        table.add_column("sweep")
    table.add_column("id", no_wrap=True)
    table.add_column("name")
    table.add_column("state", no_wrap=True)
    for column in ("step", *(metric.removeprefix("eval/") for metric in metrics), "time"):
        table.add_column(column, justify="right", no_wrap=column in ("step", "time"))
    for row in rows:
        state = f"[{COLOURS[row.status.state]}]{row.status.state}[/]"
        cells = [row.folder.run_id, row.name, state, str(row.status.step)]
        cells += [_value_cell(row, metric, modes.get(metric, "max")) for metric in metrics]
        table.add_row(*([row.sweep] if len(sweeps) > 1 else []), *cells, _duration(row.seconds))
    return table


def _value_cell(row: RunRow, metric: str, mode: str) -> str:
    if metric not in row.last:
        return ""
    last, best = row.last[metric], (row.highest if mode == "max" else row.lowest)[metric]
    return f"{last:.3f}" if f"{last:.3f}" == f"{best:.3f}" else f"{last:.3f} ({best:.3f})"


def _print_summary(console: Console, sweep: SweepFolder, row: RunRow) -> None:
    status, duration = row.status, _duration(row.seconds) or "not started"
    facts = {
        "run": f"{row.name}  ({row.folder.run_id})",
        "sweep": sweep.name,
        "state": f"[{COLOURS[status.state]}]{status.state}[/] at step {status.step}, {duration}",
        "reason": status.reason,
        "error": status.error,
        "folder": str(row.folder.path),
        "MLflow run": _mlflow_run_id(row),
    }
    for name, value in facts.items():
        if value:
            console.print(f"[bold]{name:<11}[/]{value}", soft_wrap=True, highlight=False)


def _print_answers(console: Console, row: RunRow) -> None:
    """The newest answer of each probe."""
    found = probes.answers(row.folder)
    for probe in dict.fromkeys(name for _, name in found):
        steps = [step for step, name in found if name == probe]
        folder = found[steps[-1], probe]
        others = f" (and {len(steps) - 1} steps before)" if len(steps) > 1 else ""
        text = f"\n[bold]Probe {probe} at step {steps[-1]}[/]{others}  {folder}"
        console.print(text, soft_wrap=True, highlight=False)
        for name, value in probes.scalars(folder).items():
            console.print(f"{name:<40}{value:.4g}", soft_wrap=True, highlight=False)


def _mlflow_run_id(row: RunRow) -> str:
    with contextlib.suppress(OSError, json.JSONDecodeError):
        memory = json.loads((row.folder.path / "tracking.json").read_bytes())
        return f"{memory['mlflow_run_id']}  ({memory['uri']})"
    return "none yet"


def _metrics_table(lines: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("metric", "last", "lowest", "highest", "steps"):
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    table.add_column("curve", no_wrap=True)
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line["metrics"].items():
            curves.setdefault(name, []).append((line["step"], value))
    for name in sorted(curves):
        values = [value for _, value in curves[name]]
        steps = f"{curves[name][0][0]}-{curves[name][-1][0]}"
        table.add_row(name, *(f"{v:.4g}" for v in (values[-1], min(values), max(values))), steps, sparkline(values))
    return table


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """A line of blocks from the lowest to the highest value; gaps where a value is not finite."""
    count = min(width, len(values))
    picked = [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]
    finite = [v for v in picked if abs(v) != float("inf") and v == v]
    if not finite:
        return " " * count
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    top = len(SPARKS) - 1
    return "".join(SPARKS[round((v - low) / span * top)] if v in finite else " " for v in picked)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _print_addresses(console: Console, output: Path, base: str) -> None:
    """One address a sweep, straight to its table of runs."""
    for sweep in list_sweeps(output):
        with contextlib.suppress(OSError, json.JSONDecodeError, KeyError):
            experiment_id = json.loads((sweep.path / "tracking.json").read_bytes())["experiment_id"]
            console.print(f"{sweep.name}: {page_address(base, experiment_id)}", soft_wrap=True, highlight=False)


def _raise_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
