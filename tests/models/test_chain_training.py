"""The stages on a real task: checkpoints go from one to the next, and the student learns to read its teacher."""

import pytest
import torch

from groundswell import AdamW, Budget, Evaluation, Experiment
from groundswell.training.pack import Member, Pack
from models.chain_coupled import CoupledStudent
from models.chain_emulator import ThoughtEmulator
from models.chain_objective import StateRegression
from models.chain_student import MindReadingStudent
from models.decoder import Decoder
from models.objectives import AnswerLoss
from tasks.multiplication_chain import MultiplicationChain

SHAPE = Decoder(num_layers=3, num_heads=2, width=32, num_positions=40, init_scale=3.0)


def train(model, objective, form, steps, folder):
    """A pack of one run, and its checkpoint in a folder."""
    run = Experiment(
        task=MultiplicationChain(digits=2, form=form, train_size=512, validation_size=64, test_size=64),
        model=model,
        objective=objective,
        optimizer=AdamW(lr=3e-3, weight_decay=0.01),
        budget=Budget(steps=steps, batch_size=32),
        evaluation=Evaluation(max_examples=64),
    )
    pack = Pack([Member.create(run, torch.device("cpu"))])
    before = pack.evaluate()[0]
    pack.train(steps)
    vocabulary = pack.members[0].dataset.vocabulary
    model.save_folder(pack.parameters.row(0), folder, vocabulary)
    return before, pack.evaluate()[0]


def test_four_stages(tmp_path):
    teacher, student, emulator = (str(tmp_path / name) for name in ("teacher", "student", "emulator"))
    train(SHAPE, AnswerLoss(), "explicit", 20, tmp_path / "teacher")
    before, after = train(
        MindReadingStudent(decoder=SHAPE, teacher=teacher), AnswerLoss(), "hidden", 20, tmp_path / "student"
    )
    student_loss = after["eval/validation/answer_loss"]
    assert student_loss < 0.8 * before["eval/validation/answer_loss"]
    before, after = train(
        ThoughtEmulator(decoder=SHAPE, teacher=teacher), StateRegression(), "hidden", 20, tmp_path / "emulator"
    )
    assert after["eval/validation/state_loss"] < 0.8 * before["eval/validation/state_loss"]
    coupled = CoupledStudent(decoder=SHAPE, student_folder=student, emulator_folder=emulator)
    before, after = train(coupled, AnswerLoss(), "none", 10, tmp_path / "coupled")
    assert before["eval/validation/answer_loss"] == pytest.approx(student_loss, rel=0.3)  # as the student was left
    assert after["eval/validation/answer_loss"] < before["eval/validation/answer_loss"]
