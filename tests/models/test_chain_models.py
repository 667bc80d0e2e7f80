"""Student, emulator and coupled student as models of the engine: packs, caches, folders, workers, mistakes."""

import math

import chain_golden as golden
import pytest
import torch

from groundswell import AdamW, Budget, Experiment
from groundswell.config import ConfigError
from groundswell.experiment import ParameterGroup
from groundswell.protocols import Answer, Dataset, Split, Task
from groundswell.scaling.network import TrainingStep, build_network, fill, materialise
from groundswell.training.pack import Member, Pack
from models.chain_coupled import CoupledStudent
from models.chain_emulator import ThoughtEmulator
from models.chain_objective import StateRegression
from models.chain_student import MindReadingStudent
from models.chain_teacher import StateCache, teacher_in
from models.decoder import Decoder
from models.objectives import AnswerLoss
from tasks.running_sums import RunningSums

VOCABULARY = tuple(str(token) for token in range(122))
CPU = torch.device("cpu")
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


class RecordedRows(Task):
    """The recorded rows as a task of this form."""

    form: str = "hidden"
    case: str = "mixed"

    @property
    def _batch(self) -> Split:
        return golden.none_batch(self.case) if self.form == "none" else golden.hidden_batch(self.case)

    @property
    def vocab_size(self) -> int:
        return len(VOCABULARY)

    @property
    def max_length(self) -> int:
        return self._batch.tokens.shape[-1]

    @property
    def num_answers(self) -> int:
        return self._batch.positions.shape[-1]

    def build(self) -> Dataset:
        batch = self._batch.select(0)
        return Dataset(VOCABULARY, batch, {"test": batch}, Answer(slice(None)))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return golden.write_teacher(tmp_path_factory.mktemp("teacher") / "best")


@pytest.fixture(params=["student", "emulator", "emulator_mixed", "coupled"])
def stage(request, teacher):
    """-> model, objective, form."""
    return {
        "student": (golden.student(teacher), AnswerLoss(), "hidden"),
        "emulator": (golden.emulator(teacher, 3), StateRegression(), "hidden"),
        "emulator_mixed": (golden.emulator(teacher, "vocabulary"), StateRegression(mixture_weight=0.1), "hidden"),
        "coupled": (golden.coupled(3), AnswerLoss(), "none"),
    }[request.param]


def experiment(model, objective, form, **fields):
    fields = {"budget": Budget(steps=3, batch_size=4), "optimizer": AdamW(lr=1e-3)} | fields
    return Experiment(task=RecordedRows(form=form), model=model, objective=objective, **fields)


def pack(*experiments, **options):
    return Pack([Member.create(one, CPU) for one in experiments], **options)


def test_two_runs_in_a_pack_equal_two_alone(stage):
    exact = {"scaling.precision": "float64"}  # AdamW divides gradients by their size: where that is rounding it shows
    runs = [experiment(*stage).with_overrides({"seed": seed, **exact}) for seed in (0, 1)]
    together, alone = pack(*runs), [pack(run) for run in runs]
    for one in (together, *alone):
        one.train(3)
    flat = torch.cat([one.parameters.flat for one in alone])
    torch.testing.assert_close(together.parameters.flat, flat, atol=1e-7, rtol=1e-6)
    for packed, single in zip(together.evaluate(), [one.evaluate()[0] for one in alone], strict=True):
        assert packed == pytest.approx(single, rel=1e-3, abs=1e-5)
    first, second = together.parameters.flat
    assert not torch.allclose(first, second)


def test_a_spread_run_has_the_same_loss(stage):
    run = experiment(*stage)
    network, specs = build_network(run)
    materialise(network, CPU, torch.float32)
    fill(network, specs, run)
    single = pack(run)
    batch = single.data.batch(torch.arange(4)[None])
    expected, metrics = single.objective.loss(single.model, single.parameters.views, batch, single.answer, None)
    expected.sum().backward()
    step = TrainingStep(network, run, single.answer)
    loss, found = step(batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: float(value) for name, value in metrics.items()}, rel=1e-5
    )
    parameters = dict(network.named_parameters())
    for spec in specs:  # what is trained has a gradient: DistributedDataParallel waits for each of them
        assert (parameters[spec.name].grad is not None) == spec.trained, spec.name
        if spec.trained:
            torch.testing.assert_close(parameters[spec.name].grad, single.parameters.views[spec.name].grad[0], **CLOSE)
    assert (
        step(batch, evaluate=True)[1].keys()
        == single.objective.evaluate(single.model, single.parameters.views, batch, single.answer).keys()
    )


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_shallow_emulators_train_what_their_states_depend_on(num_layers, tmp_path):
    decoder = golden.decoder().with_overrides({"num_layers": num_layers})
    weights = {spec.name: torch.randn(spec.shape) for spec in decoder.parameters(122, 160)}
    decoder.save_folder(weights, tmp_path / "teacher", VOCABULARY)
    model = ThoughtEmulator(decoder=decoder, teacher=str(tmp_path / "teacher"), delta=2, mixture_size=2)
    single = pack(experiment(model, StateRegression(), "hidden"))
    views = {name: view.detach().clone().requires_grad_() for name, view in single.parameters.views.items()}
    single.objective.loss(model, views, single.data.batch(torch.arange(4)[None]), single.answer, None)[
        0
    ].sum().backward()
    assert {n for n, v in views.items() if v.grad is None} == {
        spec.name for spec in model.parameters(122, 160) if not spec.trained
    }


def test_a_frozen_emulator_stays_as_it_is():
    optimizer = AdamW(lr=1e-2, groups=(ParameterGroup(match="^emulator.", frozen=True),))
    run = pack(experiment(golden.coupled(1), AnswerLoss(), "none", optimizer=optimizer))
    before = {name: view.detach().clone() for name, view in run.parameters.views.items()}
    run.train(1)
    same = {name: torch.equal(before[name], view) for name, view in run.parameters.views.items()}
    assert all(value == name.startswith("emulator.") for name, value in same.items() if "wpe" not in name)


# ---- the teacher's states ----


def test_kept_states_do_not_depend_on_the_batch(teacher):
    network = teacher_in(str(teacher), CPU)
    batch = golden.hidden_batch("gsm8k")
    places = golden.student(teacher).taught(batch.tokens, batch.positions).places[0]
    rows = batch.tokens[0]
    whole = StateCache(network, "diagonal").states(rows, places, 10**9)
    torch.testing.assert_close(whole, network.compute(rows, places, "diagonal"), **CLOSE)
    for room in (10**9, 2 * 4 * 16 * 4, 0):  # all, two rows, none
        cache, order = StateCache(network, "diagonal"), torch.tensor([3, 1, 1, 4])
        for _ in range(2):
            assert torch.equal(cache.states(rows[order], places[order], room), whole[order])
        assert torch.equal(cache.states(rows, places, room), whole)
        assert cache.num_bytes <= room
    assert not torch.equal(cache.states(rows, places + 1, 0), whole)


def test_one_budget_for_training_and_none_for_evaluation(teacher, monkeypatch):
    budgets = []
    network = teacher_in(str(teacher), CPU)
    states = type(network).states
    monkeypatch.setattr(type(network), "states", lambda *args: budgets.append(args[-1]) or states(*args))
    run = pack(experiment(golden.student(teacher, cache_megabytes=3), AnswerLoss(), "hidden"))
    run.train(1)
    run.evaluate()
    assert budgets == [3 * 10**6, 0]


def test_a_teacher_that_is_written_again_is_read_again(tmp_path):
    folder = golden.write_teacher(tmp_path / "teacher")
    batch = golden.hidden_batch("mult4")
    model = golden.student(folder)
    before = model.taught(batch.tokens, batch.positions).states
    values = {name: value + 0.1 * torch.randn_like(value) for name, value in golden.tensors("teacher").items()}
    golden.decoder().save_folder(values, folder, VOCABULARY)
    assert not torch.allclose(model.taught(batch.tokens, batch.positions).states, before)


def test_rows_that_runs_share_are_computed_once(teacher, monkeypatch):
    batch, model = golden.hidden_batch("mult4"), golden.student(teacher, cache_megabytes=0)
    network, sizes = teacher_in(str(teacher), CPU), []
    compute = network.compute
    monkeypatch.setattr(network, "compute", lambda rows, *rest: sizes.append(len(rows)) or compute(rows, *rest))
    shared = (x.expand(3, -1, -1) for x in (batch.tokens, batch.positions))
    states = model.taught(*shared).states
    assert sizes == [4] and torch.equal(states[2], model.taught(batch.tokens, batch.positions).states[0])


# ---- mixture of one component a token ----


def test_components_are_the_tokens_where_the_states_are_read(teacher):
    batch = golden.hidden_batch("gsm8k")
    model = golden.emulator(teacher, "vocabulary")
    generator = torch.Generator().manual_seed(0)
    parameters = {
        spec.name: spec.init_value + 0.1 * torch.randn(1, *spec.shape, generator=generator)
        for spec in model.parameters(122, 160)
    }
    taught = model.taught(batch.tokens, batch.positions)
    plain, weighted = (
        StateRegression(mixture_weight=weight, mixture_offset=offset).loss(
            model, parameters, batch, golden.ANSWER, None
        )
        for weight, offset in ((0.0, 1), (0.5, 1))
    )
    torch.testing.assert_close(weighted[0] - plain[0], 0.5 * plain[1]["mixture_loss"])
    tokens = batch.tokens.gather(-1, (taught.places + 1).minimum(taught.separators.second[..., None]))
    found = model.emulate(parameters, batch.tokens, taught.separators.first, tokens)
    expected = -found.scores.log_softmax(-1).gather(-1, tokens[..., None]).sum(2).mean()
    torch.testing.assert_close(weighted[1]["mixture_loss"][0], expected)
    torch.testing.assert_close(plain[0], (found.states - taught.states).square().sum((2, 3)).mean(1) / 2)
    mixed = model.emulate(parameters, batch.tokens, taught.separators.first)
    evaluated = StateRegression().evaluate(model, parameters, batch, golden.ANSWER)["state_loss"]
    torch.testing.assert_close(evaluated, (mixed.states - taught.states).square().sum((2, 3)) / 2)
    assert not torch.allclose(mixed.states, found.states)


# ---- folders ----


def test_folders_are_read_back(stage, tmp_path):
    model = stage[0]
    values = {s.name: torch.randn(s.shape) for s in model.parameters(122, 160)}
    model.save_folder(values, tmp_path, VOCABULARY)
    found = model.load_folder(tmp_path, 122, 160)
    assert found.keys() == values.keys() and all(torch.equal(found[name], values[name]) for name in values)
    other = model.with_overrides({"decoder.num_heads": 4})
    with pytest.raises(ConfigError, match=r"model\.decoder\.num_heads is 4, in .* it is 2; set"):
        other.load_folder(tmp_path, 122, 160)


def test_a_folder_of_another_class(teacher, tmp_path):
    model = golden.coupled(1)
    model.save_folder({s.name: torch.zeros(s.shape) for s in model.parameters(122, 160)}, tmp_path, VOCABULARY)
    with pytest.raises(ConfigError, match="holds models.chain_coupled.CoupledStudent, not models.chain_student"):
        golden.student(teacher).load_folder(tmp_path, 122, 160)


def test_the_coupled_student_starts_from_both_checkpoints(teacher, tmp_path):
    for name, model in (("student", golden.student(teacher)), ("emulator_k5", golden.emulator(teacher, 5))):
        model.save_folder(dict(golden.tensors(name)), tmp_path / name, VOCABULARY)
    folders = {"student_folder": str(tmp_path / "student"), "emulator_folder": str(tmp_path / "emulator_k5")}
    model = golden.coupled(5, **folders)
    run = pack(experiment(model, AnswerLoss(), "none"))
    for name, value in golden.coupled_parameters(5).items():
        assert torch.equal(run.parameters.views[name], value), name
    assert run.evaluate()[0]["eval/test/accuracy"] == 0
    # rows without a chain are shorter: later positions are left out
    shorter = model.with_overrides({"decoder.num_positions": 30}).initial_weights(122, 27)
    stored = golden.tensors("student")["transformer.wpe.weight"]
    assert torch.equal(shorter.read("student.transformer.wpe.weight"), stored[:30])
    assert torch.equal(shorter.read("student.transformer.wpe.weight", slice(10, 20)), stored[10:20])
    for fields, message in (
        ({"mixture_size": 1}, r"model\.emulator_folder: mixture_components\.weight in .* is \[5, 16\]"),
        ({"softmax_temperature": 0.1}, r"model\.softmax_temperature is 0\.1, in .* it is 0\.05"),
        ({"student_folder": folders["emulator_folder"]}, r"model\.student_folder .*: holds models\.chain_emulator"),
        ({"student_folder": str(tmp_path / "none")}, r"model\.student_folder .* does not exist"),
        ({"decoder.num_layers": 3}, r"model\.decoder\.num_layers is 3, in model\.student_folder .* it is 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.with_overrides(fields).initial_weights(122, 160)


def test_one_checkpoint_alone_and_the_rest_drawn(teacher, tmp_path):
    golden.student(teacher).save_folder(dict(golden.tensors("student")), tmp_path, VOCABULARY)
    start = golden.coupled(1, student_folder=str(tmp_path)).initial_weights(122, 160)
    assert torch.equal(start.read("student.mlps.1.0.weight"), golden.tensors("student")["mlps.1.0.weight"])
    assert start.read("emulator.rnn.weight_ih_l0") is None


def test_a_student_starts_from_a_gpt2(teacher, tmp_path):
    model = golden.student(teacher, start=str(teacher))
    run = pack(experiment(model, AnswerLoss(), "hidden"))
    for name, value in golden.tensors("teacher").items():
        assert torch.equal(run.parameters.views[name][0], value)
    assert float(run.parameters.views["mlps.0.0.weight"].detach().std()) == pytest.approx(
        1 / math.sqrt(3 * 16), rel=0.1
    )
    for fields, message in (
        ({"start": str(tmp_path / "none")}, r"model\.start: .* does not exist"),
        ({"decoder.num_heads": 4}, r"model\.decoder\.num_heads is 4, in model\.start .* it is 2"),
        ({"decoder.mlp_width": 32}, r"model\.start: transformer\.h\.0\.mlp\.c_fc\.weight in .* is \[16, 64\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.with_overrides(fields).initial_weights(122, 160)


# ---- mistakes ----


def test_a_teacher_of_another_shape(teacher, tmp_path):
    for field, value in (("num_layers", 3), ("width", 32)):
        model = golden.student(teacher).with_overrides({f"decoder.{field}": value})
        message = rf"model\.decoder\.{field} is {value}, in model\.teacher .* it is {4 if value == 3 else 16}; set"
        with pytest.raises(ConfigError, match=message):
            experiment(golden.student(teacher), AnswerLoss(), "hidden").with_overrides({"model": model})
        batch = golden.hidden_batch("mult4")
        with pytest.raises(ConfigError, match=message):
            model.taught(batch.tokens, batch.positions)


def test_a_teacher_that_is_not_there_yet(tmp_path):
    batch = golden.hidden_batch("mult4")
    for folder, message in (("", "no folder is given"), (str(tmp_path / "later"), "does not exist")):
        model = MindReadingStudent(decoder=golden.decoder(), teacher=folder)
        experiment(model, AnswerLoss(), "hidden")  # an earlier stage fills it in
        with pytest.raises(ConfigError, match=rf"model\.teacher: .*{message}"):
            model.taught(batch.tokens, batch.positions)


def test_a_teacher_with_too_few_tokens_or_positions(teacher, tmp_path):
    small = Decoder(num_layers=4, num_heads=2, width=16, num_positions=50)
    for vocab_size, message in (
        (60, "has 60 tokens, the task 122"),
        (122, "has 50 positions, less than the task's 103"),
    ):
        weights = {spec.name: torch.zeros(spec.shape) for spec in small.parameters(vocab_size, 50)}
        folder = tmp_path / str(vocab_size)
        small.save_folder(weights, folder, VOCABULARY[:vocab_size])
        with pytest.raises(ConfigError, match=rf"model\.teacher: {message}"):
            experiment(golden.student(teacher), AnswerLoss(), "hidden").with_overrides({"model.teacher": str(folder)})
    batch = golden.hidden_batch("mult4")
    with pytest.raises(ConfigError, match=r"model\.teacher: has 50 positions, the rows 71 tokens"):
        golden.student(tmp_path / "122").taught(batch.tokens, batch.positions)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.delta": -1}, "model: delta -1 is negative|model.delta: -1 is negative"),
        ({"model.decoder.num_layers": 1, "model.teacher": ""}, "delta:? dynamic needs two layers"),
        ({"model.decoder.num_recurrences": 2}, "num_recurrences:? must be 1"),
        ({"model.decoder.num_positions": 50}, r"model\.decoder\.num_positions 50 is less than the task's 103"),
        (
            {"task.form": "none"},
            "task.form: MindReadingStudent reads rows of form hidden, task RecordedRows is of form",
        ),
        ({"objective.class": "models.chain_objective.StateRegression"}, "needs a ThoughtEmulator, not MindReadingStu"),
    ],
)
def test_mistakes_name_their_field(fields, message, teacher):
    with pytest.raises(ConfigError, match=message):
        experiment(golden.student(teacher), AnswerLoss(), "hidden").with_overrides(fields)


def test_supervised_mixtures_have_a_component_for_each_token(teacher):
    with pytest.raises(ConfigError, match=r"mixture_weight.* needs a component for each token"):
        experiment(golden.emulator(teacher, 5), StateRegression(), "hidden").with_overrides(
            {"objective.mixture_weight": 0.1}
        )
    with pytest.raises(ConfigError, match="mixture_size:? 0 is less than 1"):
        golden.coupled(5).with_overrides({"mixture_size": 0})


def test_neither_answers_from_the_question_alone(teacher):
    prompts = torch.zeros(1, 1, 3, dtype=torch.long)
    with pytest.raises(ConfigError, match="use generate_with_states"):
        golden.student(teacher).generate({}, prompts, 3)
    with pytest.raises(ConfigError, match="use objective StateRegression|train it with objective StateRegression"):
        golden.emulator(teacher, 1).answer_logits({}, prompts, prompts)


def test_no_more_positions_to_decode():
    model, parameters = golden.coupled(1), golden.coupled_parameters(1)
    with pytest.raises(ValueError, match="150 \\+ 12 tokens do not fit the 160 positions"):
        model.generate(parameters, torch.full((1, 1, 150), 5), 12)


def test_decoding_with_a_cache_equals_decoding_without():
    model, generator = golden.coupled(2), torch.Generator().manual_seed(0)
    specs = model.parameters(122, 160)
    parameters = {s.name: s.init_value + 0.3 * torch.randn(2, *s.shape, generator=generator) for s in specs}
    prompts = torch.randint(2, 122, (2, 3, 6), generator=generator)
    tokens, first = prompts, torch.full((2, 3, 1), 5)
    for _ in range(7):
        last = torch.full_like(first, tokens.shape[-1] - 1)
        logits = model.answer_logits(parameters, tokens, torch.cat([first, last], -1))
        tokens = torch.cat([tokens, logits[:, :, -1:].argmax(-1)], -1)
    assert torch.equal(model.generate(parameters, prompts, 7), tokens[..., 6:])
    stop = int(tokens[0, 0, 8])
    found = model.generate(parameters, prompts, 7, stop)[0, 0].tolist()
    ended = tokens[0, 0, 6:].tolist().index(stop) + 1
    assert found == tokens[0, 0, 6 : 6 + ended].tolist() + [0] * (7 - ended)


def test_plans_measure_the_decoder(stage):
    run = experiment(*stage)
    stand_in, extras = run.model.stand_in(run)
    extra, sizes = extras(stand_in, 4), (122, run.task.max_length)
    trained, whole = (
        sum(math.prod(s.shape) for s in m.parameters(*sizes) if s.trained) for m in (stand_in.model, run.model)
    )
    assert isinstance(stand_in.model, Decoder) and stand_in.task.max_length == run.task.max_length
    assert extra.trained_parameters == whole - trained and extra.forwards == int(run.model.form == "hidden")


def test_configurations_are_read_back(stage):
    assert type(stage[0]).from_dict(stage[0].to_dict()) == stage[0]
    assert isinstance(stage[0], MindReadingStudent | ThoughtEmulator | CoupledStudent)


@pytest.mark.parametrize("kind", [MindReadingStudent, ThoughtEmulator])
def test_a_delta_beyond_every_chain(kind):
    """The second separator of five base-4 digits is five tokens after the first: three sums, a space, and itself."""
    task = RunningSums(length=5, train_size=50, validation_size=20, test_size=20, form="hidden")
    kind(decoder=Decoder(num_layers=3), delta=5).check(task)
    with pytest.raises(ValueError, match=r"model\.delta 6 is beyond the longest chain, whose end is 5 tokens"):
        kind(decoder=Decoder(num_layers=3), delta=6).check(task)
