"""Does a Llama grok? Two-hop composition with the blocks of GPT-2 and of Llama (RMSNorm, SwiGLU, rotary positions).

python sweeps/llama_grokking.py [--preset smoke|demo] [--scaling.strategy fsdp --scaling.num-workers 2] [--help]

The same experiment on one core, on several workers and on a cluster: only `scaling` changes.
"""

from functools import partial
from typing import Any

from analysis.grokking import grokking_report
from groundswell.cli import main
from groundswell.sweep import Axis, Sweep
from models.decoder import Decoder
from models.transformers_model import TransformersModel
from sweeps.grok_wd_layers import DEMO, HELD_OUT

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"model": Decoder(num_layers=2, num_heads=4, width=64, init_scale=3.0)},
    # 168 hidden units: three matrices of SwiGLU hold about as much as GPT-2's two of 256
    "llama": {"model": TransformersModel(num_layers=2, num_heads=4, width=64, mlp_width=168, init_std=0.06)},
}
PRESETS: dict[str, Any] = {  # what it is for, seeds, what differs from the demo of grok_wd_layers
    "smoke": ("does everything work", (0,), {
        "budget.steps": 60, "metrics_every": 20, "checkpointing.schedule.every": 20, "budget.batch_size": 128,
    }),
    "demo": ("both, two seeds, 3,000 steps", (0, 1), {"budget.steps": 3_000, "optimizer.weight_decay": 1.0}),
}  # fmt: skip


def build(preset: str) -> Sweep:
    _, seeds, changes = PRESETS[preset]
    axes = {"architecture": Axis.of_names(ARCHITECTURES), "seed": Axis(values=seeds, also=("task.seed",))}
    report = partial(grokking_report, panel_axis="architecture", colour_axis="architecture")
    return Sweep("llama_grokking", DEMO.with_overrides(changes), axes, metric=HELD_OUT, report=report)


if __name__ == "__main__":
    main(build, {preset: values[0] for preset, values in PRESETS.items()})
