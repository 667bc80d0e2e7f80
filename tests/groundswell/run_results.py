"""What a run has left in its folder, for comparing runs."""

import torch
from safetensors.torch import load_file


def final_weights(folder):
    return load_file(folder.checkpoint_folder(folder.checkpoint_step()) / "model.safetensors")


def curves(folder):
    """The journal without what depends on the clock."""
    return [
        (line["step"], {k: v for k, v in line["metrics"].items() if not k.startswith("perf/")})
        for line in folder.journal()
    ]


def assert_equal_runs(one, other):
    """Bit for bit."""
    assert curves(one) == curves(other)
    weights, others = final_weights(one), final_weights(other)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
