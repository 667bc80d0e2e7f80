"""Facts in the weights or in the context: can a language model that reads all facts answer what a trained one knows?

Grokked Transformers (arXiv 2405.15071), section 5. `write` turns the hard queries of complex reasoning into prompts,
`ask` puts them to a language model, `score` compares its answers with a trained transformer's on the same queries.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from numpy.random import RandomState
from rich.console import Console
from rich.status import Status

from analysis.in_context_prompts import CONTEXTS, prompt_file, write_prompts
from analysis.in_context_scores import answer_file, check_model_name, read_gold, score_report
from groundswell.cli import PLAIN_WIDTH, split_dotted
from groundswell.config import Config, ConfigError
from groundswell.files import atomic_write, ensure_writable
from groundswell.progress import PLAIN_SECONDS, format_seconds
from groundswell.report import print_table
from groundswell.rundir import RunFolder
from groundswell.selection import find_run
from models.language_models import LanguageModel, LocalModel, ServedModel
from tasks.complex_reasoning import ComplexReasoning

Context = Literal["prompt", "retrieval"]
Style = Literal["directna", "cot"]
Prompts = Annotated[Path, tyro.conf.Positional]


class Fields(Config):
    """What --task.* options are checked against."""

    task: ComplexReasoning = ComplexReasoning()


def write(
    prompts: Prompts,
    run: str | None = None,
    output: Path = Path("results"),
    attribute: int | None = None,
    seed: int = 0,
    task: ComplexReasoning = ComplexReasoning(),  # noqa: B008 (frozen)
) -> int:
    """Write the hard queries as prompts, with all facts and with those near the two entities only.

    Args:
        prompts: Folder to make.
        run: Take the task of this run (id, its first characters, or name) in place of --task.*.
        output: Folder of the sweeps, for --run.
        attribute: Only queries about this attribute.
        seed: Seed of names and of the facts' order.
        task: The task; the paper's by default.
    """
    folder = find_run(output, run)[1].folder if run else None
    if folder:
        if task != ComplexReasoning():
            raise ConfigError("--run brings its own task; leave out --task.*")
        task = _task_of(folder)
    console, start = _console(), time.monotonic()
    described = write_prompts(prompts, task, seed, attribute, folder.run_id if folder else None)
    queries = described["queries"]
    console.print(f"{len(queries)} queries in {prompts}, {time.monotonic() - start:.0f} s", soft_wrap=True)
    for context, title in CONTEXTS.items():
        facts = np.mean([query["facts"][context] for query in queries])
        size = np.mean([(prompts / prompt_file(context, "cot", query["k"])).stat().st_size for query in queries])
        console.print(f"{title}: {facts:,.0f} facts and {size:,.0f} characters a prompt on average", highlight=False)
    return 0


def _task_of(folder: RunFolder) -> ComplexReasoning:
    task = folder.experiment().task
    if not isinstance(task, ComplexReasoning):
        raise ConfigError(f"--run {folder.run_id}: its task is {type(task).__name__}; ComplexReasoning is needed")
    return task


def ask(
    prompts: Prompts,
    url: str | None = None,
    model: str | None = None,
    folder: Path | None = None,
    name: str | None = None,
    contexts: tuple[Context, ...] = ("prompt", "retrieval"),
    styles: tuple[Style, ...] = ("directna", "cot"),
    limit: int | None = None,
    batch_size: int = 1,
    max_tokens: int = 1024,
    timeout_s: float = 600.0,
) -> int:
    """Ask a language model; what it has answered already is not asked again.

    Queries are asked in a fixed random order, so a part of them is a fair sample.

    Args:
        prompts: Folder that `write` has made; the answers go there.
        url: OpenAI-compatible server, for instance http://127.0.0.1:8000/v1; its key is in OPENAI_API_KEY.
        model: Name of the model on the server.
        folder: Hugging Face folder of a model, in place of a server.
        name: Name of the answers' files (default: the model's).
        contexts: What the model may read: all facts (prompt), or those near the two entities (retrieval).
        styles: Only the answer (directna), or a chain of thought before it (cot).
        limit: At most so many queries of each context and style.
        batch_size: Prompts at a time: requests side by side, or rows of a batch.
        max_tokens: Longest answer.
        timeout_s: Seconds to wait for an answer of the server.
    """
    numbers = {"--limit": limit, "--batch-size": batch_size, "--max-tokens": max_tokens, "--timeout-s": timeout_s}
    for option, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: must be at least 1")
    if (url is None) == (folder is None) or (url is None) != (model is None):
        raise ConfigError("name a model: --url and --model on a server, or --folder on disk")
    own_name = re.sub(r"[^\w.-]+", "-", folder.resolve().name if folder else str(model))
    left = _unanswered(prompts, check_model_name(name or own_name), contexts, styles, limit)
    console, start = _console(), time.monotonic()
    if left:
        with console.status("loading the model") if console.is_terminal else contextlib.nullcontext() as status:
            served = ServedModel(url, str(model), max_tokens, timeout_s) if url is not None else None
            _ask(served or LocalModel(Path(str(folder)), max_tokens), left, batch_size, console, status)
    console.print(f"{len(left)} new answers in {prompts}, {format_seconds(time.monotonic() - start)}", soft_wrap=True)
    return 0


def _unanswered(
    folder: Path, name: str, contexts: Sequence[Context], styles: Sequence[Style], limit: int | None
) -> list[tuple[Path, Path]]:
    """Prompt and answer files. The fixed order: the split lists the queries label by label."""
    numbers = list(read_gold(folder))
    ensure_writable(folder, "prompts")
    chosen = [numbers[n] for n in RandomState(0).permutation(len(numbers))[:limit]]
    pairs = [
        (folder / prompt_file(context, style, k), folder / answer_file(name, context, style, k))
        for context in contexts
        for style in styles
        for k in chosen
    ]
    for prompt, _ in pairs:
        if not prompt.exists():
            raise ConfigError(f"{prompt}: is missing; write the folder again")
    return [(prompt, answer) for prompt, answer in pairs if not answer.exists()]


def _ask(
    model: LanguageModel, left: Sequence[tuple[Path, Path]], batch_size: int, console: Console, status: Status | None
) -> None:
    """`status` is the live line of a terminal; without it there is a line now and then."""
    begin = told = time.monotonic()
    for start in range(0, len(left), batch_size):
        batch = left[start : start + batch_size]
        texts = model.complete([prompt.read_text(encoding="utf-8") for prompt, _ in batch])
        for (_, answer), text in zip(batch, texts, strict=True):
            atomic_write(answer, text, sync=False)
        done, now = start + len(batch), time.monotonic()
        seconds = (now - begin) / done * (len(left) - done)
        line = f"{done} of {len(left)} answers, {format_seconds(seconds)} left"
        if status:
            status.update(line)
        elif now - told > PLAIN_SECONDS[now - begin > 60]:
            console.print(line, soft_wrap=True, highlight=False)
            told = now


def score(prompts: Prompts, run: str | None = None, output: Path = Path("results"), strict: bool = False) -> int:
    """Score the answers in a folder, beside chance and the published figures; the table goes there as scores.csv.

    Args:
        prompts: Folder with answer_K.txt and NAME_[retrieval_]{directna|cot}_K.txt.
        run: Also score this trained run (id, its first characters, or name) on the same queries.
        output: Folder of the sweeps, for --run.
        strict: Count an answer only if it names exactly one of the four, in any case (default: the published rules).
    """
    console = _console()
    report = score_report(prompts, find_run(output, run)[1].folder if run else None, strict)
    table = atomic_write(prompts / ("scores_strict.csv" if strict else "scores.csv"), report.table.to_csv(index=False))
    print_table(report, console)
    for line in (*report.remarks, f"saved {table}"):
        console.print(line, soft_wrap=True, highlight=False)
    return 0


def main(arguments: Sequence[str]) -> int:
    """`groundswell in-context ...`. Raises ConfigError for a user's mistake."""
    if arguments[:1] == ["write"] and not {"-h", "--help"} & set(arguments):  # tyro would tell a wrong field at length
        fields = split_dotted(arguments)[0]
        Fields().with_overrides({path: value for path, value in fields.items() if path.startswith("task.")})
    return tyro.extras.subcommand_cli_from_dict(
        {"write": write, "ask": ask, "score": score},
        prog="groundswell in-context",
        description=__doc__,
        args=list(arguments),
    )


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
