"""Cells of a grid of problem lengths, evaluated in batches.

A row is right in the greedy sense iff, with the gold answer as context, the network's first choice is the gold token at
each place of the answer: as long as all choices are right, greedy decoding meets just these contexts. So one forward
pass grades a batch; only rows that are wrong are decoded, and only where their texts are wanted.
Shapes: N rows, T tokens, A answer places (the last one of a row is its stop token), P tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from groundswell.protocols import IGNORE, Model, Parameters, Split
from models.recurrent_cached import generate_by_length
from tasks.arithmetic_grading import exact, exact_without_end, smallest_right
from tasks.arithmetic_vocabulary import EOS

Cell = tuple[int, int]  # lengths of the first and the second operand; sorting: most digits, numbers
STRETCH = 1.125  # rows of one batch are padded to the longest one: so many times the shortest one at most
METRICS = ("accuracy", "accuracy_without_end", "token_accuracy", "first_accuracy")


def grade(choices: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """First choices and targets [N, A] (IGNORE at the end of shorter rows) -> each of METRICS, [N] float64.

    accuracy: all tokens are right, EOS too (the original's rule for addition, multiplication and OR);
    accuracy_without_end: what stands in place of EOS does not count (its rule for sorting); token_accuracy: share of
    the answer's tokens, each behind the right ones; first_accuracy: the first token (sorting: the smallest number).
    """
    answer = (targets != IGNORE) & (targets != EOS)
    found = {
        "accuracy": exact(choices, targets),
        "accuracy_without_end": exact_without_end(choices, targets),
        "token_accuracy": ((choices == targets) & answer).sum(-1) / answer.sum(-1),
        "first_accuracy": smallest_right(choices, targets),
    }
    return {name: values.double() for name, values in found.items()}


def join_splits(splits: Sequence[Split], pad: int = 0) -> Split:
    """One below the other, padded at the right to the longest tokens and answers."""
    length = max(split.tokens.shape[1] for split in splits)
    answers = max(split.targets.shape[1] for split in splits)

    def widen(tensors: Iterable[Tensor], width: int, value: int) -> Tensor:
        pads = torch.nn.functional.pad
        return torch.cat([pads(tensor, (0, width - tensor.shape[1]), value=value) for tensor in tensors])

    return Split(
        widen((split.tokens for split in splits), length, pad),
        widen((split.positions for split in splits), answers, 0),
        widen((split.targets for split in splits), answers, IGNORE),
    )


def batches(splits: Mapping[Cell, Split], batch_tokens: int) -> Iterator[list[Cell]]:
    """Cells whose rows are about equally long, with `batch_tokens` or fewer in all where that is possible."""
    batch: list[Cell] = []
    rows, shortest = 0, 0
    for cell, split in sorted(splits.items(), key=lambda item: item[1].tokens.shape[1]):
        count, length = split.tokens.shape
        if batch and ((rows + count) * length > batch_tokens or length > STRETCH * shortest):
            yield batch
            batch, rows = [], 0
        shortest = shortest if batch else length
        batch.append(cell)
        rows += count
    if batch:
        yield batch


@torch.no_grad()
def first_choices(model: Model, parameters: Parameters, split: Split, batch_tokens: int) -> Tensor:
    """The network's first choice at each answer place, the gold answer before it [N, A], on the CPU."""
    device = next(iter(parameters.values())).device
    count = max(1, batch_tokens // split.tokens.shape[1])
    found = []
    for start in range(0, len(split), count):
        part = split.select(slice(start, start + count)).to(device)
        logits = model.answer_logits(parameters, part.tokens[None], part.positions[None])
        found.append(logits[0].argmax(-1).cpu())
    return torch.cat(found)


def evaluate_cells(
    model: Model, parameters: Parameters, splits: Mapping[Cell, Split], batch_tokens: int
) -> dict[Cell, dict[str, Tensor]]:
    """Each of METRICS of each row, [N] by cell."""
    found: dict[Cell, dict[str, Tensor]] = {}
    for batch in batches(splits, batch_tokens):
        joined = join_splits([splits[cell] for cell in batch])
        values = grade(first_choices(model, parameters, joined, batch_tokens), joined.targets)
        sizes = [len(splits[cell]) for cell in batch]
        by_cell = {name: tensor.split(sizes) for name, tensor in values.items()}
        found |= {cell: {name: by_cell[name][place] for name in METRICS} for place, cell in enumerate(batch)}
    return found


def decode_rows(model: Model, parameters: Parameters, split: Split, rows: Sequence[int]) -> list[list[int]]:
    """Greedy answers to these rows' prompts through EOS, of as many tokens at most as the split's longest answer."""
    device = next(iter(parameters.values())).device
    chosen = split.select(torch.tensor(rows))
    lengths = chosen.positions[:, 0] + 1
    found = generate_by_length(
        model, parameters, chosen.tokens[None].to(device), lengths, split.targets.shape[1], stop_token=EOS
    )
    answers = found[0].tolist()
    return [tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens for tokens in answers]
