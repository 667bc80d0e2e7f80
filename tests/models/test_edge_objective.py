import math

import pytest
import torch

from groundswell.config import ConfigError
from groundswell.protocols import IGNORE, Answer, Split
from models.edge_masked import EdgeMasked
from models.edge_objective import Answers, EdgePruning
from tests.models.edge_golden import write_network
from tests.models.edge_pairs import RandomPairs


class Whole:
    """A model whose network answers with given logits."""

    def __init__(self, logits):
        self.logits = logits

    def whole_logits(self, tokens, positions):
        return self.logits


def answers(whole, targets, kinds=None, **fields):
    tokens = torch.zeros(*targets.shape[:2], 4, dtype=torch.int64)
    batch = Split(tokens, torch.zeros_like(targets), targets)
    columns = slice(0, targets.shape[-1])
    return Answers(EdgePruning(**fields), Whole(whole), batch, Answer(columns, kinds))


def kl(whole, found):
    """Of two rows of logits, in plain Python."""
    p, q = ([math.exp(x) for x in row.tolist()] for row in (whole, found))
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))


@pytest.fixture
def logits():
    source = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 2, 5, generator=source), torch.randn(2, 3, 2, 5, generator=source)


TARGETS = torch.tensor([[1, 2], [3, IGNORE], [IGNORE, IGNORE]]).expand(2, -1, -1)


def test_the_divergence_of_answer_tokens(logits):
    whole, found = logits
    both = [kl(whole[0, 0, a], found[0, 0, a]) for a in (0, 1)]
    one = kl(whole[0, 1, 0], found[0, 1, 0])
    mean, total = answers(whole, TARGETS), answers(whole, TARGETS, token_reduction="sum")
    assert mean.divergence(found)[0].tolist() == pytest.approx([sum(both) / 2, one, 0.0], abs=1e-6)
    assert total.divergence(found)[0].tolist() == pytest.approx([sum(both), one, 0.0], abs=1e-6)
    assert float(mean.mean_divergence(found)[0]) == pytest.approx((sum(both) / 2 + one) / 2, abs=1e-6)
    assert mean.divergence(whole).abs().max() < 1e-6


def test_only_candidates_compete(logits):
    whole, found = logits
    among = torch.tensor([0, -1, 0, 0, -1])
    for kinds in (among, among.expand(2, -1)):
        a = answers(whole, TARGETS, kinds, answer_space="candidates")
        leaf = found.clone().requires_grad_()
        values = a.divergence(leaf)
        expected = kl(whole[0, 1, 0, [0, 2, 3]], found[0, 1, 0, [0, 2, 3]])
        assert float(values[0, 1].detach()) == pytest.approx(expected, abs=1e-6)
        values.sum().backward()
        assert leaf.grad.isfinite().all()
        assert not leaf.grad[..., [1, 4]].any()
    with pytest.raises(ConfigError, match="names no candidates"):
        answers(whole, TARGETS, answer_space="candidates")


def test_positions_of_a_single_output_compete(logits):
    whole, found = (x[..., :1] for x in logits)
    a = answers(whole, TARGETS, answer_space="positions")
    leaf = found.clone().requires_grad_()
    values = a.divergence(leaf)
    assert float(values[0, 0].detach()) == pytest.approx(kl(whole[0, 0, :, 0], found[0, 0, :, 0]), abs=1e-6)
    assert values[0, 1:].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)  # one position has nothing to compete with
    values.sum().backward()
    assert leaf.grad.isfinite().all()
    assert a.agree(whole + 0.04).all()
    assert a.agree(whole + 0.06)[0].tolist() == [False, False, True]


def test_agreement_with_the_whole_network_and_with_the_targets(logits):
    whole, _ = logits
    best = whole.argmax(-1)
    targets = torch.where(TARGETS == IGNORE, IGNORE, best)
    a = answers(whole, targets)
    assert a.agree(whole).all()
    assert a.right(whole).all()
    other = whole.clone()
    other[0, 1, 0, (best[0, 1, 0] + 1) % 5] = 9.0
    other[0, 2] = -whole[0, 2]  # a row without an answer
    assert a.agree(other)[0].tolist() == a.right(other)[0].tolist() == [True, False, True]
    targets = targets.clone()
    targets[0, 0, 1] = (targets[0, 0, 1] + 1) % 5
    assert answers(whole, targets).right(whole)[0].tolist() == [False, True, True]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return EdgeMasked(path=str(write_network("gpt2", tmp_path_factory.mktemp("network"))), form="reference")


def parameters_of(model, num_runs):
    source = torch.Generator().manual_seed(1)
    return {s.name: torch.randn(num_runs, *s.shape, generator=source) * 2 for s in model.parameters(61, 16)}


def batch(rows, num_runs=1):
    dataset = RandomPairs(num_examples=rows).build()
    split = dataset.train
    return Split(*(x.expand(num_runs, *x.shape) for x in (split.tokens, split.positions, split.targets))), dataset


def test_each_run_has_targets_of_its_own(model):
    objective, (examples, dataset) = EdgePruning(node_loss=True), batch(4, 2)
    parameters = parameters_of(model, 2)
    scheduled = {"target": torch.tensor([0.2, 1.1]), "node_target": torch.tensor([0.5, 0.6])}
    sources = [torch.Generator().manual_seed(s) for s in (0, 1)]
    loss, metrics = objective.loss(model, parameters, examples, dataset.answer, sources, scheduled)
    assert torch.equal(metrics["target"], scheduled["target"])
    for run in (0, 1):
        excess = metrics["edge_sparsity"][run] - scheduled["target"][run]
        l1, l2 = parameters["multipliers.edges"][run]
        assert float(metrics["edge_loss"][run]) == pytest.approx(float(l1 * excess + l2 * excess**2), abs=1e-5)
        assert float(metrics["lambda_1"][run]) == float(l1)
    torch.testing.assert_close(loss, metrics["kl"] + metrics["edge_loss"] + metrics["node_loss"])


def test_without_node_loss_the_nodes_follow_the_divergence_alone(model):
    objective, (examples, dataset) = EdgePruning(), batch(4)
    parameters = {name: tensor.requires_grad_() for name, tensor in parameters_of(model, 1).items()}
    loss, metrics = objective.loss(model, parameters, examples, dataset.answer, [torch.Generator()])
    loss.sum().backward()
    assert float(metrics["target"]) == pytest.approx(objective.target)
    assert "node_loss" not in metrics
    assert not parameters["multipliers.nodes"].grad.any()
    assert parameters["masks.nodes"].grad.any()


def test_evaluation_is_of_each_example_without_noise(model):
    objective, (examples, dataset) = EdgePruning(), batch(6, 2)
    parameters = parameters_of(model, 2)
    metrics = objective.evaluate(model, parameters, examples, dataset.answer)
    assert set(metrics) == {"kl", "accuracy", "exact_match", "edge_sparsity"}
    assert all(value.shape == (2, 6) for value in metrics.values())
    again = objective.evaluate(model, parameters, examples, dataset.answer)
    assert all(torch.equal(metrics[name], again[name]) for name in metrics)
    untouched = {s.name: torch.full((2, *s.shape), s.init_value) for s in model.parameters(61, 16)}
    whole = objective.evaluate(model, untouched, examples, dataset.answer)
    assert whole["kl"].abs().max() < 1e-6
    assert whole["exact_match"].all()
    assert whole["edge_sparsity"].abs().max() < 1e-5


def test_a_batch_in_pieces_weighs_examples_with_an_answer():
    targets = torch.tensor([[[1, 2], [3, IGNORE], [IGNORE, IGNORE]]])
    empty = torch.zeros(1, 3, 2, dtype=torch.int64)
    assert EdgePruning().weight(Split(empty, empty, targets)).tolist() == [2.0]
