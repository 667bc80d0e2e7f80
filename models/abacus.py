"""Abacus embeddings: a learned vector for the place of a digit in its number (McLeish et al. 2024, arXiv 2405.17399).

Numbers must be written with the least significant digit first, so that place 1 is the units.
Shapes: K runs, B batch rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def digit_places(is_digit: Tensor) -> Tensor:
    """is_digit [..., T] (bool) -> the place of each digit in its unbroken run of digits, from 1 on; 0 for others.

    With c the number of digits so far, a digit's place is c minus the c of the last token that was none: one sum and
    one running maximum, whatever the number of runs.
    """
    count = is_digit.cumsum(-1)
    return count - count.masked_fill(is_digit, 0).cummax(-1).values


def shifted(places: Tensor, offsets: Tensor) -> Tensor:
    """places [..., T] with `offsets` (broadcast) added to those of digits; 0, which all other tokens share, stays."""
    return torch.where(places > 0, places + offsets, places)


class Abacus(nn.Module):
    """What to add to the token embeddings of any model. Row 0 of the table belongs to all tokens that are no digits.

    In training one offset, uniform in 0..max_k, moves the places of the whole batch, so that rows of longer numbers
    than the training set has are trained too; in evaluation there is none.
    """

    def __init__(
        self, digit_tokens: Sequence[int], embedding_dim: int, max_seq_length: int = 1024, max_k: int = 99
    ) -> None:
        """`digit_tokens`: ids of the ten digits. `max_seq_length`: rows of the table; numbers may have
        max_seq_length - 1 - max_k digits in training. (99 and 1024: the published module's defaults.)"""
        super().__init__()
        if not 0 <= max_k < max_seq_length:
            raise ValueError(f"max_k {max_k} must be at least 0 and less than max_seq_length {max_seq_length}")
        self.embedding = nn.Embedding(max_seq_length, embedding_dim)
        self.max_k = max_k
        self.digits: Tensor
        self.register_buffer("digits", torch.tensor(list(digit_tokens)), persistent=False)

    def ids(self, tokens: Tensor, offset: int = 0) -> Tensor:
        """tokens [..., T] -> rows of the table [..., T]."""
        return shifted(digit_places(torch.isin(tokens, self.digits)), torch.tensor(offset, device=tokens.device))

    def forward(self, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """tokens [..., T] -> [..., T, embedding_dim]. `generator` (on the CPU) draws the offset in training.

        Raises ValueError for a number that is longer than the table.
        """
        offset = int(torch.randint(self.max_k + 1, (), generator=generator)) if self.training else 0
        ids = self.ids(tokens, offset)
        rows = self.embedding.num_embeddings
        # a place is at most T, so short inputs need no look at the values, which would wait for an accelerator
        if tokens.shape[-1] + offset >= rows and int(ids.max()) >= rows:
            raise ValueError(
                f"a number of {int(ids.max()) - offset} digits at offset {offset} does not fit a table of {rows} rows; "
                "raise max_seq_length"
            )
        return self.embedding(ids)
