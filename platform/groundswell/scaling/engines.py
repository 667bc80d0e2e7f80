"""How a strategy computes: one interface over copies (DDP), shards (FSDP2) and DeepSpeed."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from groundswell.config import ConfigError
from groundswell.experiment import Experiment
from groundswell.protocols import Answer, Split
from groundswell.scaling.network import DTYPES, TrainingStep, build_network, fill, materialise

Piece = tuple[Split, Tensor]  # a micro-batch of this worker, and its share of the whole batch's loss


class Engine(ABC):
    """One worker's part of a run. Every worker calls the same methods in the same order."""

    elastic = True  # can another number of workers read the state?
    free_accumulation = True  # may updates have other numbers of micro-batches?

    def __init__(self, experiment: Experiment, answer: Answer, device: torch.device, num_micro_batches: int) -> None:
        """`num_micro_batches` of each worker in every update."""
        self.experiment, self.device, self.num_micro_batches = experiment, device, num_micro_batches
        self.network, self.specs = build_network(experiment)
        self.step_module = TrainingStep(self.network, experiment, answer)
        self._set_up()

    @abstractmethod
    def _set_up(self) -> None:
        """Materialise, fill and wrap the network; make the optimizer."""

    @abstractmethod
    def update(self, pieces: Sequence[Piece], factor: float, source: torch.Generator | None) -> dict[str, Tensor]:
        """One update with the learning rates times `factor`. Returns this worker's share of loss and metrics: summed
        over the workers they are those of the whole batch."""

    def restart_optimizer(self) -> None:
        """Forget the optimizer's moments."""
        raise ConfigError(f"scaling.strategy {self.experiment.scaling.strategy}: cannot reset the optimizer; use fsdp")

    @abstractmethod
    def grad_norm(self) -> float:
        """Global norm of the last update's gradients, before clipping."""

    @abstractmethod
    def weight_norm(self) -> float:
        """Global norm of all parameters."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write this worker's part of the training state."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` of all workers has written."""

    @abstractmethod
    def full_weights(self) -> dict[str, Tensor] | None:
        """All parameters by name on the CPU: on the first worker; None on the others."""

    @torch.no_grad()
    def evaluate(self, batch: Split) -> dict[str, Tensor]:
        """Metrics of each example [B]."""
        with self._precision():
            return self.step_module(batch, evaluate=True)[1]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What torch.optim.AdamW is given: for each group of the experiment its decayed and its other tensors."""
        settings, optimizer = self.experiment.optimizer.group_settings(), self.experiment.optimizer
        parameters = dict(self.network.named_parameters())
        groups: dict[tuple[int, bool], list[Tensor]] = {}
        for spec in self.specs:
            if spec.trained:
                groups.setdefault((spec.group, spec.decayed), []).append(parameters[spec.name])
        if not groups:
            raise ConfigError("optimizer.groups: every tensor is frozen; nothing is left to train")
        return [
            {
                "params": members,
                "lr": settings[group].lr,
                "base_lr": settings[group].lr,
                "weight_decay": settings[group].weight_decay if decayed or optimizer.decay_all else 0.0,
                "maximize": settings[group].ascent,
            }
            for (group, decayed), members in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
        ]

    def make_optimizer(self) -> torch.optim.AdamW:
        o = self.experiment.optimizer
        return torch.optim.AdamW(self.parameter_groups(), betas=(o.beta1, o.beta2), eps=o.eps, fused=True)


def total_norm(tensors: Sequence[Tensor]) -> float:
    norm = torch.nn.utils.get_total_norm(tensors)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


class TorchEngine(Engine):
    """What copies and shards have in common: torch's optimizer, and torch's distributed checkpoints."""

    optimizer: torch.optim.AdamW

    def _forward(self, batch: Split, source: torch.Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        with self._precision():
            return self.step_module(batch, source)

    def update(self, pieces: Sequence[Piece], factor: float, source: torch.Generator | None) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for number, (batch, share) in enumerate(pieces):
            last = number == len(pieces) - 1
            with self._gradients(last):
                loss, metrics = self._forward(batch, source)
                (loss * (share * dist.get_world_size())).backward()  # workers' gradients are averaged
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums.get(name, 0.0) + value * share
        if self.experiment.optimizer.clip_norm:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(trained, self.experiment.optimizer.clip_norm)
            self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.step()
        return sums

    def _gradients(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the passes of a micro-batch."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def restart_optimizer(self) -> None:
        for state in self.optimizer.state.values():
            for tensor in state.values():  # step, exp_avg, exp_avg_sq
                tensor.zero_()

    def grad_norm(self) -> float:
        if self.experiment.optimizer.clip_norm:
            return float(self._norm)
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return total_norm(grads)

    def weight_norm(self) -> float:
        return total_norm([p.detach() for p in self.network.parameters()])

    # ---- state ----

    def _state(self) -> dict[str, Any]:
        weights, optimizer = get_state_dict(self.network, self.optimizer)
        return {"weights": weights, "optimizer": optimizer}

    def save(self, folder: Path) -> None:
        dcp.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.network, self.optimizer, model_state_dict=state["weights"], optim_state_dict=state["optimizer"]
        )

    def full_weights(self) -> dict[str, Tensor] | None:
        leader = dist.get_rank() == 0
        weights = {}
        for name, parameter in self.network.named_parameters():
            tensor = parameter.detach()
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # one at a time on the device
            if leader:
                weights[name] = whole.cpu()
        return weights if leader else None


class DDPEngine(TorchEngine):
    """A copy of the network on each worker; gradients are averaged while the backward pass runs."""

    def _set_up(self) -> None:
        materialise(self.step_module, self.device, DTYPES[self.experiment.scaling.precision])
        fill(self.network, self.specs, self.experiment)
        self.optimizer = self.make_optimizer()
        devices = [self.device] if self.device.type == "cuda" else None
        self._wrapped = DistributedDataParallel(self.step_module, device_ids=devices, gradient_as_bucket_view=True)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.experiment.scaling.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _forward(self, batch: Split, source: torch.Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        with self._precision():
            return self._wrapped(batch, source)

    def _gradients(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self._wrapped.no_sync()


class FSDPEngine(TorchEngine):
    """FSDP2: each block's parameters, gradients and optimizer state are spread over the workers.

    Gradients are reduced after every micro-batch: whole ones never accumulate, which is the point of sharding.
    """

    def _set_up(self) -> None:
        scaling = self.experiment.scaling
        options: dict[str, Any] = {"mesh": init_device_mesh(self.device.type, (dist.get_world_size(),))}
        if scaling.precision == "bf16":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if scaling.offload == "all":
            options["offload_policy"] = CPUOffloadPolicy()
        for block in self.network.blocks:
            fully_shard(block, **options)
        fully_shard(self.network, **options)
        home = torch.device("cpu") if scaling.offload == "all" else self.device
        materialise(self.step_module, home, torch.float32)
        fill(self.network, self.specs, self.experiment)
        self.experiment.model.shard_frozen(self.device)
        self.optimizer = self.make_optimizer()


ENGINES: dict[str, type[Engine]] = {"ddp": DDPEngine, "fsdp": FSDPEngine}


def engine_class(strategy: str) -> type[Engine]:
    """Raises ConfigError where DeepSpeed is asked for and not installed."""
    if strategy == "deepspeed":
        from groundswell.scaling.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine
    return ENGINES[strategy]
