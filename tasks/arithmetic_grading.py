"""Is an answer right? As the original grades, and the sane variants. N rows, A answer positions.

`generated` [N, A] holds generated ids, `targets` [N, A] the right answer through EOS with IGNORE after it, as the
evaluation splits have it. Every function gives a verdict for each row [N], unless it says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundswell.protocols import IGNORE
from tasks.arithmetic_vocabulary import EOS, FIRST_DIGIT, PAD

LAST_DIGIT = FIRST_DIGIT + 9


def cut_at_end(generated: Tensor) -> Tensor:
    """PAD after the first EOS. Without any EOS the original takes the first token's place for it: one token is left."""
    ends = generated == EOS
    last = torch.where(ends.any(-1), ends.int().argmax(-1), 0)
    return generated.where(torch.arange(generated.shape[-1], device=generated.device) <= last[..., None], PAD)


def exact(generated: Tensor, targets: Tensor) -> Tensor:
    """The original's verdict on addition, multiplication and OR: every token through EOS is right, and whatever comes
    after the first EOS does not count. An answer without EOS is wrong."""
    return (cut_at_end(generated) == targets.where(targets != IGNORE, PAD)).all(-1)


def exact_without_end(generated: Tensor, targets: Tensor) -> Tensor:
    """As `exact`, but the answer need not end: what is generated in place of EOS does not count."""
    return ((generated == targets) | _outside(targets)).all(-1)


def digit_accuracy(generated: Tensor, targets: Tensor) -> Tensor:
    """Share of the answer's digits that are right at their places [N] float32."""
    digits = (targets >= FIRST_DIGIT) & (targets <= LAST_DIGIT)
    right = (cut_after_end(generated) == targets) & digits
    return right.sum(-1).float() / digits.sum(-1).clamp(min=1)


def cut_after_end(generated: Tensor) -> Tensor:
    """PAD after the first EOS; rows without EOS are left as they are."""
    return generated.where((generated == EOS).int().cumsum(-1) - (generated == EOS).int() == 0, PAD)


def sorted_exact(generated: Tensor, targets: Tensor) -> Tensor:
    """The original's verdict on sorting: all symbols are right; what comes in place of EOS and later does not count."""
    return exact_without_end(generated, targets)


def sorted_exact_with_end(generated: Tensor, targets: Tensor) -> Tensor:
    """As `sorted_exact`, and the answer ends where it should."""
    return exact(generated, targets)


def smallest_right(generated: Tensor, targets: Tensor) -> Tensor:
    """The original's "top-1" of sorting: the first symbol, that of the smallest number, is right."""
    return generated[:, 0] == targets[:, 0]


def _outside(targets: Tensor) -> Tensor:
    return (targets == IGNORE) | (targets == EOS)
