"""Putting whole tensors into DeepSpeed's optimizers, whatever the number of workers.

DeepSpeed's own way (`safe_set_full_optimizer_state`) needs moments that are there already, and in stage 3 tensors that
the workers share evenly; a fresh optimizer has no moments, and any number of workers may go on.
Written against DeepSpeed 0.19.8: DeepSpeedZeroOptimizer (stages 1 and 2) and DeepSpeedZeroOptimizer_Stage3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from groundswell.scaling.portable import MOMENTS, Reader


def restore(optimizer: Any, network: nn.Module, reader: Reader) -> None:
    """Weights, their low-precision copies, moments and the number of updates. `optimizer`: DeepSpeed's, before its
    first step. Raises ConfigError for a state of another network."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        _restore_stage_3(optimizer, network, names, reader)
    else:
        _restore_stages_1_and_2(optimizer, network, names, reader)


def _new_state(optimizer: Any, flat: Tensor, reader: Reader) -> dict[str, Tensor]:
    """Targets for this worker's part of a flat group: weights and moments. The moments are made here, as torch's AdamW
    makes them at its first step."""
    moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
    step = torch.tensor(float(reader.optimizer_step()), device=flat.device)
    optimizer.optimizer.state[flat] = {"step": step, **moments}
    return {"weights": flat.data, **moments}


def _restore_stages_1_and_2(optimizer: Any, network: nn.Module, names: dict[int, str], reader: Reader) -> None:
    for name, parameter in network.named_parameters():
        parameter.data.copy_(reader.read(f"weights/{name}", parameter.shape))
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        targets = _new_state(optimizer, flat, reader)
        for parameter in group:
            if parameter._hp_mapping is None:  # it lies in other workers' parts
                continue
            here = parameter._hp_mapping.hp_fragment_address
            whole = parameter._hp_mapping.lp_fragment_address
            for kind, target in targets.items():
                values = reader.read(f"{kind}/{names[id(parameter)]}", parameter.shape).flatten()
                target.narrow(0, here.start, here.numel).copy_(values.narrow(0, whole.start, whole.numel))


def _restore_stage_3(optimizer: Any, network: nn.Module, names: dict[int, str], reader: Reader) -> None:
    optimizer.checkpoint_event_prologue()  # small tensors are kept whole; this leaves only the shards
    for name, parameter in network.named_parameters():
        shard = parameter.ds_tensor  # type: ignore[attr-defined]  # a view of the flat low-precision buffer
        shard.data.copy_(_shard(f"weights/{name}", parameter, reader))
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        targets = _new_state(optimizer, flat, reader)
        start = 0
        for parameter in group:
            size = parameter.partition_numel()
            for kind, target in targets.items():
                values = _shard(f"{kind}/{names[id(parameter)]}", parameter, reader)
                target.narrow(0, start, size).copy_(values)
            start += size
    optimizer.checkpoint_event_epilogue()  # and this gathers the small ones again


def _shard(name: str, parameter: Any, reader: Reader) -> Tensor:
    """This worker's part of a tensor, flat and padded with zeros."""
    values = reader.read(name, parameter.ds_shape).flatten()
    size = parameter.partition_numel()
    part = values[dist.get_rank() * size :][:size]
    return torch.nn.functional.pad(part, (0, size - len(part)))
