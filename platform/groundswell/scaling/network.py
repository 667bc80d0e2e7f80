"""A run's network as a torch module that strategies can wrap: from the meta device to real, filled tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from groundswell.config import ConfigError
from groundswell.experiment import Experiment
from groundswell.protocols import Answer, Model, ParameterSpec, Split, WeightReader
from groundswell.training.flat import initial_tensor
from groundswell.training.pack import parameter_specs
from groundswell.training.sampler import generator

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.float32, "float64": torch.float64}


class WrappedModel:
    """What an objective sees in place of the model: one run whose parameters are the network's own."""

    def __init__(self, network: nn.Module, settings: Model) -> None:
        """`settings`: the model itself, of which objectives read the fields."""
        self._network = network
        self.settings = settings

    def answer_logits(
        self,
        parameters: Any,
        tokens: Tensor,
        positions: Tensor,
        generators: Sequence[torch.Generator] | None = None,
        **options: Any,
    ) -> Tensor:
        """As Model.answer_logits, with K = 1; `parameters` is not looked at. `options`: what the network takes more."""
        return self._network(tokens[0], positions[0], generators[0] if generators else None, **options)[None]

    def __getattr__(self, name: str) -> Any:
        model = type(self.settings).__name__
        raise ConfigError(
            f"objective: needs {model}.{name}, which is not there when a run is spread over workers; "
            "use scaling.strategy=single"
        )


class FunctionalNetwork(nn.Module):
    """The parameters of a model that is called as it is in a pack, for models whose objectives ask more of them than
    logits. What wraps the module sees one forward pass around whatever is computed with the parameters."""

    blocks: tuple[nn.Module, ...] = ()

    def __init__(self, model: Model, specs: Sequence[ParameterSpec]) -> None:
        super().__init__()
        self.model, self.names = model, [spec.name for spec in specs]
        for spec in specs:
            *path, last = spec.name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, nn.Parameter(torch.empty(spec.shape, device="meta")))

    def forward(self, compute: Callable[[Model, dict[str, Tensor]], Any]) -> Any:
        """What `compute` makes of the model and the parameters [1, *shape]."""
        # by attribute, which is where DeepSpeed puts sharded parameters together
        return compute(self.model, {name: self.get_parameter(name)[None] for name in self.names})


class TrainingStep(nn.Module):
    """Network and objective in one module: a wrapper sees one forward pass a loss, whatever the objective does."""

    def __init__(self, network: nn.Module, experiment: Experiment, answer: Answer) -> None:
        super().__init__()
        self.network = network
        self.objective = experiment.objective
        self.answer = answer
        self._model: Any = WrappedModel(network, experiment.model)
        self._scheduled: dict[str, Tensor] = {}

    def schedule(self, update: int, total: int, device: torch.device) -> None:
        """Take what the objective schedules for the coming update."""
        values = self.objective.scheduled(update, total)
        self._scheduled = {name: torch.tensor([value], device=device) for name, value in values.items()}

    def forward(
        self, batch: Split, source: torch.Generator | None = None, evaluate: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Training: loss [] and metrics []. Evaluation: nothing, and metrics of each example [B].

        `batch` has the trial axis of one run ([1, B, ...]); `source` switches the stochastic parts on.
        """

        def compute(model: Any, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            if evaluate:
                metrics = self.objective.evaluate(model, parameters, batch, self.answer)
                return torch.zeros(()), {name: value[0] for name, value in metrics.items()}
            generators = None if source is None else [source]
            options: dict[str, Any] = {"scheduled": self._scheduled} if self._scheduled else {}
            loss, metrics = self.objective.loss(model, parameters, batch, self.answer, generators, **options)
            return loss.sum(), {name: value[0] for name, value in metrics.items()}  # no view: FSDP2 hooks into it

        if isinstance(self.network, FunctionalNetwork):
            result: tuple[Tensor, dict[str, Tensor]] = self.network(compute)
            return result
        return compute(self._model, {})


def build_network(experiment: Experiment) -> tuple[Any, list[ParameterSpec]]:
    """The network on the meta device, frozen tensors marked, and its specs. Raises ConfigError where there is none."""
    e = experiment
    specs = parameter_specs(e)
    network: Any = e.model.network(e.task.vocab_size, e.task.max_length)
    if isinstance(network, FunctionalNetwork) and e.scaling.precision == "bf16" and e.scaling.strategy != "ddp":
        raise ConfigError(
            f"scaling.precision bf16: {e.scaling.strategy} would round what {type(e.model).__name__} trains; use "
            "float32 here, and set the precision of what is frozen in the model"
        )
    parameters = dict(network.named_parameters())
    if list(parameters) != [s.name for s in specs] and set(parameters) != {s.name for s in specs}:
        raise RuntimeError(f"{type(e.model).__name__}: network() and parameters() name different tensors")
    for spec in specs:
        parameters[spec.name].requires_grad_(spec.trained)
    if e.scaling.activation_checkpointing:
        for block in network.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return network, specs


def owners_of(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of each parameter -> the modules that hold it, and under which name: several for a tied one."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((owner, name))
    return owners


def materialise(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Uninitialised memory for every tensor on the meta device (tied ones stay tied), and buffers to the device."""
    parameters = {id(parameter): parameter for parameter in module.parameters()}
    for key, owners in owners_of(module).items():
        parameter = parameters[key]
        if parameter.is_meta:
            empty = torch.empty_like(parameter, device=device, dtype=dtype)
            real = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            for owner, name in owners:
                owner._parameters[name] = real
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)


def fill(network: nn.Module, specs: Sequence[ParameterSpec], experiment: Experiment) -> None:
    """Initial values, equal to those of a run in a pack. Holds one whole tensor at a time, and of a folder's tensors
    only the rows that this worker keeps."""
    e = experiment
    reader = e.model.initial_weights(e.task.vocab_size, e.task.max_length)
    source = generator(e.seed, "init")
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for spec in specs:
            fill_tensor(parameters[spec.name], spec, source, reader)


def fill_tensor(parameter: Tensor, spec: ParameterSpec, source: torch.Generator, reader: WeightReader | None) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(initial_tensor(spec, source, reader))
        return
    local, rows = parameter.to_local(), local_rows(parameter)
    found = None if reader is None else reader.read(spec.name, rows)
    local.copy_(initial_tensor(spec, source)[rows] if found is None else found)


def local_rows(parameter: DTensor) -> slice:
    """The rows of dimension 0 that this worker keeps of a tensor that FSDP2 has sharded (as torch.chunk cuts it)."""
    mesh = parameter.device_mesh
    size, each = parameter.shape[0], -(-parameter.shape[0] // mesh.size())
    start = min(size, mesh.get_local_rank() * each)
    return slice(start, min(size, start + each))
