"""How well a circuit does a task, and how near it is to the whole model: one number an example.

Bhaskar et al. 2024 (arXiv 2406.16778), section 4. Shapes: N examples, A answer tokens, V vocabulary, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundswell.protocols import IGNORE

TAU_ROWS = 128  # examples compared at once: [128, 100, 100] float32 are 5 MB


def kl(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || circuit) in nats of logits [..., V] -> [...]."""
    whole, found = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    # log-probabilities of -inf would give 0 * inf
    return (whole.exp() * (whole - found)).masked_fill(whole == float("-inf"), 0.0).sum(-1)


def answer_mean(values: Tensor, targets: Tensor) -> Tensor:
    """[N, A] -> [N]: over the tokens that a row's answer has."""
    counted = targets != IGNORE
    return (values * counted).sum(-1) / counted.sum(-1).clamp(min=1)


def exact_match(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """[N, A, V] -> [N]: does the circuit's best token equal the whole model's, for every token of the answer?"""
    return ((logits.argmax(-1) == reference.argmax(-1)) | (targets == IGNORE)).all(-1).float()


def difference(logits: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Logits [N, V], tokens [N] -> logit of `right` minus logit of `wrong` [N]."""
    picked = logits.float().gather(-1, torch.stack([right, wrong], -1))
    return picked[:, 0] - picked[:, 1]


def probability_difference(probabilities: Tensor, boundary: Tensor, window: int | None = None) -> Tensor:
    """p(> boundary) - p(< boundary) over ordered candidates [N, C], boundary [N] a place among them -> [N].

    `window` counts only candidates at most so far from the boundary.
    """
    distance = torch.arange(probabilities.shape[-1], device=probabilities.device) - boundary[:, None]
    sign = distance.sign()
    if window is not None:
        sign = sign * (distance.abs() <= window)
    return (probabilities * sign).sum(-1)


def kendall_tau(first: Tensor, second: Tensor) -> Tensor:
    """Kendall's tau-b between the rows of two [N, C] -> [N]; NaN where all values of a row are equal.

    tau-b = sum of sign products over pairs / sqrt(untied pairs of one * untied pairs of the other) (Kendall 1945,
    Biometrika 33, equation 9).
    """
    return torch.cat([_kendall_tau(*part) for part in zip(first.split(TAU_ROWS), second.split(TAU_ROWS), strict=True)])


def _kendall_tau(first: Tensor, second: Tensor) -> Tensor:
    signs = [(values[:, :, None] - values[:, None, :]).sign().float() for values in (first, second)]
    agreement = (signs[0] * signs[1]).sum((1, 2))
    untied = [sign.abs().sum((1, 2)) for sign in signs]
    return agreement / (untied[0] * untied[1]).sqrt()
