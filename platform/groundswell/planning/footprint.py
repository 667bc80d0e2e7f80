"""What one forward and backward pass costs: the real code of model and objective, run on tensors without memory.

torch's FakeTensorMode runs every operation on shapes alone, so a step of a 13B network takes seconds on one core. Live
bytes are counted storage by storage, FLOPs by torch's FlopCounterMode. As a check, the known formulas: a GPT-2 block
saves about 34 s b h bytes in half precision besides attention scores (Korthikanti et al., arXiv 2205.05198, eq. 1), and
a forward pass costs about 2 N FLOPs a token (Kaplan et al., arXiv 2001.08361, section 2.1; PaLM, arXiv 2204.02311,
appendix B, adds 4 L T d for attention).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from groundswell.config import ConfigError
from groundswell.experiment import Experiment
from groundswell.planning.strategies import Arithmetic, Footprint
from groundswell.protocols import Answer, Model, Split
from groundswell.scaling.network import TrainingStep, build_network, materialise
from groundswell.training.pack import parameter_specs

MEASURED_LAYERS = 2  # of a model with a field num_layers: one like all others, and the last
_DTYPES = {"float32": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16}  # of the weights
# torch counts the attention kernels of GPUs alone; shapes are traced with the CPU's, which saves the same tensors.
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}
ANSWER = Answer(slice(-1, None))
Loss = Callable[[Split], Tensor]


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations in this mode have made and that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.collects = False  # garbage, before a new peak is believed
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._note(value)
        return result

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Do not count these: they were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = weakref.ref(storage)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._seen.get(key)
        if known is not None and known() is not None:
            return
        self._seen[key] = weakref.ref(storage, functools.partial(self._freed, key, size))
        self.now += size
        if self.collects and self.now > self.peak:
            gc.collect()
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int, _: Any) -> None:
        self.now -= size
        self._seen.pop(key, None)


class Meter:
    """Measures an experiment's micro-batches; what was measured is kept."""

    def __init__(self, experiment: Experiment, gradients_pass_frozen: bool = False, on_gpu: bool = True) -> None:
        """`gradients_pass_frozen`: something before the first block is trained, so gradients run through a frozen
        network too. `on_gpu` False: as the model computes on a CPU."""
        self.experiment = experiment
        self.on_gpu = on_gpu
        self.gradients_pass_frozen = gradients_pass_frozen
        self._measured: dict[tuple[Any, ...], tuple[Footprint, float]] = {}

    def footprint(self, micro_batch: int, arithmetic: Arithmetic, spread: bool, checkpointing: bool) -> Footprint:
        """`spread`: as the module that strategies wrap, else as functions. Raises ConfigError for a model that has no
        such module, and for one that cannot be run on shapes alone."""
        layers = getattr(self.experiment.model, "num_layers", None)
        measure = functools.partial(self._measure, micro_batch, arithmetic, spread, checkpointing)
        if layers is None or layers <= MEASURED_LAYERS:
            return measure(None)[0]
        (fewer, held_fewer), (more, held_more) = measure(MEASURED_LAYERS - 1), measure(MEASURED_LAYERS)
        layer = Footprint(  # from what is held after the forward pass: the peak may lie elsewhere in a small network
            held_more - held_fewer,
            0.0,
            more.forward_flops - fewer.forward_flops,
            more.backward_flops - fewer.backward_flops,
        )
        peak = more.saved_bytes + more.workspace_bytes
        saved = MEASURED_LAYERS * layer.saved_bytes
        start = Footprint(saved, max(0.0, peak - saved), more.forward_flops, more.backward_flops)
        return start.plus_layers(layer, layers - MEASURED_LAYERS)

    def _measure(
        self, micro_batch: int, arithmetic: Arithmetic, spread: bool, checkpointing: bool, layers: int | None
    ) -> tuple[Footprint, float]:
        """The footprint with so many layers (None: its own), and the bytes held after the forward pass."""
        key = (micro_batch, arithmetic, spread, checkpointing, layers)
        if key not in self._measured:
            model = self.experiment.model
            if layers is not None:
                model = model.with_overrides({"num_layers": layers})
            try:
                self._measured[key] = self._run(model, micro_batch, arithmetic, spread, checkpointing)
            except ConfigError:
                raise
            except Exception as error:  # of the user's model or objective, whatever it is
                what = f"{type(model).__name__} with {type(self.experiment.objective).__name__}"
                reason = " ".join(str(error).split())[:200]
                raise ConfigError(f"model: {what} cannot be run on shapes alone ({reason})") from error
            finally:
                _forget_cached_tensors(type(model), type(self.experiment.objective))
        return self._measured[key]

    def _run(
        self, model: Model, micro_batch: int, arithmetic: Arithmetic, spread: bool, checkpointing: bool
    ) -> tuple[Footprint, float]:
        scaling = self.experiment.scaling.model_copy(update={"activation_checkpointing": checkpointing})
        experiment = self.experiment.model_copy(update={"model": model, "scaling": scaling})
        # A block that draws dropout compares states of generators, which shapes alone do not have. With recomputation
        # its masks do not add up anyway, so it is measured without them.
        as_module = spread and (checkpointing or not getattr(model, "dropout", 0.0))
        network = build_network(experiment)[0] if as_module else None
        with FakeTensorMode(allow_non_fake_inputs=True), self._as_on_gpu(), _young_garbage_only():
            if network is None:
                loss_of, tensors = _functions(experiment, _DTYPES[arithmetic])
            else:
                loss_of, tensors = self._module(experiment, network, arithmetic)
            for tensor in tensors:
                tensor.grad = torch.empty_like(tensor) if tensor.requires_grad else None  # as when they accumulate
            live, counter = LiveBytes(), FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
            live.ignore([*tensors, *(tensor.grad for tensor in tensors if tensor.grad is not None)])
            with live, counter, _autocast(arithmetic):
                loss = loss_of(_batch(experiment, micro_batch))
                forward, held = counter.get_total_flops(), live.now
                # Checkpointing ends a recomputation by an exception, whose traceback keeps this mode's tensors alive.
                live.collects = checkpointing
                if loss.requires_grad:
                    loss.sum().backward()
            total = counter.get_total_flops()
        saved = min(float(held), float(live.peak))
        return Footprint(saved, live.peak - saved, float(forward), float(total - forward)), float(held)

    def _module(self, experiment: Experiment, network: Any, arithmetic: Arithmetic) -> tuple[Loss, list[Tensor]]:
        """The step as strategies run it."""
        step = TrainingStep(network, experiment, ANSWER)
        materialise(step, torch.device("cpu"), _DTYPES[arithmetic])
        if self.gradients_pass_frozen:
            network.blocks[0].register_forward_pre_hook(
                lambda _, inputs: (inputs[0].detach().requires_grad_(), *inputs[1:])
            )
        return lambda batch: step(batch)[0], [*step.parameters(), *step.buffers()]

    @contextlib.contextmanager
    def _as_on_gpu(self) -> Iterator[None]:
        """Kernels written for CPUs alone stand aside for traced code, which is also what runs on a GPU."""
        if not self.on_gpu:
            yield
            return
        before = torch.compiler.is_compiling
        torch.compiler.is_compiling = lambda: True
        try:
            yield
        finally:
            torch.compiler.is_compiling = before


def _functions(experiment: Experiment, dtype: torch.dtype) -> tuple[Loss, list[Tensor]]:
    """The step as a pack of one run computes it, for models that are no module."""
    e = experiment
    parameters = {
        spec.name: torch.empty((1, *spec.shape), dtype=dtype, requires_grad=spec.trained)
        for spec in parameter_specs(experiment)
    }
    source = _generator(e.model)
    generators = None if source is None else [source]
    return lambda batch: e.objective.loss(e.model, parameters, batch, ANSWER, generators)[0], [*parameters.values()]


@contextlib.contextmanager
def _young_garbage_only() -> Iterator[None]:
    """Collecting garbage looks at what is made in here alone, which is quick."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _forget_cached_tensors(*classes: type) -> None:
    """Tables that the packages of these classes keep (functools.lru_cache) are without memory now."""
    packages = {cls.__module__.partition(".")[0] for cls in classes}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages:
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def _batch(experiment: Experiment, rows: int) -> Split:
    task = experiment.task
    positions = torch.zeros(1, rows, task.num_answers, dtype=torch.int64)
    return Split(torch.zeros(1, rows, task.max_length, dtype=torch.int64), positions, torch.zeros_like(positions))


def _generator(model: Model) -> torch.Generator | None:
    return torch.Generator() if model.stochastic else None


@contextlib.contextmanager
def _autocast(arithmetic: Arithmetic) -> Iterator[None]:
    if arithmetic != "autocast":
        yield
        return
    with torch.autocast("cpu", torch.bfloat16):
        yield
