"""Stepwise internalisation: rows without a part of their chain, the schedule, and the optimizer that begins anew."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groundswell import AdamW, Budget, ConfigError, Evaluation, Every, Experiment
from groundswell.protocols import IGNORE, Answer, Split
from groundswell.training.pack import Member, Pack
from models.decoder import Decoder
from models.stepwise import ALL, LONGEST_OFFSET, StepwiseInternalization, _offsets, without_chain
from tasks.running_sums import RunningSums

E, PAD = 9, 9
CPU = torch.device("cpu")


def row(question, chain, answer):
    """Tokens without the last E, positions and targets in the task's form `explicit`, all as lists."""
    text = [*question, E, *chain, E, *answer, E]
    first, second = len(question), len(question) + 1 + len(chain)
    places = [*range(second, len(text) - 1), *range(first, second)]
    return text[:-1], places, [text[place + 1] for place in places]


def batch_of(examples):
    rows = [row(*example) for example in examples]
    width, columns = max(len(t) for t, _, _ in rows), max(len(p) for _, p, _ in rows)
    tokens = torch.tensor([t + [PAD] * (width - len(t)) for t, _, _ in rows])
    positions = torch.tensor([p + [p[-1]] * (columns - len(p)) for _, p, _ in rows])
    targets = torch.tensor([y + [IGNORE] * (columns - len(y)) for _, _, y in rows])
    return Split(tokens[None], positions[None], targets[None])


def predictions(split, index):
    """(what has been read, what comes next) of every counted target of a row."""
    tokens, positions, targets = (t[0, index].tolist() for t in (split.tokens, split.positions, split.targets))
    return sorted((tokens[: p + 1], y) for p, y in zip(positions, targets, strict=True) if y != IGNORE)


tokens_of = st.lists(st.integers(0, 8), min_size=1, max_size=4)
example = st.tuples(tokens_of, st.lists(st.integers(0, 8), max_size=5), tokens_of)


@given(st.lists(st.tuples(example, st.integers(0, 7)), min_size=1, max_size=4), st.sampled_from(["left", "right"]))
def test_a_shorter_row_is_that_of_the_shorter_chain(rows, side):
    removed = torch.tensor([[number for _, number in rows]])
    shorter, gone, _ = without_chain(batch_of([e for e, _ in rows]), removed, side)
    for index, ((question, chain, answer), number) in enumerate(rows):
        kept = chain[number:] if side == "left" else chain[: max(0, len(chain) - number)]
        assert predictions(shorter, index) == predictions(batch_of([(question, kept, answer)]), 0)
        assert gone[0, index] == min(number, len(chain))


def test_rows_get_no_longer_than_needed():
    batch = batch_of([([1, 2], [3, 4, 5], [6])] * 2)
    shorter, _, _ = without_chain(batch, torch.tensor([[2, 3]]), "left")
    assert shorter.tokens.shape[-1] == batch.tokens.shape[-1] - 2


def test_runs_of_a_pack_lose_different_numbers():
    one = batch_of([([1, 2], [3, 4, 5], [6])])
    two = Split(*(t.expand(2, -1, -1) for t in (one.tokens, one.positions, one.targets)))
    shorter, _, _ = without_chain(two, torch.tensor([[0], [3]]), "left")
    assert shorter.tokens[0, 0].tolist() == [1, 2, E, 3, 4, 5, E, 6]
    assert shorter.tokens[1, 0, :5].tolist() == [1, 2, E, E, 6]


@given(st.lists(st.tuples(example, st.integers(0, 7)), min_size=1, max_size=4), st.sampled_from(["left", "right"]))
def test_tokens_know_where_they_stood(rows, side):
    batch = batch_of([e for e, _ in rows])
    shorter, gone, places = without_chain(batch, torch.tensor([[number for _, number in rows]]), side)
    assert torch.equal(batch.tokens.gather(-1, places), shorter.tokens)
    ends = (places.diff(dim=-1) - 1).clamp(min=0).amax(-1)
    assert torch.equal(ends, gone)


def test_offsets_have_the_papers_distribution():
    drawn = _offsets(200_000, 4.0, [torch.Generator().manual_seed(0)])[0]
    assert (drawn == 0).double().mean() == pytest.approx(0.9817, abs=1e-3)  # 1 - exp(-4)
    assert (drawn == 1).double().mean() == pytest.approx(0.9817 * 0.0183, abs=1e-3)
    assert _offsets(50_000, 1e-3, [torch.Generator().manual_seed(0)]).max() == LONGEST_OFFSET


def test_schedule():
    objective = StepwiseInternalization(remove_every=10, remove_all_from=3, pretrain_updates=5)
    assert [objective.removed(u) for u in (0, 14, 15, 24, 25, 34, 35, 90)] == [0, 0, 1, 1, 2, 2, ALL, ALL]
    assert [objective.optimizer_start(u, 99) for u in (0, 14, 15, 20, 25, 36, 90)] == [0, 0, 15, 15, 25, 35, 35]
    still = objective.with_overrides({"reset_optimizer": False})
    assert still.optimizer_start(90, 99) == 0


@pytest.fixture
def experiment():
    return Experiment(
        task=RunningSums(length=4, base=3, train_size=40, validation_size=20, test_size=21),
        model=Decoder(num_layers=2, num_heads=2, width=16, init_scale=4.0),
        objective=StepwiseInternalization(remove_every=5, remove_all_from=2),
        optimizer=AdamW(lr=1e-2, weight_decay=0.01, decay_all=True),
        budget=Budget(steps=16, batch_size=8),
        evaluation=Evaluation(schedule=Every(every=5)),
    )


def pack_of(*experiments):
    return Pack([Member.create(one, CPU) for one in experiments])


def test_no_chain_left_is_the_short_text_with_both_separators(experiment):
    """Evaluation reads ` Q E E answer`, and the second E and the answer count."""
    data = pack_of(experiment).members[0].dataset
    split = data.evaluation["test"]
    every = torch.full((1, len(split)), ALL)
    shorter, _, _ = without_chain(split.select((None, slice(None))), every, "left")
    task = experiment.task
    read = shorter.tokens[0, 0].tolist()
    first = read.index(task.separator)
    assert read[first + 1] == task.separator
    assert len(read) == task.max_length - task.widths().chain + 1
    assert predictions(shorter, 0)[0] == (read[: first + 1], task.separator)


def test_loss_falls_back_to_whole_chains_before_the_first_removal(experiment):
    pack = pack_of(experiment.with_overrides({"objective.smoothing": None}))
    pack.train(4)
    metrics = pack.read_metrics()[0]
    assert metrics["train/removed"] == 0
    pack.train(12)
    assert pack.read_metrics()[0]["train/removed"] > 1


def test_packed_equals_alone_with_other_speeds(experiment):
    experiment = experiment.with_overrides({"scaling.precision": "float64"})
    fast = experiment.with_overrides({"objective.remove_every": 3, "seed": 1})
    together, alone = pack_of(experiment, fast), pack_of(fast)
    for pack in (together, alone):
        pack.train(16)
    torch.testing.assert_close(together.parameters.flat[1], alone.parameters.flat[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("cut", [4, 5, 7, 10, 13])
def test_resume_is_bit_exact_across_restarts(experiment, cut):
    whole, first, second = pack_of(experiment), pack_of(experiment), pack_of(experiment)
    whole.train(16)
    first.train(cut)
    weights = {name: tensor.clone() for name, tensor in first.parameters.row(0).items()}
    second.load_member_state(0, weights, first.member_state(0))
    second.set_step(cut)
    second.train(16 - cut)
    assert torch.equal(whole.parameters.flat, second.parameters.flat)


def test_the_optimizer_begins_anew_with_each_removal(experiment):
    """Against torch's optimizer, made anew when one more token goes."""
    exact = {"objective.smoothing": None, "optimizer.clip_norm": 0, "scaling.precision": "float64"}
    experiment = experiment.with_overrides(exact)
    pack, other = pack_of(experiment), pack_of(experiment)
    views = other.parameters.views
    rows = pack.members[0].order  # the same data for both
    state = rows.state()
    for update in range(12):
        if update in (0, 5, 10):
            torch_optimizer = torch.optim.AdamW(views.values(), lr=1e-2, weight_decay=0.01)
        batch = other.data.batch(other._take(8))
        removed = torch.tensor([float(experiment.objective.removed(update))]).double()
        loss, _ = experiment.objective.loss(
            experiment.model, views, batch, other.answer, None, scheduled={"removed": removed}
        )
        torch_optimizer.zero_grad()
        loss.sum().backward()
        torch_optimizer.step()
    rows.load_state(state)
    pack.train(12)
    torch.testing.assert_close(pack.parameters.flat, other.parameters.flat, atol=1e-6, rtol=0)


def test_other_forms_are_refused(experiment):
    with pytest.raises(ConfigError, match="task.form=explicit"):
        experiment.with_overrides({"task.form": "none"})


def test_kept_positions_read_the_table_where_tokens_stood(experiment):
    """Where nothing is removed they change nothing; a row without its chain is not the one that moved up."""
    kept = experiment.with_overrides({"objective.keep_positions": True, "objective.smoothing": None})
    plain = experiment.with_overrides({"objective.smoothing": None})
    packs = [pack_of(one) for one in (kept, plain)]
    for pack in packs:
        pack.train(5)
    assert torch.equal(packs[0].parameters.flat, packs[1].parameters.flat)
    results = [pack.evaluate()[0]["eval/test/answer_loss"] for pack in packs]
    assert results[0] != pytest.approx(results[1])


def test_kept_positions_need_a_table(experiment):
    with pytest.raises(ConfigError, match="position_encoding=absolute"):
        experiment.with_overrides({"objective.keep_positions": True, "model.position_encoding": "null"})


def test_deepspeed_cannot_begin_anew(experiment):
    with pytest.raises(ConfigError, match="reset_optimizer=false"):
        experiment.with_overrides({"scaling.strategy": "deepspeed", "scaling.num_workers": 2})


def test_metrics_of_evaluation_are_of_the_answer_without_a_chain(experiment):
    metrics = pack_of(experiment).evaluate()[0]
    assert set(metrics) >= {"eval/test/accuracy", "eval/test/answer_loss"}


def test_answer_columns_are_the_tasks(experiment):
    assert experiment.task.answer() == Answer(slice(0, experiment.task.widths().answer))
