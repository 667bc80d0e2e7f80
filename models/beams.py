"""Beam search, as Hugging Face's with early_stopping=False and length_penalty=1: a row's score is the mean
log-probability of its new tokens. (Where a row has two separators the published code compares sums over equally long
rows, filled up with separators at no cost; here a row ends with its second one.)

Shapes: B rows, W beams, N new tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.chain_decoding import Decoded, Ending, Stream

NEVER = float("-inf")


@dataclass
class Beams:
    """Beginnings [B, W], the best first, or complete rows in any order. What is not there has score -inf."""

    scores: Tensor  # [B, W]: of beginnings the sum of log-probabilities, of complete rows their mean
    tokens: Tensor  # [B, W, N]
    counts: Tensor  # [B, W]
    seen: Tensor  # [B, W] separators

    @classmethod
    def empty(cls, batch: int, num_beams: int, longest: int, separator: int, device: torch.device) -> Beams:
        number = torch.zeros(batch, num_beams, dtype=torch.int64, device=device)
        tokens = torch.full((batch, num_beams, longest), separator, device=device)
        return cls(torch.full((batch, num_beams), NEVER, device=device), tokens, number, number.clone())

    def select(self, index: Tensor) -> Beams:
        """index [B, W'] -> those."""
        tokens = self.tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, self.tokens.shape[-1]))
        scores, counts, seen = (x.gather(1, index) for x in (self.scores, self.counts, self.seen))
        return Beams(scores, tokens, counts, seen)

    def best(self, count: int) -> Beams:
        return self.select(self.scores.topk(count, 1).indices)

    def joined(self, other: Beams, allowed: Tensor) -> Beams:
        """The best of these and of those others that are allowed [B, W']; a mean is made of their sum."""
        means = (other.scores / other.counts).masked_fill(~allowed, NEVER)
        pairs = (
            (self.scores, means), (self.tokens, other.tokens), (self.counts, other.counts), (self.seen, other.seen),
        )  # fmt: skip
        return Beams(*(torch.cat(pair, 1) for pair in pairs)).best(self.scores.shape[1])


@torch.no_grad()
def beam_search(stream: Stream, ending: Ending, num_beams: int) -> Decoded:
    """The best row that was found, of each prompt. A prompt is done when it has `num_beams` complete rows, and none of
    the beginnings has a better mean than the worst of them."""
    batch, device, longest = len(ending.limit), ending.limit.device, int(ending.limit.max())
    logits = stream.start()
    stream.select(torch.arange(batch, device=device).repeat_interleave(num_beams))
    logits = logits.repeat_interleave(num_beams, 0)
    running = Beams.empty(batch, num_beams, longest, ending.separator, device)
    complete = Beams.empty(batch, num_beams, longest, ending.separator, device)
    running.scores[:, 0] = 0.0
    going = torch.ones(batch, 1, dtype=torch.bool, device=device)
    first = torch.arange(0, batch * num_beams, num_beams, device=device).unsqueeze(-1)
    for number in range(longest):
        sums = running.scores.unsqueeze(-1) + logits.log_softmax(-1).view(batch, num_beams, -1)
        found, parents = _extended(running, sums, number, ending.separator)
        ends = found.seen >= ending.needed
        rank = torch.arange(ends.shape[1], device=device)
        complete = complete.joined(found, ends & going & (rank < num_beams))
        best_mean = found.scores[:, :1] / (number + 1)
        order = found.scores.masked_fill(ends, NEVER).topk(num_beams, 1).indices
        found.scores.masked_fill_(ends, NEVER)
        running, parents = found.select(order), parents.gather(1, order)
        worst = complete.scores.min(1, keepdim=True).values
        going = going & ~((worst > NEVER) & (worst >= best_mean)) & (running.scores[:, :1] > NEVER)
        last = going & (number + 1 >= ending.limit.unsqueeze(-1))
        complete = complete.joined(running, last.expand(-1, num_beams))
        going = going & ~last
        if not bool(going.any()):
            break
        stream.select((first + parents).flatten())
        logits = stream.next(running.tokens[:, :, number].flatten())
    chosen = complete.best(1)
    tokens, counts, seen = chosen.tokens[:, 0], chosen.counts[:, 0], chosen.seen[:, 0]
    return Decoded(tokens, counts, seen < ending.needed)


def _extended(running: Beams, sums: Tensor, number: int, separator: int) -> tuple[Beams, Tensor]:
    """sums [B, W, V] of beginnings with one more token, which is their token `number` -> the best 2 W, so that W are
    left when W of them end; the beginning of each [B, 2 W]."""
    _, num_beams, vocabulary = sums.shape
    scores, index = sums.flatten(1).topk(min(2 * num_beams, num_beams * vocabulary), 1)
    parents, tokens = index // vocabulary, index % vocabulary
    found = running.select(parents)
    found.scores, found.counts = scores, found.counts + 1
    found.tokens[:, :, number] = tokens
    found.seen = found.seen + (tokens == separator)
    return found, parents
