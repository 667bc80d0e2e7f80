"""Scores of language models' answers to the hard comparison queries, beside a trained transformer's and the published.

Answers are files {name}_[retrieval_]{directna|cot}_{k}.txt, what is right is answer_{k}.txt; no other file is needed,
so a folder of the original can be scored too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from analysis.in_context_prompts import CONTEXTS, STYLES, read_queries
from groundswell.config import ConfigError
from groundswell.files import check_name
from groundswell.probes import open_checkpoint
from groundswell.report import Report
from groundswell.rundir import RunFolder

YOUNGER, SAME_AGE, OLDER, CANNOT_DECIDE, INVALID = 0, 1, 2, 3, -1
WORDS = {"younger": YOUNGER, "same age": SAME_AGE, "older": OLDER, "cannot decide": CANNOT_DECIDE}
NUMBER = r"(?P<k>0|[1-9]\d*)"
ANSWER_NAME = re.compile(rf"(?P<model>.+?)_(?P<retrieval>retrieval_)?(?P<style>directna|cot)_{NUMBER}\.txt")
GOLD_NAME = re.compile(rf"answer_{NUMBER}\.txt")
SHARES = ("correct", "wrong", "cannot decide", "invalid")
PUBLISHED = (  # model, context, style, correct, cannot decide, invalid
    ("GPT-4-Turbo", "retrieval", "direct", 0.333, 0.0, math.nan),
    ("GPT-4-Turbo", "retrieval", "CoT", 0.313, 0.127, 0.04),
    ("Gemini-1.5-Pro", "all facts", "direct", 0.287, 0.2, math.nan),
    ("Gemini-1.5-Pro", "all facts", "CoT", 0.113, 0.707, math.nan),
    ("Gemini-1.5-Pro", "retrieval", "direct", 0.373, 0.033, math.nan),
    ("Gemini-1.5-Pro", "retrieval", "CoT", 0.12, 0.587, math.nan),
    ("grokked transformer", "its weights", "-", 0.993, math.nan, math.nan),
)
NUM_PUBLISHED = 150


class Setting(NamedTuple):
    model: str
    context: str  # as in tables
    style: str


# ---- what an answer says ----


def parse(text: str, style: str, strict: bool = False) -> int:
    """An answer's label, CANNOT_DECIDE or INVALID. `style` as in tables."""
    if style == "CoT":
        return parse_strict(_final_answer(text)) if strict else parse_cot(text)
    return parse_strict(text) if strict else parse_direct(text)


def parse_direct(text: str) -> int:
    """The published rule; case counts."""
    label = _label(text)
    return CANNOT_DECIDE if label == INVALID and "cannot decide" in text else label


def parse_cot(text: str) -> int:
    """The published rule: behind the last "final answer:", in any case."""
    text = _final_answer(text)
    return CANNOT_DECIDE if "cannot decide" in text else _label(text)


def parse_strict(text: str) -> int:
    """Exactly one of the four answers may be named, in any case."""
    found = [code for words, code in WORDS.items() if re.search(rf"\b{words}\b", text.lower())]
    return found[0] if len(found) == 1 else INVALID


def _final_answer(text: str) -> str:
    """Empty, and so invalid, where there is none."""
    return text.lower().rpartition("final answer:")[2] if "final answer:" in text.lower() else ""


def _label(text: str) -> int:
    younger, older = "younger" in text, "older" in text
    if younger != older:
        return YOUNGER if younger else OLDER
    return SAME_AGE if "same age" in text else INVALID


# ---- files ----


def answer_file(model: str, context: str, style: str, k: int) -> str:
    """`context` and `style` as in file names."""
    return f"{model}_{'retrieval_' if context == 'retrieval' else ''}{style}_{k}.txt"


def check_model_name(name: str) -> str:
    """`name`, if answers of that name are read back as its own. Raises ConfigError."""
    match = ANSWER_NAME.fullmatch(answer_file(check_name(name, "--name"), "prompt", "cot", 0))
    if name in CONTEXTS or match is None or match["model"] != name:
        raise ConfigError(f"--name {name}: its answers could not be told from others; choose another name")
    return name


def read_gold(folder: Path) -> dict[int, int]:
    """k -> label. Raises ConfigError."""
    gold = {}
    for path in _text_files(folder):
        if match := GOLD_NAME.fullmatch(path.name):
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            if text not in ("0", "1", "2"):
                raise ConfigError(f"{path}: says {text[:40]!r}; 0 (younger), 1 (same age) or 2 (older) is expected")
            gold[int(match["k"])] = int(text)
    if not gold:
        raise ConfigError(f"{folder}: has no answer_K.txt; `groundswell in-context write` makes such a folder")
    return dict(sorted(gold.items()))


def read_answers(folder: Path, gold: Mapping[int, int]) -> dict[Setting, dict[int, str]]:
    """Setting -> k -> text. Raises ConfigError for a .txt file that is neither an answer nor a prompt."""
    found: dict[Setting, dict[int, str]] = {}
    for path in _text_files(folder):
        match = ANSWER_NAME.fullmatch(path.name)
        if GOLD_NAME.fullmatch(path.name) or (match and match["model"] in CONTEXTS):
            continue
        if match is None:
            form = "NAME_[retrieval_]{directna|cot}_K.txt"
            raise ConfigError(f"{path}: not the name of an answer; name it {form} or take it out of the folder")
        k = int(match["k"])
        if k not in gold:
            raise ConfigError(f"{path}: there is no answer_{k}.txt to score it against")
        context = CONTEXTS["retrieval" if match["retrieval"] else "prompt"]
        setting = Setting(match["model"], context, STYLES[match["style"]])
        found.setdefault(setting, {})[k] = path.read_text(encoding="utf-8", errors="replace")
    if not found:
        raise ConfigError(f"{folder}: has no answers of a model; `groundswell in-context ask` writes them there")
    return dict(sorted(found.items()))


def _text_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    return sorted(path for path in folder.iterdir() if path.suffix == ".txt")


# ---- the table ----


def score_report(folder: Path, run: RunFolder | None = None, strict: bool = False) -> Report:
    """One row a setting, then the trained transformer, chance, and what was published. Raises ConfigError."""
    gold = read_gold(folder)
    rows = [_score(setting, texts, gold, strict) for setting, texts in read_answers(folder, gold).items()]
    if run is not None:
        rows.append(score_transformer(folder, run, gold))
    chance = {"model": "chance", "context": "-", "style": "-", "queries": len(gold), "answered": len(gold)}
    rows.append({**chance, "missing": 0, "correct": 1 / 3, "wrong": 2 / 3, "source": "uniform guess"})
    rows += [_published(*row) for row in PUBLISHED]
    columns = ["model", "context", "style", "queries", "answered", "missing", *SHARES, "source"]
    rules = "exactly one of the four answers, in any case" if strict else "the published rules"
    remarks = (
        f"read by {rules}; correct, wrong, cannot decide and invalid are shares of the answered queries (a missing "
        "file is no answer); only correct counts as accuracy",
        f"chance varies by {math.sqrt(2 / 9 / len(gold)):.3f} (one standard error) over {len(gold)} queries",
        "published: arXiv 2405.15071, its own queries, names and prompt texts; 0.993 comes from a third party, the "
        "paper's text says near-perfect",
        "what it shows: whether facts that training has put into weights answer queries which a model that reads the "
        "same facts gets wrong. What it does not: who reasons better. The transformer was trained on these very facts "
        "and this one form of question, the language model meets both for the first time in its prompt",
    )
    return Report("Hard comparisons: facts in the weights or in the context", pd.DataFrame(rows)[columns], {}, remarks)


def _score(setting: Setting, texts: Mapping[int, str], gold: Mapping[int, int], strict: bool) -> dict[str, Any]:
    said = {k: parse(text, setting.style, strict) for k, text in texts.items()}
    counts = {
        "correct": sum(label == gold[k] for k, label in said.items()),
        "wrong": sum(label not in (gold[k], CANNOT_DECIDE, INVALID) for k, label in said.items()),
        "cannot decide": sum(label == CANNOT_DECIDE for label in said.values()),
        "invalid": sum(label == INVALID for label in said.values()),
    }
    shares = {name: count / len(said) for name, count in counts.items()}
    numbers = {"queries": len(gold), "answered": len(said), "missing": len(gold) - len(said)}
    return {**setting._asdict(), **numbers, **shares, "source": "here"}


def score_transformer(folder: Path, run: RunFolder, gold: Mapping[int, int]) -> dict[str, Any]:
    """The run's newest checkpoint on the same queries, greedily: all answer tokens must be right. Raises ConfigError
    if it was trained on other data than the folder was written from."""
    described = read_queries(folder)
    opened = open_checkpoint(run)
    dataset = opened.experiment.task.build()
    if dataset.manifest["sha256"] != described["sha256"]:
        raise ConfigError(
            f"--run {run.run_id}: was trained on other data than {folder} asks about; "
            f"`groundswell in-context write FOLDER --run {run.run_id}` asks about its own"
        )
    queries = dataset.evaluation["test_hard"].select(torch.tensor(list(gold)))
    tokens, positions = queries.tokens.unsqueeze(0), queries.positions.unsqueeze(0)
    with torch.no_grad():
        logits = opened.experiment.model.answer_logits(opened.parameters, tokens, positions)
    correct = (logits[0].argmax(-1) == queries.targets).all(-1).float().mean().item()
    return {
        "model": f"run {run.run_id}, step {opened.step}",
        "context": "its weights",
        "style": "-",
        "queries": len(gold),
        "answered": len(gold),
        "missing": 0,
        "correct": correct,
        "wrong": 1 - correct,
        "source": "here",
    }


def _published(
    model: str, context: str, style: str, correct: float, cannot_decide: float, invalid: float
) -> dict[str, Any]:
    numbers = {"queries": NUM_PUBLISHED, "answered": NUM_PUBLISHED, "missing": 0}
    shares = {"correct": correct, "cannot decide": cannot_decide, "invalid": invalid}
    return {"model": model, "context": context, "style": style, **numbers, **shares, "source": "published"}
