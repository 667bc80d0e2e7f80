"""How a network comes from a question to an answer: with a chain of thought that it writes, with states in place of
one, or at once; and how long that takes beside answering at once.

Shapes: B rows, P prompt tokens, L layers, d width. Parameters [1, *shape].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import IGNORE, Model, Objective, Parameters, Split
from models.beams import beam_search
from models.chain_coupled import CoupledStudent, part_of
from models.chain_decoding import Decoded, Ending, Prompts, Stream, decode_anyhow, decode_greedily, within_table
from models.chain_student import MindReadingStudent
from models.decoder import Decoder
from models.objectives import token_losses
from models.stepwise import StepwiseInternalization, without_chain
from tasks.chain_of_thought import ChainOfThought, first_separator

ROUNDS = 5  # of measuring speed; the median counts


class Questions(NamedTuple):
    """What is read before the answers of B rows, and what the answers must be."""

    prompts: Prompts
    bare: Prompts  # questions alone
    states: Tensor | None  # [B, L, d], a teacher's, for a student
    answers: Sequence[str]
    counts: Tensor  # [B] tokens of the right answers, the closing separator included


class Forced(NamedTuple):
    """Sums over tokens."""

    loss: float  # nats
    right: int
    tokens: int


@dataclass(frozen=True)
class Answerer:
    """A network with the way it answers in, by its class and the task's form."""

    model: Model
    parameters: Parameters
    task: ChainOfThought
    objective: Objective | None = None  # what it was trained with
    step: int = 0  # and how long: a chain that is being internalised is as short as it has become at this step
    num_beams: int = 1
    max_new_tokens: int | None = None

    @torch.no_grad()
    def questions(self, batch: Split, answers: Sequence[str]) -> Questions:
        """Rows [B, ...] of the task's form. A student's states are read here: they are given, not found."""
        taught = isinstance(self.model, MindReadingStudent)
        bare = _cut(batch.tokens, first_separator(batch.tokens, self.task.separator))
        given = self.task.form == "hidden" and not taught  # the chain is part of what is read
        prompts = _cut(batch.tokens, batch.positions[:, 0]) if given else bare._replace(gaps=self._gaps(batch))
        states = None
        if isinstance(self.model, MindReadingStudent):
            states = self.model.taught(batch.tokens[None], batch.positions[None]).states[0]
        counts = (batch.targets[:, self.task.answer().columns] != IGNORE).sum(1)
        return Questions(prompts, bare, states, answers, counts)

    @torch.no_grad()
    def answer(self, questions: Questions) -> Decoded:
        """Raises ConfigError for a question without room, and where beams are asked of a model that has none."""
        prompts, states = questions.prompts, questions.states
        ending = Ending(self.task.separator, 2 if self.task.form == "explicit" else 1, self._limit(prompts))
        network = self._network()
        if network is None:
            if self.num_beams > 1:
                name = type(self.model).__name__
                raise ConfigError(f"num_beams {self.num_beams}: {name} decodes greedily only; set num_beams=1")
            return decode_anyhow(self.model, self.parameters, prompts, ending)
        if isinstance(self.model, CoupledStudent):
            last = prompts.lengths[None] - 1
            states = self.model.states(self.parameters, prompts.tokens[None], last)[0]
        stream = Stream(*network, prompts, states)
        return beam_search(stream, ending, self.num_beams) if self.num_beams > 1 else decode_greedily(stream, ending)

    @torch.no_grad()
    def answer_at_once(self, questions: Questions) -> Decoded:
        """What answering without a chain costs: the same network goes on from the question with as many tokens as the
        right answer has. What it says does not matter."""
        ending = Ending(self.task.separator, None, questions.counts)
        network = self._network()
        if network is None:
            return decode_anyhow(self.model, self.parameters, questions.bare, ending)
        limit = within_table(network[1], questions.bare, questions.counts)
        return decode_greedily(Stream(*network, questions.bare), ending._replace(limit=limit))

    def exact_matches(self, decoded: Decoded, answers: Sequence[str]) -> list[bool]:
        return [self.task.answer_of(row) == answer for row, answer in zip(decoded.rows(), answers, strict=True)]

    @torch.no_grad()
    def forced(self, batch: Split) -> Forced:
        """Rows [B, ...] with the right text before each token; all tokens that are learned count."""
        rows = Split(batch.tokens[None], batch.positions[None], batch.targets[None])
        options: dict[str, Any] = {}
        if isinstance(self.objective, StepwiseInternalization):
            removed = torch.full(rows.tokens.shape[:2], self._removed(self.objective), device=rows.tokens.device)
            rows, _, places = without_chain(rows, removed, self.objective.side)
            options = {"places": places} if self.objective.keep_positions else {}
        logits = self.model.answer_logits(self.parameters, rows.tokens, rows.positions, **options)
        losses, right = token_losses(logits, rows.targets)
        counted = rows.targets != IGNORE
        return Forced(float(losses.double().sum()), int((right & counted).sum()), int(counted.sum()))

    def _removed(self, objective: StepwiseInternalization) -> int:
        """Tokens that chains were without in the last update."""
        return objective.removed(max(0, self.step - 1))

    def _gaps(self, batch: Split) -> Tensor | None:
        """Positions that stay free where a chain was taken out [B]; those on its right side are not known before it has
        been written."""
        if not isinstance(self.objective, StepwiseInternalization) or not self.objective.keep_positions:
            return None
        removed = self._removed(self.objective)
        chain = batch.positions[:, 0] - first_separator(batch.tokens, self.task.separator) - 1
        if self.objective.side == "right" and bool((chain > removed).any()) and removed:
            raise ConfigError(
                f"step {self.step}: objective.side=right with keep_positions can be decoded only without any chain; "
                "ask a later checkpoint"
            )
        return chain.clamp(max=removed)

    def _network(self) -> tuple[Decoder, Parameters] | None:
        """What writes the answer, where its keys and values can be kept."""
        if isinstance(self.model, CoupledStudent):
            return self.model.decoder, part_of(self.parameters, "student")
        if isinstance(self.model, MindReadingStudent):
            return self.model.decoder, self.parameters
        return (self.model, self.parameters) if isinstance(self.model, Decoder) else None

    def _limit(self, prompts: Prompts) -> Tensor:
        """New tokens of each row. Unless a number is set, a row may become as long as the longest text of the task."""
        if self.max_new_tokens is None:
            limit = self.task.max_length + 1 - prompts.lengths
        else:
            limit = torch.full_like(prompts.lengths, self.max_new_tokens)
        network = self._network()
        return limit if network is None else within_table(network[1], prompts, limit)


def _cut(tokens: Tensor, last: Tensor) -> Prompts:
    """tokens [B, T] up to places [B]."""
    return Prompts(tokens[:, : int(last.max()) + 1], last + 1)


# ---- speed ----


class Speed(NamedTuple):
    examples_per_second: float
    relative: float  # to answering at once


def measure_speed(answerer: Answerer, batches: Sequence[Questions], rounds: int = ROUNDS) -> Speed:
    """Medians over rounds. In each, every batch is answered both ways, one right after the other.

    The clock starts before the emulator's or the prompt's pass and stops when answers have been compared.
    """
    ways: tuple[Callable[[Questions], Decoded], ...] = (answerer.answer, answerer.answer_at_once)
    for way in ways:
        _seconds(answerer, way, batches[0])
    totals = [[0.0, 0.0] for _ in range(rounds)]
    for total in totals:
        for batch in batches:
            for number, way in enumerate(ways):
                total[number] += _seconds(answerer, way, batch)
    examples = sum(len(batch.answers) for batch in batches)
    seconds = median(own for own, _ in totals)
    return Speed(examples / seconds, median(other / own for own, other in totals))


def _seconds(answerer: Answerer, way: Callable[[Questions], Decoded], batch: Questions) -> float:
    start = time.perf_counter()
    answerer.exact_matches(way(batch), batch.answers)  # reads the tokens, so it waits for the device
    return time.perf_counter() - start
