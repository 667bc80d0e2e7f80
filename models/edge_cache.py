"""What the whole network does on training examples, kept from one visit to the next: training sets of circuits are
small, and the network is frozen.

An example that is not there is computed alone, its clean and its corrupted row in one pass of their own length. So it
is the same to the bit whatever batch it comes in, and a run that was killed goes on as if it had not been.

Shapes: N examples, S tokens of a row, T of them up to the last answer, P before the first that differs, A answers,
V outputs, L layers, H heads, G key/value heads, h head width, d width, e embeddings.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.edge_folded import FoldedTransformer
from models.edge_ordinary import OrdinaryPass, ordinary_pass
from models.edge_sweep import Given, as_rows


class Kept(NamedTuple):
    """Of one example: of its clean row the logits, of its corrupted row the rest."""

    logits: Tensor  # [A, V]
    start: int  # P
    by_token: Tensor  # [T, ...]: what embeddings differ by, all residual streams, attention and MLP, what heads mixed
    at_answers: Tensor  # [A, ...]: the last layer's attention and MLP, the final stream, what its heads mixed
    before: Tensor  # [P, 2LGh]: keys, then values

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for x in (self.logits, self.by_token, self.at_answers, self.before))


class ReferenceCache:
    """`parts`: of one network on one device."""

    def __init__(self, parts: FoldedTransformer) -> None:
        self.parts, self.num_bytes = parts, 0
        self._kept: dict[Hashable, Kept] = {}
        self._recent: dict[Hashable, Kept] = {}  # of the last batch, for which there may be no room

    @torch.no_grad()
    def logits(self, clean: Tensor, corrupted: Tensor | None, positions: Tensor, budget: int) -> Tensor:
        """Tokens [K, B, S], positions [K, B, A] (1 for K: shared by all runs) -> logits of the whole network on the
        clean tokens [K, B, A, V]. More is kept as long as all that is kept has no more than `budget` bytes."""
        rows = as_rows(clean, corrupted, positions)
        return torch.stack([kept.logits for kept in self._examples(*rows, budget)]).unflatten(0, (-1, clean.shape[1]))

    @torch.no_grad()
    def given(self, num_runs: int, clean: Tensor, corrupted: Tensor, positions: Tensor, budget: int) -> Given:
        """What a masked pass of `num_runs` runs starts from. Arguments as of `logits`."""
        clean, other, places = as_rows(clean, corrupted, positions)
        examples = self._examples(clean, other, places, budget)
        start = min(kept.start for kept in examples)
        stop = max(len(kept.by_token) for kept in examples)
        # zeros after a row's last answer: nothing depends on them
        by_token = torch.stack([F.pad(kept.by_token, (0, 0, 0, stop - len(kept.by_token))) for kept in examples])
        graph, width = self.parts.graph, self.parts.width
        layers, mixed = graph.num_layers, graph.num_heads * self.parts.head_width
        difference, *streams = by_token.split([width] * (3 * layers - 1) + [mixed] * (layers - 1), -1)
        attention, mlp, final, last = torch.stack([kept.at_answers for kept in examples]).split(
            [width] * 3 + [mixed], -1
        )
        shape = 2 * layers, graph.num_kv_heads, self.parts.head_width
        before = torch.stack([kept.before[:start] for kept in examples]).unflatten(-1, shape)
        keys_values = before.permute(2, 3, 0, 1, 4)  # [2L, G, N, P, h]
        run = OrdinaryPass(
            residual=streams[:layers],
            keys=list(keys_values[:layers]),
            values=list(keys_values[layers:]),
            mixed=[self._by_head(x) for x in (*streams[3 * layers - 2 :], last)],
            attention=[*streams[layers : 2 * layers - 1], attention],
            mlp=[*streams[2 * layers - 1 : 3 * layers - 2], mlp],
        )
        run.final = final
        embeddings = difference[None, :, start:]
        always = None if graph.embeddings else difference
        return Given(num_runs, len(examples) // positions.shape[1], embeddings, always, run, start, stop, places)

    def _by_head(self, x: Tensor) -> Tensor:
        """[N, T, Hh] -> [H, N, T, h]."""
        return x.unflatten(-1, (self.parts.graph.num_heads, -1)).permute(2, 0, 1, 3)

    def _examples(self, clean: Tensor, corrupted: Tensor | None, positions: Tensor, budget: int) -> list[Kept]:
        """One exchange with the device, and one for each example that is not there."""
        joined = torch.cat([clean, positions] if corrupted is None else [clean, positions, corrupted], 1)
        form = clean.shape[1], corrupted is None
        keys = [(*form, row.tobytes()) for row in joined.cpu().numpy()]
        recent: dict[Hashable, Kept] = {}
        for row, key in enumerate(keys):
            kept = recent.get(key) or self._kept.get(key) or self._recent.get(key)
            if kept is None:
                own = slice(row, row + 1)
                kept = self._compute(clean[own], None if corrupted is None else corrupted[own], positions[own])
                if self.num_bytes + kept.num_bytes <= budget:
                    self._kept[key] = kept
                    self.num_bytes += kept.num_bytes
            recent[key] = kept
        self._recent = recent
        return [recent[key] for key in keys]

    def _compute(self, clean: Tensor, corrupted: Tensor | None, positions: Tensor) -> Kept:
        """Of one row each."""
        parts, stop = self.parts, int(positions.max()) + 1
        if corrupted is None:
            logits = parts.head(ordinary_pass(parts, clean[:, :stop], positions).final[0])[0]
            return Kept(logits, 0, *(logits.new_empty(0, 0) for _ in range(3)))
        pair = torch.cat([clean, corrupted])[:, :stop]
        run = ordinary_pass(parts, pair, positions.expand(2, -1))
        first, second = parts.embeddings(pair).sum(0)
        start = min(int((pair[0] == pair[1]).cumprod(0).sum()), stop - 1)
        streams = [*run.residual, *run.attention[:-1], *run.mlp[:-1]]
        mixed = [x[:, 1].transpose(0, 1).flatten(1) for x in run.mixed]  # [T, Hh], at the end [A, Hh]
        return Kept(
            parts.head(run.final[0])[0].clone(),
            start,
            torch.cat([first - second, *(x[1] for x in streams), *mixed[:-1]], -1),
            torch.cat([run.attention[-1][1], run.mlp[-1][1], run.final[1], mixed[-1]], -1),
            torch.cat([x[:, 1, :start].transpose(0, 1).flatten(1) for x in (*run.keys, *run.values)], -1),
        )
