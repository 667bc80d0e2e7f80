"""Real training steps of small networks, and what they need."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from groundswell import AdamW, Experiment, Scaling
from groundswell.planning.footprint import ATTENTION_FLOPS
from groundswell.protocols import Answer, Model, Split
from groundswell.scaling.network import TrainingStep, build_network, fill, materialise
from models.objectives import AnswerLoss
from tasks.random_tokens import RandomTokens


def experiment(model: Model, length: int = 64, vocabulary: int = 500, answers: int | None = None) -> Experiment:
    task = RandomTokens(vocabulary=vocabulary, length=length, answers=answers or length, num_examples=64)
    return Experiment(task=task, model=model, objective=AnswerLoss(), optimizer=AdamW(lr=1e-3))


class RealStep:
    """A network with its gradients and moments, as torch trains it."""

    def __init__(self, own: Experiment, checkpointing: bool = False, device: str = "cpu") -> None:
        scaling = Scaling(strategy="ddp", activation_checkpointing=checkpointing)
        self.experiment, self.device = own.model_copy(update={"scaling": scaling}), torch.device(device)
        self.network, specs = build_network(self.experiment)
        self.step = TrainingStep(self.network, self.experiment, Answer(slice(-1, None)))
        materialise(self.step, self.device, torch.float32)
        fill(self.network, specs, self.experiment)
        self.trained = [parameter for parameter in self.step.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, fused=True)

    def batch(self, rows: int) -> Split:
        train = self.experiment.task.build().train.select(slice(0, rows))
        return Split(train.tokens[None], train.positions[None], train.targets[None]).to(self.device)

    def run(self, batch: Split) -> None:
        """Gradients stay allocated, as when they accumulate."""
        self.step(batch)[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    @property
    def state_bytes(self) -> int:
        moments = [t for state in self.optimizer.state.values() for t in state.values() if t.dim()]
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        tensors = [*{id(p): p for p in self.step.parameters()}.values(), *gradients, *moments]
        return sum(tensor.nbytes for tensor in tensors)


def cpu_peak_bytes(step: RealStep, rows: int) -> int:
    """The most that one whole training step has allocated, states included, by torch's own allocation events."""
    batch = step.batch(rows)
    step.run(batch)  # makes gradients and moments
    return step.state_bytes + max(_profiled_peak(step, batch) for _ in range(2))  # a cold profiler loses events


def _profiled_peak(step: RealStep, batch: Split) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.run(batch)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def real_flops(step: RealStep, rows: int) -> int:
    batch = step.batch(rows)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        step.step(batch)[0].backward()
    return counter.get_total_flops()
