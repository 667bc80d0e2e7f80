"""The bilinear model: its definition, and the asymmetry that it is there to show."""

from __future__ import annotations

from pathlib import Path

import torch

from groundswell import AdamW, Budget, Experiment
from groundswell.training.pack import Member, Pack
from models.bilinear import EMBEDDING, MATRIX, Bilinear
from models.objectives import WordLoss
from tasks.reverse import Reverse


def parameters(model: Bilinear, num_runs: int, vocab_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        spec.name: torch.randn(num_runs, *spec.shape, generator=generator) for spec in model.parameters(vocab_size, 2)
    }


def test_logits_are_bilinear_in_the_context_and_the_answer() -> None:
    model = Bilinear(width=8)
    weights = parameters(model, 2, 5)
    tokens = torch.tensor([[[1, 4, 2]], [[0, 3, 3]]])
    logits = model.logits(weights, tokens)
    assert logits.shape == (2, 1, 3, 5)
    for run in range(2):
        table, matrix = weights[EMBEDDING][run], weights[MATRIX][run]
        for place in range(3):
            context = table[tokens[run, 0, : place + 1]].sum(0)
            torch.testing.assert_close(logits[run, 0, place], context @ matrix @ table.T)
    positions = torch.tensor([[[2, 0]], [[1, 1]]])
    picked = model.answer_logits(weights, tokens, positions)
    torch.testing.assert_close(picked[0, 0], logits[0, 0, [2, 0]])
    torch.testing.assert_close(picked[1, 0], logits[1, 0, [1, 1]])


def test_one_direction_is_learned_and_the_other_is_not() -> None:
    """Seen directions of held-out pairs get their logit, unseen ones stay where they were (paper, theorem 2)."""
    experiment = Experiment(
        task=Reverse(entity_vocab_size=80, seed=1),
        model=Bilinear(width=256),
        objective=WordLoss(),
        optimizer=AdamW(lr=3e-3, weight_decay=0.0, clip_norm=0),
        budget=Budget(epochs=150, batch_size=64),
    )
    pack = Pack([Member.create(experiment.with_overrides({"seed": seed}), torch.device("cpu")) for seed in range(2)])
    start = pack.parameters.views[EMBEDDING].detach().clone()
    pack.train(150)
    assert torch.equal(pack.parameters.views[EMBEDDING].detach(), start)
    for metrics in pack.evaluate():
        assert metrics["eval/train/word_nll"] < 0.1
        assert metrics["eval/validation/word_nll"] > metrics["eval/validation/uniform_candidate_nll"]
    panels = experiment.task.draw().panels  # type: ignore[attr-defined]
    gaps = {}
    for name in ("val_seen", "val_unseen"):
        prompts = torch.from_numpy(panels[name].prompts).view(1, -1, 1).expand(2, -1, 1)
        logits = experiment.model.answer_logits(pack.parameters.select([0, 1]), prompts, torch.zeros_like(prompts))
        square = logits[:, :, 0, torch.from_numpy(panels[name].answers)]
        rest = square[:, ~torch.eye(square.shape[1], dtype=torch.bool)]
        gaps[name] = (square.diagonal(dim1=1, dim2=2).mean() - rest.mean()).item()
    assert gaps["val_seen"] > 2.0
    assert abs(gaps["val_unseen"]) < 0.15 * gaps["val_seen"]


def test_folder(tmp_path: Path) -> None:
    model = Bilinear(width=8)
    one = {name: tensor[0] for name, tensor in parameters(model, 1, 5).items()}
    model.save_folder(one, tmp_path, [f"<{n}>" for n in range(5)])
    loaded = model.load_folder(tmp_path, 5, 2)
    assert all(torch.equal(loaded[name], one[name]) for name in one)
