"""Causal tracing: which states carry what an answer needs (Wang et al. 2024, arXiv 2405.15071, sections 3.3 and 4.2).

A state of the run is replaced by that of a counterfactual prompt, which asks for another answer; the network runs on
from there. What happens to the rank of the right token at a target state (by default the answer after the last layer)
is the replaced state's effect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from analysis.logit_lens import all_readings, look, mean_reciprocal_rank
from analysis.patching import continued, head_patches, joined_prefix, mlp_patches, read_tokens
from groundswell.config import ConfigError
from groundswell.experiment import Experiment
from groundswell.probes import Findings, Opened, Probe
from groundswell.protocols import Parameters
from groundswell.rundir import RunFolder
from models import cached
from models.decoder import Decoder
from tasks.tracing import Role, Traceable, TracingExamples

Part = Literal["states", "heads", "mlps"]
BATCH_ROWS = (
    2**13
)  # token rows of patched copies computed at once: large enough for full speed, small enough for caches


class CausalTracing(Probe):
    """Effects of replacing each role's states after each layer (and, if asked for, single heads and MLPs).

    Scalars: `trace/<target>/<role>/layer_<l>/altered` is the published causal strength, the share of examples whose
    right token is not ranked first after the patch, whatever it was before; `.../strength` counts only examples that
    the unpatched network gets right (`trace/<target>/n_correct` of them). The table has both, the share whose first
    token changes at all, the MRR after the patch, for heads and MLPs too.
    """

    headlines: ClassVar[tuple[str, ...]] = ("trace/*/n_correct", "trace/skipped")

    split: str = Field("train_inferred", description="evaluation split to take examples from")
    num_examples: int = Field(300, gt=0, description="examples, drawn by seed; the same for all checkpoints")
    seed: int = Field(0, ge=0, description="of the choice of examples and of counterfactuals")
    targets: tuple[str, ...] = Field(
        ("answer",),
        description="states to look at: answer, <fact>@<layer> (for instance b@5), or S[<layer>,<position>] as in the "
        "paper (S[5,r1], S[5,e2])",
    )
    parts: tuple[Part, ...] = Field(
        ("states",), description="what is replaced: whole states, outputs of single heads, outputs of MLPs"
    )
    examples: bool = Field(False, description="write the ranks of each example as JSON, named as the original does")
    held_out: str = Field("test_inferred_iid", description="split whose accuracy marks grokking in the figures")

    def objection(self, experiment: Experiment) -> str | None:
        if not isinstance(experiment.model, Decoder):
            return f"model {type(experiment.model).__name__} is no Decoder: it has no layers to patch"
        if not isinstance(experiment.task, Traceable):
            return f"task {type(experiment.task).__name__} has no tracing roles; composition and comparison have"
        return None

    def run(self, opened: Opened) -> Findings:
        model = opened.experiment.model
        assert isinstance(model, Decoder)
        examples, normal = look(opened, self.split, self.num_examples, self.seed)
        effects = trace(model, opened.parameters, examples, self.targets, self.parts, normal)
        table = summarise(effects, examples)
        arrays = {f"{e.part}-{e.target}-{e.role}".replace("@", "_layer_"): e.ranks for e in effects}
        texts = {"examples.json": json.dumps(per_example(effects, examples))} if self.examples else {}
        return Findings(scalars(table), arrays, {"effects": table}, texts=texts)

    def over_time(self, folder: RunFolder, answers: Mapping[int, Path]) -> Findings | None:
        from analysis.circuits import tracing_over_time

        return tracing_over_time(folder, answers, self.split, self.held_out)


@dataclass(frozen=True)
class Target:
    """A state, and for each example the token whose rank there is looked at."""

    name: str
    layer: int
    position: int
    tokens: Tensor  # [N]
    ranks: Tensor  # [N] in the unpatched run
    best: Tensor  # [N] first token of the unpatched run


@dataclass(frozen=True)
class Effect:
    """On one target, of the patches of one part (L layers, counted from 1, of C copies each) for one role."""

    target: str
    part: Part
    role: str
    before: np.ndarray  # [N] rank before
    ranks: np.ndarray  # [L, C, N] rank after: int32
    changed: np.ndarray  # [L, C, N] is the first token another one


# ---- the computation ----


@torch.no_grad()
def trace(
    model: Decoder,
    parameters: Parameters,
    examples: TracingExamples,
    targets: Sequence[str] = ("answer",),
    parts: Sequence[Part] = ("states",),
    normal: cached.Pass | None = None,
) -> list[Effect]:
    """All patches of all roles. `normal`: the pass over the prompts, where it is there already.

    Raises ConfigError for a target that cannot be read.
    """
    device = next(iter(parameters.values())).device
    normal = normal or cached.forward(model, parameters, examples.prompts[None].to(device))
    aims = [find_target(name, model, parameters, examples, normal) for name in targets]
    effects = []
    for role_name, role in examples.roles.items():
        other = cached.forward(model, parameters, role.prompts[None].to(device), normal, role.start)
        for part in parts:
            found = _Patching(model, parameters, normal, other, role, part).measure(aims)
            for aim, (ranks, best) in zip(aims, found, strict=True):
                changed = best != aim.best
                effects.append(Effect(aim.name, part, role_name, *(_array(x) for x in (aim.ranks, ranks, changed))))
    return effects


def _array(x: Tensor) -> np.ndarray:
    return (x if x.dtype == torch.bool else x.to(torch.int32)).cpu().numpy()


def find_target(
    name: str, model: Decoder, parameters: Parameters, examples: TracingExamples, normal: cached.Pass
) -> Target:
    """Raises ConfigError for a name that is none, naming those there are."""
    depth, readings = model.num_effective_layers, all_readings(examples)
    state = re.fullmatch(r"S\[(\d+), ?(\w+)\]", name)
    reading = re.fullmatch(r"(\w+)(?:@(\d+))?", name)
    tokens: Tensor | None = None
    if state and state[2] in examples.position_names:
        layer, position = int(state[1]), examples.position_names.index(state[2])
        held = [r.tokens for label, r in readings.items() if r.position == position and label != "answer"]
        tokens = held[0] if held else None
    elif reading and reading[1] in readings:
        layer, position = int(reading[2] or depth), readings[reading[1]].position
        tokens = readings[reading[1]].tokens
    else:
        known = ", ".join([*readings, *(f"S[<layer>,{label}]" for label in examples.position_names)])
        raise ConfigError(f"targets: '{name}' is no state to look at; there are {known}")
    if not 1 <= layer <= depth:
        raise ConfigError(f"targets: '{name}' needs a layer from 1 to {depth}")
    states = normal.states[layer][:, :, position]
    any_token = torch.zeros(len(examples), dtype=torch.int64, device=states.device)
    best = read_tokens(model, parameters, states, any_token)[1][0]
    tokens = best if tokens is None else tokens.to(states.device)  # nothing is known of it: what it says unpatched
    ranks = read_tokens(model, parameters, states, tokens)[0][0]
    return Target(name, layer, position, tokens, ranks, best)


@dataclass(frozen=True)
class _Patching:
    """The patches of one part for one role, after each layer."""

    model: Decoder
    parameters: Parameters
    normal: cached.Pass
    other: cached.Pass
    role: Role
    part: Part

    @property
    def start(self) -> int:
        """The first position that has to be computed."""
        return self.role.stop if self.part == "states" else self.role.start

    @property
    def copies(self) -> int:
        """Of each layer."""
        return self.model.num_heads if self.part == "heads" else 1

    def num_layers(self, aim: Target) -> int:
        """Layers whose patches say something about the target: its own state is no cause of itself."""
        return aim.layer - (self.part == "states")

    def select(self, rows: slice) -> _Patching:
        """For some of the examples."""
        normal, other = (
            cached.Pass(*([x[:, rows] for x in tensors] for tensors in (run.states, run.key_values, run.mixed)))
            for run in (self.normal, self.other)
        )
        return replace(self, normal=normal, other=other)

    def measure(self, aims: Sequence[Target]) -> list[tuple[Tensor, Tensor]]:
        """For each target: rank and first token after each patch, [L, C, N] each."""
        last = max(aim.layer for aim in aims)
        _, total, length, _ = self.normal.states[0].shape
        size = max(1, BATCH_ROWS // (self.copies * last * max(length - self.start, 1)))
        found: dict[str, list[tuple[Tensor, Tensor]]] = {aim.name: [] for aim in aims}
        for low in range(0, total, size):
            rows = slice(low, min(low + size, total))
            for aim, after in self.select(rows).targets(aims, last):
                after = after[: self.num_layers(aim) * self.copies]
                found[aim.name].append(read_tokens(self.model, self.parameters, after, aim.tokens[rows]))
        shapes = [(self.num_layers(aim), self.copies, total) for aim in aims]
        whole = [[torch.cat(parts, dim=1) for parts in zip(*found[aim.name], strict=True)] for aim in aims]
        return [(ranks.view(shape), best.view(shape)) for (ranks, best), shape in zip(whole, shapes, strict=True)]

    def targets(self, aims: Sequence[Target], last: int) -> Iterator[tuple[Target, Tensor]]:
        """Each target's states [copies of all layers so far, B, d] after the patches."""
        states = self.part == "states"
        for aim in aims:
            if aim.position < self.start:  # no patch reaches it but that of its own column
                run = self.other if states and aim.position >= self.role.start else self.normal
                yield aim, run.states[aim.layer][:, :, aim.position].expand(aim.layer * self.copies, -1, -1)
        free = [aim for aim in aims if aim.position >= self.start]
        if not free or (states and last == 1):
            yield from ((aim, self.normal.states[0][:0, :, aim.position]) for aim in free)
            return
        end = self.normal.states[0].shape[2] - 1
        at_end = states and all(aim.position == end for aim in free if aim.layer == last)
        prefix = joined_prefix(self.normal, self.other if states else self.normal, self.role.start, self.start)
        for layer, x in continued(self.model, self.parameters, prefix, self._entering(last), last, at_end):
            yield from ((aim, x[:, :, aim.position - end - 1]) for aim in free if aim.layer == layer)

    def _entering(self, last: int) -> dict[int, Tensor]:
        """Layer -> states of the copies patched there, from `start` on."""
        if self.part == "states":
            return {layer: self.normal.states[layer][:, :, self.start :] for layer in range(1, last)}
        patch = head_patches if self.part == "heads" else mlp_patches
        runs, span = (self.normal, self.other), (self.role.start, self.role.stop)
        return {layer: patch(self.model, self.parameters, *runs, layer, *span) for layer in range(1, last + 1)}


# ---- what it amounts to ----


def summarise(effects: Sequence[Effect], examples: TracingExamples) -> pd.DataFrame:
    """One row a target, part, role, layer and head (-1: none). Examples without a counterfactual are left out.

    altered: share with rank > 0 after the patch (as published). strength: the same among the `n_correct` with rank 0
    before it. changed: share whose first token is another one. mrr_before, mrr: of the right token. n, skipped.
    """
    rows: list[dict[str, Any]] = []
    for effect in effects:
        possible = examples.roles[effect.role].possible
        before = effect.before[possible]
        for layer, by_copy in enumerate(effect.ranks, start=1):
            for copy, ranks in enumerate(by_copy[:, possible]):
                right = ranks[before == 0]
                rows.append(
                    {
                        "target": effect.target,
                        "part": effect.part,
                        "role": effect.role,
                        "layer": layer,
                        "head": copy if effect.part == "heads" else -1,
                        "altered": _mean(ranks != 0),
                        "strength": _mean(right != 0),
                        "changed": _mean(effect.changed[layer - 1, copy, possible]),
                        "mrr_before": float(mean_reciprocal_rank(before)) if len(before) else float("nan"),
                        "mrr": float(mean_reciprocal_rank(ranks)) if len(ranks) else float("nan"),
                        "n": len(ranks),
                        "n_correct": len(right),
                        "skipped": int((~possible).sum()),
                    }
                )
    return pd.DataFrame(rows)


def _mean(x: np.ndarray) -> float:
    return float(x.mean()) if len(x) else float("nan")


def scalars(table: pd.DataFrame) -> dict[str, float]:
    """Of whole states; measures without examples are left out."""
    found: dict[str, float] = {"trace/skipped": float(table.groupby("role")["skipped"].first().sum())}
    for row in table[table["part"] == "states"].to_dict("records"):
        target = row["target"].replace("@", "_layer_")
        found[f"trace/{target}/n_correct"] = float(row["n_correct"])
        for measure in ("altered", "strength", "changed"):
            if not np.isnan(row[measure]):
                found[f"trace/{target}/{row['role']}/layer_{row['layer']}/{measure}"] = row[measure]
    return found


def per_example(effects: Sequence[Effect], examples: TracingExamples) -> list[dict[str, int]]:
    """The published record's names: `rank_before`, and `<role>_<layer>` for the answer; without skipped patches."""
    mine = [effect for effect in effects if effect.part == "states" and effect.target == "answer"]
    records: list[dict[str, int]] = []
    for n in range(len(examples)):
        record = {"rank_before": int(mine[0].before[n])} if mine else {}
        for effect in mine:
            if len(examples.roles[effect.role].candidates[n]):
                record |= {f"{effect.role}_{layer}": int(x[0, n]) for layer, x in enumerate(effect.ranks, start=1)}
        records.append(record)
    return records
