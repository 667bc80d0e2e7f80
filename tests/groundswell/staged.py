"""A pipeline of the smallest real runs: a decoder is trained, others go on from it."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from groundswell.stages import Stage, resolve
from groundswell.sweep import Axis, Sweep
from models.decoder import Decoder
from models.huggingface import decoder_fields


class _Weights:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        return self._tensors[name][rows]


class ContinuedDecoder(Decoder):
    """Begins with the weights of another decoder."""

    start: str = Field("", description="folder of the decoder, or reference to a run")

    def initial_weights(self, vocab_size: int, max_length: int) -> Any:
        if not self.start:
            return None
        folder = resolve(self.start)
        first = Decoder.from_dict(decoder_fields(folder))
        return _Weights(first.load_folder(folder, vocab_size, max_length))


def pipeline(tiny, *, seeds=(0,), lrs=(1e-3,)) -> Sweep:
    """first -> (left | right) -> last; the rate is left's own."""
    shape = {name: tiny.model.to_dict()[name] for name in ("num_layers", "num_heads", "width", "init_scale")}
    continued = {"model": ContinuedDecoder(**shape), "budget.steps": 20}
    stages = (
        Stage("first", {"checkpointing.best_metric": "eval/test/answer_loss", "checkpointing.best_mode": "min"}),
        Stage("left", {**continued, "optimizer.warmup_steps": 3}, {"model.start": "first"}),
        Stage("right", {**continued, "optimizer.weight_decay": 0.5}, {"model.start": "first@last"}),
        Stage("last", {**continued, "optimizer.beta1": 0.8}, {"model.start": "left"}),
    )
    axes = {"optimizer.lr": Axis(values=lrs), "seed": Axis(values=seeds)}
    return Sweep("pipeline", tiny, axes, metric="eval/test/accuracy", stages=stages)
