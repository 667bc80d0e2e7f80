"""How a batch is cut for workers and micro-batches, and how the parts' losses make up the whole one's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from groundswell.protocols import Objective, Split
from groundswell.scaling.engines import Piece


def micro_batches(batch_size: int, num_workers: int, micro_batch: int | None) -> tuple[int, int]:
    """-> examples of a micro-batch, micro-batches of each worker in every update."""
    each = -(-batch_size // num_workers)
    size = min(each, micro_batch or each)
    return size, -(-each // size)


def cut(
    rows: Tensor,
    place: tuple[int, int],
    micro_batches: tuple[int, int],
    objective: Objective,
    examples: Callable[[Tensor], Split],
) -> list[Piece]:
    """One worker's micro-batches of data rows [B]. All workers have equally many: those beyond the worker's rows hold
    one row that counts nothing.

    `place`: rank, number of workers. `micro_batches`: examples of one, how many. `examples`: rows -> [1, B, ...].
    """
    (rank, num_workers), (size, number) = place, micro_batches
    whole = objective.weight(examples(rows)).clamp(min=1)
    chunks = [chunk for chunk in rows.tensor_split(num_workers)[rank].split(size) if len(chunk)]
    batches = [examples(chunk) for chunk in chunks]
    pieces: list[Piece] = [(batch, (objective.weight(batch) / whole)[0]) for batch in batches]
    filler = (examples(rows[:1]), torch.zeros((), device=rows.device))
    return pieces + [filler] * (number - len(pieces))
