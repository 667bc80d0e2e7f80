"""Decoding of rows of different lengths: recorded generations, one row like many, beams against every row there is."""

from itertools import product
from statistics import mode

import chain_golden as golden
import pytest
import torch

from groundswell import ConfigError
from models.beams import beam_search
from models.chain_coupled import part_of
from models.chain_decoding import Ending, Prompts, Stream, decode_anyhow, decode_greedily, within_table
from models.decoder import Decoder

NEW_TOKENS = 12  # of the recorded generations


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return golden.write_teacher(tmp_path_factory.mktemp("teacher") / "best")


@pytest.fixture(params=golden.CASES)
def case(request):
    return request.param


def without_gradients(parameters):
    return {name: value.detach() for name, value in parameters.items()}


def questions(case):
    """Rows up to the first separator."""
    batch = golden.none_batch(case)
    lengths = batch.positions[0, :, 0] + 1
    return Prompts(batch.tokens[0, :, : int(lengths.max())], lengths)


def ending(prompts, count=1, limit=NEW_TOKENS, separator=golden.SEPARATOR):
    return Ending(separator, count, torch.full_like(prompts.lengths, limit))


def with_prompts(prompts, decoded):
    rows = zip(prompts.tokens.tolist(), prompts.lengths.tolist(), decoded.rows(), strict=True)
    return [row[:length] + new for row, length, new in rows]


def answers_of(case, network, teacher):
    """-> what a network reads before its answers: parameters, states, separators of a row."""
    batch = golden.none_batch(case)
    if network == "teacher":
        return golden.parameters("teacher"), None, 2
    if network == "student":
        hidden = golden.hidden_batch(case)
        taught = golden.student(teacher, seed_compat=True).taught(hidden.tokens, hidden.positions)
        return golden.parameters("student"), taught.states[0], 1
    components = int(network[-1])
    parameters = golden.coupled_parameters(components)
    with torch.no_grad():
        states = golden.coupled(components).states(parameters, batch.tokens, batch.positions[..., 0])
    return part_of(parameters, "student"), states[0], 1


@pytest.mark.parametrize(
    "network, recorded",
    [
        ("teacher", "generate_teacher"),
        ("student", "generate_student_from_teacher_states_dynamic"),
        ("coupled_k1", "generate_coupled_k1_beams1"),
        ("coupled_k5", "generate_coupled_k5_beams1"),
    ],
)
def test_recorded_greedy_generations(case, network, recorded, teacher):
    parameters, states, count = answers_of(case, network, teacher)
    prompts = questions(case)
    stream = Stream(golden.decoder(), without_gradients(parameters), prompts, states)
    found = decode_greedily(stream, ending(prompts, count))
    assert with_prompts(prompts, found) == golden.expected()["cases"][case][recorded]
    assert found.truncated.all() and (found.counts == NEW_TOKENS).all()


@pytest.mark.parametrize("components", [1, 5])
def test_recorded_beams(case, components, teacher):
    parameters, states, _ = answers_of(case, f"coupled_k{components}", teacher)
    prompts = questions(case)
    stream = Stream(golden.decoder(), without_gradients(parameters), prompts, states)
    found = beam_search(stream, ending(prompts), 3)
    assert with_prompts(prompts, found) == golden.expected()["cases"][case][f"generate_coupled_k{components}_beams3"]


# ---- one row like many ----

SHAPES = {
    "gpt2": {},
    "rotary": {"position_encoding": "rotary", "rotary_dim": 4},
    "null": {"position_encoding": "null"},
    "looped": {"num_recurrences": 2, "re_embed": True},
    "untied": {"tied_head": False, "layer_norm": False, "activation": "relu"},
}
VOCABULARY, SEPARATOR = 6, 2


def network(shape="gpt2", positions=60, seed=0, **fields):
    decoder = Decoder(num_layers=2, num_heads=2, width=16, init_std=0.5, **SHAPES[shape], **fields)
    source = torch.Generator().manual_seed(seed)
    parameters = {
        spec.name: torch.randn(1, *spec.shape, generator=source) * (spec.init_std or 0.1) + spec.init_value
        for spec in decoder.parameters(VOCABULARY, positions)
    }
    return decoder, parameters


def some_prompts(lengths=(3, 9, 4, 17, 9, 20), seed=1):
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (len(lengths), max(lengths)), generator=source)
    return Prompts(tokens, torch.tensor(lengths))


def one(prompts, row):
    length = int(prompts.lengths[row])
    return Prompts(prompts.tokens[row : row + 1, :length], prompts.lengths[row : row + 1])


def one_ending(ending, row):
    return Ending(ending.separator, ending.number, ending.limit[row : row + 1])


def by_hand(decoder, parameters, prompt, separator, count, limit):
    """The plain loop: all tokens again for each new one."""
    tokens, new = list(prompt), []
    while new.count(separator) < count and len(new) < limit:
        logits = decoder.logits(parameters, torch.tensor(tokens + new)[None, None])
        new.append(int(logits[0, 0, -1].argmax()))
    return new


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_batch_is_row_by_row(shape, count):
    (decoder, parameters), prompts = network(shape), some_prompts()
    limits = Ending(SEPARATOR, None, torch.tensor([12, 30, 1, 7, 30, 30]))
    separator = mode(decode_greedily(Stream(decoder, parameters, prompts), limits).rows()[1])
    limits = Ending(separator, count, limits.limit)
    together = decode_greedily(Stream(decoder, parameters, prompts), limits)
    for row, found in enumerate(together.rows()):
        prompt = one(prompts, row)
        alone = decode_greedily(Stream(decoder, parameters, prompt), one_ending(limits, row))
        plain = by_hand(decoder, parameters, prompt.tokens[0].tolist(), separator, count, int(limits.limit[row]))
        assert found == alone.rows()[0] == plain
        assert bool(together.truncated[row]) == bool(alone.truncated[0]) == (plain.count(separator) < count)
        assert (together.tokens[row, len(found) :] == separator).all()
    assert not together.truncated.all()
    own = decode_anyhow(decoder, parameters, prompts, limits)
    assert own.rows() == together.rows() and torch.equal(own.truncated, together.truncated)


def test_a_fixed_number_of_tokens():
    (decoder, parameters), prompts = network(), some_prompts()
    limits = Ending(SEPARATOR, None, torch.tensor([12, 30, 1, 7, 30, 30]))
    found = decode_greedily(Stream(decoder, parameters, prompts), limits)
    limits = limits._replace(separator=found.rows()[0][0])
    found = decode_greedily(Stream(decoder, parameters, prompts), limits)
    assert found.counts.tolist() == limits.limit.tolist()
    assert decode_anyhow(decoder, parameters, prompts, limits).rows() == found.rows()


def test_an_empty_chain_is_a_separator_at_once():
    """The published stop rule misses this one."""
    decoder, parameters = network()
    prompts = some_prompts((1,) * VOCABULARY)
    prompts.tokens[:, 0] = torch.arange(VOCABULARY)
    first = [row[0] for row in decode_greedily(Stream(decoder, parameters, prompts), ending(prompts, 1, 1)).rows()]
    separator = first[0]
    found = decode_greedily(Stream(decoder, parameters, prompts), ending(prompts, 2, 40, separator)).rows()[0]
    assert found[0] == separator
    assert found.count(separator) == 2 and found[-1] == separator


def test_limits_of_positions():
    decoder, parameters = network(positions=20)
    prompts = some_prompts((3, 18, 20))
    limits = within_table(parameters, prompts, torch.full((3,), 10))
    assert limits.tolist() == [10, 3, 1]
    found = decode_greedily(Stream(decoder, parameters, prompts), Ending(SEPARATOR, None, limits))
    assert found.counts.tolist() == [10, 3, 1] and found.truncated.all()
    with pytest.raises(ConfigError, match="21 tokens is longer than the 20 positions"):
        within_table(parameters, some_prompts((3, 21)), torch.full((2,), 10))
    rotary = network("rotary", 20)[1]
    assert within_table(rotary, some_prompts((3, 21)), torch.full((2,), 10)).tolist() == [10, 10]


def test_places_that_are_passed_over():
    """As if tokens were there that nothing attends to."""
    decoder, parameters = network()
    prompts = some_prompts()._replace(gaps=torch.tensor([5, 0, 2, 7, 1, 9]))
    limits = Ending(SEPARATOR, None, torch.full((6,), 8))
    found = decode_greedily(Stream(decoder, parameters, prompts), limits).rows()
    assert found != decode_greedily(Stream(decoder, parameters, prompts._replace(gaps=None)), limits).rows()
    for row, new in enumerate(found):
        prompt, gap = one(prompts, row), int(prompts.gaps[row])
        tokens = torch.cat([prompt.tokens[0], torch.tensor(new)])[None, None]
        length = int(prompt.lengths[0])
        order = torch.arange(tokens.shape[-1])
        places = torch.where(order < length, order, order + gap)[None, None]
        positions = torch.arange(length - 1, length + 7)[None, None]
        logits = decoder.answer_logits(parameters, tokens, positions, places=places)
        assert logits[0, 0].argmax(-1).tolist() == new
    greedy = [beam_search(Stream(decoder, parameters, prompts), limits, beams).rows() for beams in (1, 3)]
    assert greedy[0] == found
    room = within_table(parameters, prompts, torch.full((6,), 100))
    assert torch.equal(room, 60 - prompts.lengths - prompts.gaps + 1)


# ---- beams ----


def mean_scores(decoder, parameters, prompt, rows):
    """Mean log-probability of new tokens, rows of one length [M, n] -> [M]."""
    tokens = torch.cat([torch.tensor(prompt).expand(len(rows), -1), rows], 1)
    logs = decoder.logits(parameters, tokens[None])[0].log_softmax(-1)[:, len(prompt) - 1 : -1]
    return logs.gather(2, rows[..., None]).mean((1, 2))


def best_of_all(decoder, parameters, prompt, count, limit):
    """Of all rows that end with separator number `count`, or have `limit` tokens."""
    best, most = [], float("-inf")
    for length in range(1, limit + 1):
        rows = torch.tensor(list(product(range(VOCABULARY), repeat=length)))
        ends = rows == SEPARATOR
        going = ends[:, :-1].sum(1) < count
        rows = rows[going & ((ends.sum(1) == count) | (length == limit))]
        if len(rows):
            values = mean_scores(decoder, parameters, prompt, rows)
            if float(values.max()) > most:
                best, most = rows[values.argmax()].tolist(), float(values.max())
    return best


@pytest.mark.parametrize("count", [1, 2])
def test_enough_beams_find_the_best_row(count):
    decoder, parameters = network(seed=3)
    prompts, limit = some_prompts((3, 5, 2, 4)), 4
    found = beam_search(Stream(decoder, parameters, prompts), ending(prompts, count, limit, SEPARATOR), VOCABULARY**3)
    for row, new in enumerate(found.rows()):
        best = best_of_all(decoder, parameters, one(prompts, row).tokens[0].tolist(), count, limit)
        assert new == best
        assert bool(found.truncated[row]) == (best.count(SEPARATOR) < count)


def test_beams_of_a_batch_are_row_by_row():
    decoder, parameters = network(seed=5)
    prompts = some_prompts()
    limits = Ending(SEPARATOR, 1, torch.tensor([9, 9, 1, 5, 9, 2]))
    together = beam_search(Stream(decoder, parameters, prompts), limits, 3)
    greedy = decode_greedily(Stream(decoder, parameters, prompts), limits)
    single = beam_search(Stream(decoder, parameters, prompts), limits, 1)
    assert single.rows() == greedy.rows()
    assert together.rows() != greedy.rows()
    for row, found in enumerate(together.rows()):
        prompt = one(prompts, row)
        assert beam_search(Stream(decoder, parameters, prompt), one_ending(limits, row), 3).rows() == [found]
