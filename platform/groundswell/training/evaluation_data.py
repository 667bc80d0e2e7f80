"""The evaluation splits of a pack's members."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groundswell.protocols import Answer, Dataset, Split


class EvaluationData:
    """All evaluation splits of some members end to end, so that one forward pass serves them: tensors [K, N, ...]."""

    def __init__(self, datasets: Sequence[Dataset], rows: Sequence[int], limit: int, device: torch.device) -> None:
        self.rows = list(rows)
        self.pieces: dict[str, slice] = {}
        start = 0
        for name, split in datasets[0].evaluation.items():
            if len(split):
                self.pieces[name] = slice(start, start + min(len(split), limit))
                start = self.pieces[name].stop
        unique = list({id(dataset): dataset for dataset in datasets}.values())
        shared = len(unique) == 1  # then one copy serves all

        def whole(name: str) -> Tensor:
            ends = [torch.cat([getattr(d.evaluation[p], name)[:limit] for p in self.pieces]) for d in unique]
            if shared:
                return ends[0].to(device).expand(len(datasets), *ends[0].shape)
            order = {id(dataset): end for dataset, end in zip(unique, ends, strict=True)}
            return torch.stack([order[id(dataset)] for dataset in datasets]).to(device)

        self.examples = Split(whole("tokens"), whole("positions"), whole("targets"))
        kinds = [dataset.answer.token_kinds for dataset in datasets]
        stacked = None if kinds[0] is None else torch.stack([kind for kind in kinds if kind is not None])
        self.answer = Answer(datasets[0].answer.columns, stacked).to(device)
