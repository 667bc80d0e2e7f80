"""Memory and traffic of one GPU under each strategy.

P parameters of which Q are trained, N GPUs, c bytes of a number in forward and backward passes. State under mixed
precision with Adam: 2 P + 2 Q + 12 Q bytes (ZeRO, arXiv 1910.02054, section 3.1), of which stages 1, 2 and 3 spread the
12, then a 2, then the other over N GPUs (section 5). Traffic of a step: 2 c Q for data parallel and for stages 1 and 2,
3 c P for stage 3 (section 7), each times (N - 1) / N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from groundswell.experiment import Experiment, Scaling

ADAM_BYTES = 8  # two float32 moments
ADAM_TRAFFIC = 28  # bytes an element: read weight, gradient and both moments, write weight and moments, float32
MASTER_BYTES = 4  # DeepSpeed's own float32 copy of what it trains, in every precision
FLAT_ADAM_BYTES = 12  # temporaries of PackedAdamW on a GPU: root, product and quotient (training/flat.py)
GATHERED_BLOCKS = 3  # FSDP2: the block at work, the next one on its way, and the flat buffer it arrives in
DDP_BUCKET_BYTES = 25 * 2**20  # torch's default; the last bucket has no backward pass left to hide behind
ZERO_BUCKET = 5e8  # elements; DeepSpeed's default reduce_bucket_size, allocated whole
ZERO_LIVE = 1e9  # elements; its default stage3_max_live_parameters, below which nothing is let go


# float32: also tf32. autocast: float32 weights, bf16 products (single, ddp). bf16: bf16 weights (fsdp, deepspeed).
Arithmetic = Literal["float32", "autocast", "bf16"]


@dataclass(frozen=True)
class Footprint:
    """Of one micro-batch of B examples on one GPU."""

    saved_bytes: float  # what blocks keep for their backward pass
    workspace_bytes: float  # what else lives at the worst moment: logits, losses, casts of weights, temporaries
    forward_flops: float  # of B examples
    backward_flops: float  # recomputation included

    def plus_layers(self, layer: Footprint, count: int) -> Footprint:
        """With `count` more blocks of the size `layer`."""
        return Footprint(
            self.saved_bytes + count * layer.saved_bytes,
            self.workspace_bytes,
            self.forward_flops + count * layer.forward_flops,
            self.backward_flops + count * layer.backward_flops,
        )


@dataclass(frozen=True)
class Extra:
    """What a method needs besides its network, as a plan file says it."""

    name: str
    bytes_per_gpu: float = 0.0  # for this micro-batch, never sharded
    flops_per_example: float = 0.0  # forward and backward
    trained_parameters: int = 0  # float32, one copy a GPU, outside of what strategies shard
    moved_bytes_per_example: float = 0.0  # to and from the GPU's memory for these FLOPs
    forwards: int = 0  # further passes through the network without gradients
    gradients_pass_network: bool = False  # they run through the network even where all of it is frozen


PlanExtras = Callable[[Experiment, int], Extra]  # experiment, micro-batch


@dataclass(frozen=True)
class Sizes:
    """Elements of a network."""

    total: int
    trained: int
    block: int  # the largest block
    block_trained: int
    outside: int  # what belongs to no block: embeddings, last norm, head
    outside_trained: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by part, and of the host for one GPU."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    workspace: float = 0.0  # logits, losses, casts, temporaries
    communication: float = 0.0
    extra: float = 0.0
    data: float = 0.0
    reserve: float = 0.0
    host: float = 0.0  # not on the GPU

    @property
    def gpu_total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if name != "host"}


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in a step."""

    hidden: float  # while forward or backward passes run
    exposed: float  # when there is nothing to compute
    host: float  # over PCIe
    cover: float  # part of the step's computing that the hidden part can hide behind: 1 all, 2/3 the backward passes

    @property
    def total(self) -> float:
        return self.hidden + self.exposed


def candidates(experiment: Experiment, num_gpus: int) -> list[Scaling]:
    """Every way to spread a run over so many GPUs that the schema allows, simplest first."""
    own = experiment.scaling
    base = {"device": "auto", "precision": own.precision, "micro_batch": own.micro_batch}
    found = [Scaling.from_dict(base)]
    kinds: list[tuple[str, int, str]] = [("ddp", 2, "none"), ("fsdp", 2, "none"), ("fsdp", 2, "all")]
    for stage in (1, 2, 3):
        kinds += [("deepspeed", stage, "none"), ("deepspeed", stage, "optimizer")]
    kinds.append(("deepspeed", 3, "all"))
    for strategy, stage, offload in kinds:
        for checkpointing in (False, True):
            spread = {"strategy": strategy, "num_workers": num_gpus, "zero_stage": stage, "offload": offload}
            found.append(Scaling.from_dict(base | spread | {"activation_checkpointing": checkpointing}))
    return found


def label(scaling: Scaling) -> str:
    """For instance "deepspeed 3, offload all, checkpointing"."""
    name = f"deepspeed {scaling.zero_stage}" if scaling.strategy == "deepspeed" else scaling.strategy
    offload = f", offload {scaling.offload}" if scaling.offload != "none" else ""
    return name + offload + (", checkpointing" if scaling.activation_checkpointing else "")


def arithmetic(scaling: Scaling) -> Arithmetic:
    if scaling.precision != "bf16":
        return "float32"
    return "bf16" if scaling.strategy in ("fsdp", "deepspeed") else "autocast"


def compute_bytes(scaling: Scaling) -> int:
    """Of a weight in forward and backward passes. Autocast's own casts are in the measured workspace."""
    return 2 if arithmetic(scaling) == "bf16" else 4


def memory(
    scaling: Scaling, sizes: Sizes, footprint: Footprint, extra: Extra, data_bytes: float, reserve_bytes: float
) -> Memory:
    """Of one GPU, at the worst moment of a step."""
    state = {
        "single": _whole_state,
        "ddp": _whole_state,
        "fsdp": _fsdp_state,
        "deepspeed": _deepspeed_state,
    }[scaling.strategy](scaling, sizes)
    update = FLAT_ADAM_BYTES * sizes.trained if scaling.strategy == "single" else 0.0
    busy = footprint.saved_bytes + footprint.workspace_bytes
    return Memory(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=footprint.saved_bytes,
        workspace=footprint.workspace_bytes + max(0.0, update - busy),  # the update comes when activations are gone
        communication=state.communication,
        extra=extra.bytes_per_gpu + extra.trained_parameters * (4 + 4 + ADAM_BYTES),
        data=data_bytes if scaling.strategy == "single" else 0.0,
        reserve=reserve_bytes,
        host=state.host,
    )


def _whole_state(scaling: Scaling, sizes: Sizes) -> Memory:
    """A copy on each GPU: the flat buffers of a pack, or DDP, whose gradients are views of its buckets."""
    return Memory(weights=4 * sizes.total, gradients=4 * sizes.trained, optimizer=ADAM_BYTES * sizes.trained)


def _fsdp_state(scaling: Scaling, sizes: Sizes) -> Memory:
    """FSDP2: float32 shards; whole blocks in compute precision while they are at work; the rest stays whole."""
    workers, width = scaling.num_workers, compute_bytes(scaling)
    weights, gradients = 4 * sizes.total / workers, 4 * sizes.trained / workers
    moments = ADAM_BYTES * sizes.trained / workers
    gathered = width * (GATHERED_BLOCKS * sizes.block + sizes.outside)
    reduced = width * (sizes.block_trained + sizes.outside_trained) + 4 * sizes.block_trained  # float32 sums
    if scaling.offload == "all":
        return Memory(communication=gathered + reduced, host=weights + gradients + moments)
    return Memory(weights=weights, gradients=gradients, optimizer=moments, communication=gathered + reduced)


def _deepspeed_state(scaling: Scaling, sizes: Sizes) -> Memory:
    workers, stage, width = scaling.num_workers, scaling.zero_stage, compute_bytes(scaling)
    weights = width * sizes.total / (workers if stage == 3 else 1)
    gradients = width * sizes.trained / (workers if stage >= 2 else 1)
    moments = (MASTER_BYTES + ADAM_BYTES) * sizes.trained / workers
    buckets = width * ZERO_BUCKET if sizes.trained else 0.0
    live = min(sizes.total, max(ZERO_LIVE, 2 * sizes.block + sizes.outside))
    gathered = width * live if stage == 3 else 0.0
    if scaling.offload == "none":
        return Memory(weights=weights, gradients=gradients, optimizer=moments, communication=buckets + gathered)
    if scaling.offload == "optimizer":  # gradients of its own part go to the host as well
        on_gpu = gradients if stage == 1 else 0.0
        return Memory(
            weights=weights,
            gradients=on_gpu,
            communication=buckets + gathered,
            host=moments + 4 * sizes.trained / workers,
        )
    return Memory(communication=buckets + gathered, host=weights + moments + 4 * sizes.trained / workers)


def traffic(scaling: Scaling, sizes: Sizes, micro_steps: int, extra: Extra, passes_backward: bool) -> Traffic:
    """Of one GPU in one step of `micro_steps` forward and backward passes."""
    workers, width = scaling.num_workers, compute_bytes(scaling)
    share = (workers - 1) / workers
    masks = 2 * share * 4 * extra.trained_parameters  # all-reduced at the end
    weights, gradients = width * sizes.total, width * sizes.trained
    shard = 4 * sizes.trained / workers
    if scaling.strategy == "single":
        return Traffic(0.0, 0.0, 0.0, 1.0)
    if scaling.strategy == "ddp":  # once a step: earlier micro-batches only accumulate
        reduced = 2 * share * 4 * sizes.trained
        last = min(reduced, 2 * share * DDP_BUCKET_BYTES)
        return Traffic(reduced - last, last + masks, 0.0, 2 / 3 / micro_steps)
    stage = 3 if scaling.strategy == "fsdp" else scaling.zero_stage
    if stage < 3:  # DeepSpeed overlaps these two stages with nothing by default (overlap_comm)
        times = 1 if stage == 1 else micro_steps
        host = 2 * width * sizes.trained / workers if scaling.offload != "none" else 0.0
        return Traffic(0.0, share * gradients * (times + 1) + masks, host, 0.0)
    gathers = (2 if passes_backward else 1) + extra.forwards
    gathered = share * weights * gathers * micro_steps
    reduced = share * (4 * sizes.trained if scaling.strategy == "fsdp" else gradients) * micro_steps
    first = share * width * sizes.block  # nothing to compute until it is here
    host = 0.0
    if scaling.offload == "all":
        own = (4 if scaling.strategy == "fsdp" else width) * sizes.total / workers
        host = own * gathers * micro_steps + shard * micro_steps
    elif scaling.offload == "optimizer":
        host = shard * micro_steps + width * sizes.trained / workers
    return Traffic(gathered + reduced - first, first + masks, host, 1.0)
