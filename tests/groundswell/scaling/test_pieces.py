"""A batch cut for workers and micro-batches is the whole batch, whatever the numbers."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from groundswell.protocols import IGNORE, Answer, Objective, Split
from groundswell.scaling.pieces import cut, micro_batches
from models.objectives import AnswerLoss, WordLoss

NUM_ROWS, NUM_ANSWERS, VOCABULARY = 12, 3, 5
ANSWER = Answer(slice(0, NUM_ANSWERS))
OBJECTIVES = (AnswerLoss(), WordLoss())
few = settings(max_examples=30)  # each is a batch cut for all its workers


class Table:
    """In place of a network: the logits of a row are looked up by its first token, its number."""

    def __init__(self, seed):
        source = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(NUM_ROWS, NUM_ANSWERS, VOCABULARY, generator=source, dtype=torch.float64)

    def answer_logits(self, parameters, tokens, positions, generators=None):
        return self.logits[tokens[:, :, 0]]


@dataclass(frozen=True)
class Case:
    objective: Objective
    rows: torch.Tensor  # [B]
    data: Split
    num_workers: int
    sizes: tuple[int, int]  # examples of a micro-batch, how many
    seed: int

    def examples(self, rows):
        return Split(self.data.tokens[rows][None], self.data.positions[rows][None], self.data.targets[rows][None])

    def pieces(self, rank):
        return cut(self.rows, (rank, self.num_workers), self.sizes, self.objective, self.examples)

    def losses(self, batch):
        return self.objective.loss(Table(self.seed), {}, batch, ANSWER, None)[0]


@st.composite
def cases(draw, objectives=OBJECTIVES):
    """Any batch, also the short last one of an epoch, with fewer rows than workers or micro-batches."""
    objective = draw(st.sampled_from(objectives))
    batch_size = draw(st.integers(1, NUM_ROWS))
    num_workers = draw(st.integers(1, batch_size))
    sizes = micro_batches(batch_size, num_workers, draw(st.none() | st.integers(1, NUM_ROWS)))
    seed = draw(st.integers(0, 2**32))
    source = torch.Generator().manual_seed(seed)
    rows = torch.randperm(NUM_ROWS, generator=source)[: draw(st.integers(1, batch_size))]
    targets = torch.randint(VOCABULARY, (NUM_ROWS, NUM_ANSWERS), generator=source)
    if isinstance(objective, AnswerLoss):  # ragged: 0 to 3 answer tokens a row
        lengths = torch.randint(NUM_ANSWERS + 1, (NUM_ROWS, 1), generator=source)
        targets[torch.arange(NUM_ANSWERS) >= lengths] = IGNORE
    numbers = torch.arange(NUM_ROWS)[:, None]
    return Case(objective, rows, Split(numbers, numbers, targets), num_workers, sizes, seed)


@few
@given(cases())
def test_each_example_is_in_one_piece(case):
    """Fillers repeat an example with a share of exactly 0; a piece of examples without answers has that share too."""
    seen = []
    for rank in range(case.num_workers):
        pieces = case.pieces(rank)
        mine = case.rows.tensor_split(case.num_workers)[rank]
        real = pieces[: -(-len(mine) // case.sizes[0])]
        assert [row for batch, _ in real for row in batch.tokens[0, :, 0].tolist()] == mine.tolist()
        assert all(share == 0 for _, share in pieces[len(real) :])
        seen += mine.tolist()
    assert seen == case.rows.tolist()


@few
@given(cases())
def test_all_workers_have_equally_many_pieces_that_fit(case):
    size, number = case.sizes
    for rank in range(case.num_workers):
        pieces = case.pieces(rank)
        assert len(pieces) == number
        assert all(1 <= batch.tokens.shape[1] <= size for batch, _ in pieces)


@few
@given(cases())
def test_shares_sum_to_one(case):
    """To none, where no example of the batch has an answer."""
    shares = [float(share) for rank in range(case.num_workers) for _, share in case.pieces(rank)]
    assert min(shares) >= 0
    answers = float(case.objective.weight(case.examples(case.rows)))
    assert sum(shares) == pytest.approx(1.0 if answers else 0.0, abs=1e-5)


@few
@given(cases())
def test_weighted_losses_are_the_whole_batch_s(case):
    total = sum(case.losses(batch) * share for rank in range(case.num_workers) for batch, share in case.pieces(rank))
    torch.testing.assert_close(total, case.losses(case.examples(case.rows)), rtol=1e-5, atol=1e-6)


@few
@given(cases(objectives=OBJECTIVES[:1]))
def test_the_answer_loss_is_the_mean_over_all_answer_tokens(case):
    """Against torch's own cross-entropy over the flattened batch."""
    total = sum(case.losses(batch) * share for rank in range(case.num_workers) for batch, share in case.pieces(rank))
    logits, targets = Table(case.seed).logits[case.rows], case.data.targets[case.rows]
    if (targets != IGNORE).any():
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        torch.testing.assert_close(total[0], expected, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 10_000), st.integers(1, 64), st.none() | st.integers(1, 10_000))
def test_micro_batches_hold_every_worker_s_part(batch_size, num_workers, wanted):
    size, number = micro_batches(batch_size, num_workers, wanted)
    each = -(-batch_size // num_workers)  # of the worker with the most
    assert size <= (wanted or each)
    assert size * (number - 1) < each <= size * number
