"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054): stage 1 shards the optimizer's state, 2 the gradients
too, 3 the parameters too."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from groundswell.config import ConfigError
from groundswell.scaling import portable, zero_restore
from groundswell.scaling.engines import Engine, Piece
from groundswell.scaling.network import DTYPES, fill, materialise, owners_of
from groundswell.training.flat import initial_tensor
from groundswell.training.sampler import generator

TAG = "state"


def import_deepspeed(on_gpu: bool) -> Any:
    """Raises ConfigError where it is not installed."""
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"scaling.strategy deepspeed: DeepSpeed cannot be imported ({error}); pip install deepspeed, or use fsdp"
        ) from None
    # Its shared-memory reduction for CPUs is compiled at first use, for minutes; a process that is killed meanwhile
    # leaves a lock on which all later ones wait for ever. It gained nothing in our measurements.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


class DeepSpeedEngine(Engine):
    """DeepSpeed around torch's AdamW. Its states can be read by the same number of workers only, unless converted."""

    elastic = False
    free_accumulation = False

    def _set_up(self) -> None:
        self.deepspeed = import_deepspeed(self.device.type == "cuda")
        self.stage = self.experiment.scaling.zero_stage
        config = self._config()
        if self.stage == 3:
            self._partition(config)
            if self.network.blocks:
                leaves = {type(block) for block in self.network.blocks}
                self.deepspeed.utils.set_z3_leaf_modules(self.network, list(leaves))
            self.experiment.model.shard_frozen(self.device)
        else:
            materialise(self.step_module, self.device, DTYPES[self.experiment.scaling.precision])
            fill(self.network, self.specs, self.experiment)
        self.engine, *_ = self.deepspeed.initialize(
            model=self.step_module, optimizer=self.make_optimizer(), config=config, dist_init_required=False
        )

    def _config(self) -> dict[str, Any]:
        e, scaling = self.experiment, self.experiment.scaling
        zero: dict[str, Any] = {"stage": scaling.zero_stage}
        if scaling.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if scaling.offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        each = -(-e.budget.batch_size // dist.get_world_size())
        return {
            "train_micro_batch_size_per_gpu": min(each, scaling.micro_batch or each),
            "gradient_accumulation_steps": self.num_micro_batches,
            "gradient_clipping": e.optimizer.clip_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": scaling.precision == "bf16"},
            "steps_per_print": 10**9,
        }

    def _partition(self, config: dict[str, Any]) -> None:
        """Fill and shard tensor by tensor: no worker ever holds the whole network."""
        e = self.experiment
        reader, source = e.model.initial_weights(e.task.vocab_size, e.task.max_length), generator(e.seed, "init")
        dtype = torch.bfloat16 if e.scaling.precision == "bf16" else torch.float32
        owners = owners_of(self.network)
        parameters = dict(self.network.named_parameters())
        for spec in self.specs:
            values = initial_tensor(spec, source, reader).to(self.device, dtype)
            filled = nn.Parameter(values, requires_grad=spec.trained)
            for owner, name in owners[id(parameters[spec.name])]:
                owner._parameters[name] = filled
            self.deepspeed.zero.Init(module=nn.ParameterList([filled]), config_dict_or_path=config, dtype=dtype)
        materialise(self.step_module, self.device, dtype)  # what is left: buffers

    def update(self, pieces: Sequence[Piece], factor: float, source: torch.Generator | None) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        for batch, share in pieces:
            loss, metrics = self.engine(batch, source)
            # DeepSpeed takes the mean over workers and micro-batches
            self.engine.backward(loss * (share * dist.get_world_size() * self.num_micro_batches))
            self.engine.step()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums.get(name, 0.0) + value * share
        return sums

    def grad_norm(self) -> float:
        return float(self.engine.get_global_grad_norm())

    @torch.no_grad()
    def weight_norm(self) -> float:
        if self.stage < 3:
            return float(torch.nn.utils.get_total_norm([p.detach() for p in self.network.parameters()]))
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for parameter in self.network.parameters():
            shard = parameter.ds_tensor.flatten()  # type: ignore[attr-defined]
            valid = parameter.ds_numel - dist.get_rank() * len(shard)  # type: ignore[attr-defined]  # the rest is padding
            squares += shard[: max(0, min(len(shard), valid))].to(self.device).double().square().sum()
        dist.all_reduce(squares)
        return float(squares.sqrt())

    # ---- state ----

    def save(self, folder: Path) -> None:
        (folder / TAG).mkdir(parents=True, exist_ok=True)  # DeepSpeed makes it on the first worker only
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        if portable.is_portable(folder):
            with portable.Reader(folder) as reader:
                zero_restore.restore(self.engine.optimizer, self.network, reader)
            return
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise ConfigError(
                f"{folder}: DeepSpeed's state cannot be read; delete {folder.parent} to start the run again"
            )

    def full_weights(self) -> dict[str, Tensor] | None:
        leader = dist.get_rank() == 0
        weights: dict[str, Tensor] = {}
        for name, parameter in self.network.named_parameters():
            whole = self._whole(parameter)
            if leader:
                weights[name] = whole.detach().cpu().clone()
        return weights if leader else None

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """One tensor, from the optimizer's float32 copy where there is one."""
        if self.experiment.scaling.precision == "bf16" and parameter.requires_grad:
            return self.deepspeed.utils.safe_get_full_fp32_param(parameter)
        if self.stage < 3:
            return parameter
        with self.deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
