"""The probe of chains of thought: on networks whose answers are known, on every kind of network, on folders."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.chain_answering import Answerer, measure_speed
from analysis.chain_folders import evaluate_folders
from analysis.chain_of_thought import ChainOfThoughtEvaluation
from groundswell import AdamW, Budget, Experiment
from groundswell.config import ConfigError
from groundswell.probes import Opened, objection, run_probes, scalars
from groundswell.protocols import IGNORE, Model, Split
from groundswell.training.trainer import PackTrainer
from models.chain_coupled import CoupledStudent
from models.chain_emulator import ThoughtEmulator
from models.chain_objective import StateRegression
from models.chain_original import write_original
from models.chain_student import MindReadingStudent
from models.decoder import Decoder
from models.objectives import AnswerLoss
from models.stepwise import StepwiseInternalization
from tasks.chain_files import ChainFiles
from tasks.chain_of_thought import ChainOfThought
from tasks.modular_arithmetic import ModularArithmetic
from tasks.running_sums import RunningSums

TOKENIZER = Path(__file__).parents[1] / "golden" / "implicit_cot" / "tokenizer"
SUMS = RunningSums(length=4, base=3, validation_size=20, test_size=20)
DECODER = Decoder(num_layers=2, num_heads=2, width=16)
PROBE = ChainOfThoughtEvaluation(timed_examples=0, batch_size=8)


class Knowing(Model):
    """It knows all texts of a task, and says them, or what `says` makes of them. Logits are one-hot, times 5."""

    task: ChainOfThought
    wrong_rows: int = 0

    def parameters(self, vocab_size, max_length):
        return []

    def save_folder(self, parameters, folder, vocabulary):
        raise NotImplementedError

    load_folder = save_folder

    def answer_logits(self, parameters, tokens, positions, generators=None):
        dataset, separator = self.task.build(), self.task.separator
        rows = {}
        for number, (row, target) in enumerate(zip(*self._rows(dataset), strict=True)):
            whole = [*row.tolist(), separator]
            if number < self.wrong_rows:
                whole[target] = whole[target] % 2 + 1 if whole[target] != separator else whole[target]
            rows[tuple(row[: row.tolist().index(separator)].tolist())] = whole
        found = torch.zeros(*positions.shape, self.task.vocab_size)
        for index in range(tokens.shape[1]):
            row = tokens[0, index].tolist()
            whole = rows[tuple(row[: row.index(separator)])]
            for column, place in enumerate(positions[0, index].tolist()):
                following = whole[place + 1] if place + 1 < len(whole) else separator
                found[0, index, column, following] = 5.0
        return found

    @staticmethod
    def _rows(dataset):
        """Tokens, and the place of the last answer token before the closing separator."""
        split = dataset.evaluation["test"]
        last = (split.targets[:, dataset.answer.columns] != IGNORE).sum(1) - 1
        return split.tokens, (split.positions.gather(1, last[:, None])[:, 0]).tolist()


def drawn(model, task, seed=0):
    source = torch.Generator().manual_seed(seed)
    return {
        spec.name: torch.randn(1, *spec.shape, generator=source) * (spec.init_std or 0.0) + spec.init_value
        for spec in model.parameters(task.vocab_size, task.max_length)
    }


def ask(model, task, objective=None, parameters=None, probe=PROBE, step=0):
    experiment = Experiment(
        task=task, model=model, objective=objective or AnswerLoss(), optimizer=AdamW(lr=1e-3),
        budget=Budget(steps=1, batch_size=4),
    )  # fmt: skip
    if parameters is None:
        parameters = drawn(model, task)
    return probe.run(Opened(experiment, step, parameters or {"none": torch.zeros(1)}))


@pytest.mark.parametrize("form", ["explicit", "hidden", "none"])
def test_known_answers(form):
    task = SUMS.with_overrides({"form": form})
    perfect = ask(Knowing(task=task), task)
    assert perfect.scalars["chain/exact_match"] == perfect.scalars["chain/token_accuracy"] == 1.0
    assert perfect.scalars["chain/truncated"] == 0.0
    assert perfect.scalars["chain/perplexity"] == pytest.approx(1 + (task.vocab_size - 1) * math.exp(-5), rel=1e-5)
    answer = 5  # the tokens of " ####", which are two, " 1", " " and E
    chain = 2 + 2  # two sums, " " and E
    assert perfect.scalars["chain/tokens_per_answer"] == (answer + chain if form == "explicit" else answer)
    assert not len(perfect.tables["wrong_answers"])


@pytest.mark.parametrize("form", ["explicit", "none"])
def test_wrong_answers_are_listed(form):
    task = SUMS.with_overrides({"form": form})
    found = ask(Knowing(task=task, wrong_rows=7), task)
    wrong = found.tables["wrong_answers"]
    assert found.scalars["chain/exact_match"] == pytest.approx(1 - len(wrong) / 20)
    texts = task.texts("test")
    assert 0 < len(wrong) <= 7
    by_question = {text.question: text.answer for text in texts}
    for row in wrong.itertuples():
        assert by_question[row.question] == row.expected != row.given
        assert row.given.startswith("#### ")


def test_a_short_limit_shows():
    """The published limit of 128 tokens cuts off what has longer chains."""
    task = SUMS.with_overrides({"form": "explicit"})
    found = ask(Knowing(task=task), task, probe=PROBE.with_overrides({"max_new_tokens": 6}))
    assert found.scalars["chain/truncated"] == 1.0
    assert found.scalars["chain/exact_match"] == 0.0
    assert found.scalars["chain/token_accuracy"] == 1.0


def test_beams_need_keys_and_values():
    with pytest.raises(ConfigError, match="num_beams 2: Knowing decodes greedily only"):
        ask(Knowing(task=SUMS), SUMS, probe=PROBE.with_overrides({"num_beams": 2}))


# ---- networks ----


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder of a network that has learned nothing."""
    folder, task = tmp_path_factory.mktemp("teacher") / "best", SUMS
    weights = {name: value[0] for name, value in drawn(DECODER, task, seed=1).items()}
    DECODER.save_folder(weights, folder, task.build().vocabulary)
    return str(folder)


def network(kind, teacher):
    """-> model, form of its rows."""
    return {
        "none": (DECODER, "none"),
        "explicit": (DECODER, "explicit"),
        "given_chain": (DECODER, "hidden"),
        "student": (MindReadingStudent(decoder=DECODER, teacher=teacher), "hidden"),
        "coupled": (CoupledStudent(decoder=DECODER, mixture_size=2), "none"),
    }[kind]


@pytest.mark.parametrize("kind", ["none", "explicit", "given_chain", "student", "coupled"])
def test_each_kind_of_network(kind, teacher):
    model, form = network(kind, teacher)
    task = SUMS.with_overrides({"form": form})
    found = ask(model, task, probe=PROBE.with_overrides({"timed_examples": 3, "batch_size": 3, "num_beams": 2}))
    scalars = {name.removeprefix("chain/"): value for name, value in found.scalars.items()}
    assert scalars.keys() == {
        "exact_match", "truncated", "tokens_per_answer", "examples", "perplexity", "token_accuracy",
        "throughput_batch_1", "throughput_batched", "relative_speed", "relative_speed_batched",
    }  # fmt: skip
    split = task.build().evaluation["test"]
    logits = model.answer_logits(drawn(model, task), split.tokens[None], split.positions[None])[0]
    counted = split.targets != IGNORE
    loss = torch.nn.functional.cross_entropy(logits[counted], split.targets[counted])
    assert scalars["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    right = (logits.argmax(-1) == split.targets)[counted].double().mean()
    assert scalars["token_accuracy"] == pytest.approx(float(right))
    assert all(value > 0 for name, value in scalars.items() if "speed" in name or "throughput" in name)


def test_greedy_answers_are_those_of_the_model(teacher):
    """Of a coupled network and, with its teacher's states, of a student: as their own decoding has them."""
    for kind in ("coupled", "student"):
        model, form = network(kind, teacher)
        task = SUMS.with_overrides({"form": form})
        parameters, split = drawn(model, task), task.build().evaluation["test"]
        answerer = Answerer(model, parameters, task, max_new_tokens=5)
        questions = answerer.questions(split, [""] * len(split))
        prompts = questions.prompts.tokens[None]  # of one length
        if kind == "coupled":
            found = model.generate(parameters, prompts, 5, task.separator)
        else:
            states = model.taught(split.tokens[None], split.positions[None]).states
            found = model.generate_with_states(parameters, prompts, states, 5, task.separator)
        decoded = answerer.answer(questions)
        assert [row[: len(mine)] for row, mine in zip(found[0].tolist(), decoded.rows(), strict=True)] == decoded.rows()
        assert decoded.counts.min() == 5 or task.separator in decoded.rows()[int(decoded.counts.argmin())]


def test_a_chain_takes_longer_than_an_answer():
    task = RunningSums(length=20, base=3, validation_size=4, test_size=4, train_size=4, form="explicit")
    model = Knowing(task=task)
    answerer = Answerer(model, {"none": torch.zeros(1)}, task)
    answers = [text.answer for text in task.texts("test")]
    batch = answerer.questions(task.build().evaluation["test"], answers)
    assert answerer.answer(batch).counts.tolist() == [2 * 18 // 2 + 2 + 5] * 4
    assert answerer.answer_at_once(batch).counts.tolist() == [5] * 4
    speed = measure_speed(answerer, [batch], rounds=3)
    assert speed.relative < 0.6
    assert speed.examples_per_second > 0


@pytest.mark.parametrize("keep_positions", [False, True])
def test_a_chain_that_is_being_internalised(keep_positions):
    """What is left of it at this step counts."""
    task = SUMS.with_overrides({"form": "explicit"})
    objective = StepwiseInternalization(
        remove_every=10, remove_all_from=3, smoothing=None, keep_positions=keep_positions
    )
    dataset, parameters = task.build(), drawn(DECODER, task)
    split = dataset.evaluation["test"]
    batch = Split(split.tokens[None], split.positions[None], split.targets[None])
    perplexities = []
    for step in (0, 11, 31):
        scheduled = {"removed": torch.tensor([float(objective.removed(max(0, step - 1)))])}
        loss, _ = objective.loss(DECODER, parameters, batch, dataset.answer, None, scheduled)
        found = ask(DECODER, task, objective, parameters, step=step).scalars["chain/perplexity"]
        assert found == pytest.approx(math.exp(float(loss)), rel=1e-5)
        perplexities.append(found)
    assert len(set(perplexities)) == 3
    gaps = [
        Answerer(DECODER, parameters, task, objective, step).questions(split, [""] * len(split)).prompts.gaps
        for step in (0, 11, 31)
    ]
    if keep_positions:  # two sums, the space before E
        assert [gap.unique().tolist() for gap in gaps] == [[0], [1], [3]]
        right = objective.with_overrides({"side": "right"})
        with pytest.raises(ConfigError, match="step 11: objective.side=right"):
            ask(DECODER, task, right, parameters, step=11)
        assert (
            ask(DECODER, task, right, parameters, step=31).scalars
            == ask(DECODER, task, objective, parameters, step=31).scalars
        )
    else:
        assert gaps == [None] * 3


def test_who_is_not_asked(teacher):
    emulator = Experiment(
        task=SUMS.with_overrides({"form": "hidden"}), model=ThoughtEmulator(decoder=DECODER, teacher=teacher),
        objective=StateRegression(), optimizer=AdamW(lr=1e-3), budget=Budget(steps=1, batch_size=4),
    )  # fmt: skip
    assert objection(PROBE, emulator) == "an emulator gives states, no answers; couple it with a student"
    other = emulator.with_overrides({"task": ModularArithmetic(modulus=7), "model": DECODER, "objective": AnswerLoss()})
    assert objection(PROBE, other) == "task ModularArithmetic has no chain of thought"


def test_a_run_is_asked(make_run):
    experiment = Experiment(
        task=SUMS, model=DECODER.with_overrides({"width": 32}), objective=AnswerLoss(), optimizer=AdamW(lr=1e-2),
        budget=Budget(steps=60, batch_size=32),
    )  # fmt: skip
    folder = make_run(experiment)
    trainer = PackTrainer([folder])
    while not trainer.finished:
        trainer.advance()
    (answer,) = run_probes(folder, [PROBE])
    found = scalars(answer)
    assert found["chain/token_accuracy"] > 0.5
    assert found["chain/exact_match"] >= 0.2
    wrong = pd.read_csv(answer / "wrong_answers.csv")
    assert len(wrong) == round(20 * (1 - found["chain/exact_match"]))
    with pytest.raises(ConfigError, match="no split 'valid'"):
        run_probes(folder, [PROBE.with_overrides({"split": "valid"})])


# ---- folders ----


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders as the published code writes them, of networks that have learned nothing; lines; the task."""
    root = tmp_path_factory.mktemp("published")
    lines = [example.line for example in SUMS.texts("test")]
    (root / "lines.txt").write_text("\n".join(lines[:5]) + "\n")
    task = ChainFiles(path=str(root), train="lines.txt", validation="lines.txt", tokenizer=str(TOKENIZER))
    decoder = DECODER.with_overrides({"num_positions": 64})
    models = {
        "teacher": decoder,
        "student": MindReadingStudent(decoder=decoder, teacher=str(root / "teacher")),
        "emulator": ThoughtEmulator(decoder=decoder, mixture_size=3, teacher=str(root / "teacher")),
    }
    decoder.save_folder(
        {name: x[0] for name, x in drawn(decoder, task).items()}, root / "base", task.build().vocabulary
    )
    settings = {"emulator": {"mixture_size": 3, "softmax_temperature": 0.07}}
    for name, model in models.items():
        weights = {key: x[0] for key, x in drawn(model, task, seed=len(name)).items()}
        write_original(root / name, weights, str(root / "base"), settings.get(name))
    return root, task, models


@pytest.mark.parametrize("names", [("teacher",), ("teacher", "student"), ("student", "emulator")])
def test_published_folders_are_asked_like_runs(names, published):
    root, task, models = published
    folders = {name: root / name for name in names}
    found = evaluate_folders(root / "lines.txt", TOKENIZER, **folders, probe=PROBE)
    own = {name: drawn(models[name], task, seed=len(name)) for name in names}
    if names == ("student", "emulator"):
        model = CoupledStudent(decoder=models["teacher"], mixture_size=3, softmax_temperature=0.07)
        parameters = {f"{name}.{key}": value for name in names for key, value in own[name].items()}
    else:
        model, parameters = models[names[-1]], own[names[-1]]
    form = {1: "explicit"}.get(len(names), "hidden" if "teacher" in names else "none")
    task = task.with_overrides({"form": form})
    expected = ask(model, task, parameters=parameters, probe=PROBE.with_overrides({"split": "validation"}))
    assert found.scalars == pytest.approx(expected.scalars)
    assert found.tables["wrong_answers"].equals(expected.tables["wrong_answers"])


def test_mistakes_with_folders(published, tmp_path):
    root, *_ = published
    with pytest.raises(ConfigError, match="emulator: give teacher, teacher and student, or student and emulator"):
        evaluate_folders(root / "lines.txt", TOKENIZER, emulator=root / "emulator")
    with pytest.raises(ConfigError, match=r"student .*: has no config.json; give a checkpoint folder"):
        evaluate_folders(root / "lines.txt", TOKENIZER, student=tmp_path, emulator=root / "emulator")
