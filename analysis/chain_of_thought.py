"""Evaluation of networks that answer with a chain of thought, without one, or with states in its place: exact match,
perplexity, and speed (Deng et al. 2023, arXiv 2311.01460, section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import pandas as pd
from pydantic import Field

from analysis.chain_answering import Answerer, Forced, Questions, measure_speed
from analysis.circuit_evaluation import choose_split
from groundswell.experiment import Experiment
from groundswell.probes import Findings, Opened, Probe
from groundswell.protocols import Model, Objective, Parameters, Split
from groundswell.training.pack import build_dataset
from models.chain_emulator import ThoughtEmulator
from tasks.chain_of_thought import ChainOfThought
from tasks.chain_text import Example

WRONG_SHOWN = 20


class ChainOfThoughtEvaluation(Probe):
    """Exact match of decoded answers, perplexity and token accuracy, and examples per second.

    A student is given its teacher's true states. Relative speeds are to answering without a chain, and without an
    emulator, with the same network on the same rows. `chain/truncated` is the share of rows that were cut off.
    """

    headlines: ClassVar[tuple[str, ...]] = ("chain/exact_match", "chain/truncated", "chain/relative_speed")

    split: str = Field("test", description="an evaluation split of the task, or train")
    max_examples: int | None = Field(None, gt=0, description="the first so many of the split; none: all")
    max_new_tokens: int | None = Field(
        None,
        gt=0,
        description="most tokens of a chain with its answer; none: as the task's longest text (published: 128)",
    )
    num_beams: int = Field(1, gt=0, description="beams of the search; 1: greedy")
    batch_size: int = Field(64, gt=0, description="rows decoded together")
    timed_examples: int = Field(32, ge=0, description="the first so many of the split; 0: speed is not measured")

    def objection(self, experiment: Experiment) -> str | None:
        if not isinstance(experiment.task, ChainOfThought):
            return f"task {type(experiment.task).__name__} has no chain of thought"
        if isinstance(experiment.model, ThoughtEmulator):
            return "an emulator gives states, no answers; couple it with a student"
        return None

    def run(self, opened: Opened) -> Findings:
        """Raises ConfigError for a split that the task does not have."""
        e = opened.experiment
        assert isinstance(e.task, ChainOfThought)
        split = choose_split(build_dataset(e), self.split, self.max_examples).to(opened.device)
        examples = e.task.texts(self.split)[: len(split)]
        answerer = self.answerer(e.model, opened.parameters, e.task, e.objective, opened.step)
        return self.evaluate(answerer, split, examples)

    def answerer(
        self,
        model: Model,
        parameters: Parameters,
        task: ChainOfThought,
        objective: Objective | None = None,
        step: int = 0,
    ) -> Answerer:
        return Answerer(model, parameters, task, objective, step, self.num_beams, self.max_new_tokens)

    def evaluate(self, answerer: Answerer, split: Split, examples: Sequence[Example]) -> Findings:
        batches = _batches(answerer, split, examples, self.batch_size)
        found = _decoded(answerer, batches)
        right = found["given"] == [example.answer for example in examples]
        scalars = {
            "exact_match": float(right.mean()),
            "truncated": float(found["truncated"].mean()),
            "tokens_per_answer": float(found["tokens"].mean()),
            "examples": len(examples),
            **_forced(answerer, split, self.batch_size),
        }
        if self.timed_examples:
            timed = split.select(slice(0, self.timed_examples)), examples[: self.timed_examples]
            single = measure_speed(answerer, _batches(answerer, *timed, 1))
            batched = measure_speed(answerer, _batches(answerer, *timed, self.batch_size))
            scalars |= {
                "throughput_batch_1": single.examples_per_second,
                "throughput_batched": batched.examples_per_second,
                "relative_speed": single.relative,
                "relative_speed_batched": batched.relative,
            }
        wrong = [
            {"question": example.question, "expected": example.answer, "given": given}
            for example, given, is_right in zip(examples, found["given"], right, strict=True)
            if not is_right
        ]
        table = pd.DataFrame(wrong[:WRONG_SHOWN], columns=["question", "expected", "given"])
        return Findings({f"chain/{name}": value for name, value in scalars.items()}, tables={"wrong_answers": table})


def _forced(answerer: Answerer, split: Split, size: int) -> dict[str, float]:
    """Means over all tokens that are learned, those of the chain too."""
    parts = [answerer.forced(split.select(slice(start, start + size))) for start in range(0, len(split), size)]
    total = Forced(*(sum(column) for column in zip(*parts, strict=True)))
    return {"perplexity": math.exp(total.loss / total.tokens), "token_accuracy": total.right / total.tokens}


def _batches(answerer: Answerer, split: Split, examples: Sequence[Example], size: int) -> list[Questions]:
    answers = [example.answer for example in examples]
    parts = [slice(start, start + size) for start in range(0, len(answers), size)]
    return [answerer.questions(split.select(part), answers[part]) for part in parts]


def _decoded(answerer: Answerer, batches: Sequence[Questions]) -> pd.DataFrame:
    """One row an example: given (text), tokens, truncated."""
    parts = []
    for questions in batches:
        decoded = answerer.answer(questions)
        parts.append(
            pd.DataFrame(
                {
                    "given": [answerer.task.answer_of(row) for row in decoded.rows()],
                    "tokens": decoded.counts.tolist(),
                    "truncated": decoded.truncated.tolist(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
