"""A frozen transformer with one trained mask on each edge of its graph (Edge Pruning, Bhaskar et al. 2024, arXiv
2406.16778).

The parameters are log alphas of hard-concrete masks and the multipliers of the sparsity constraints; the network itself
is none, so that the runs of a pack share it.
Shapes: K runs, B batch rows, T tokens of an input, A answer positions, V outputs, E edges, W writers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from groundswell.config import ConfigError, import_path
from groundswell.protocols import Model, Parameters, ParameterSpec, Task
from models import edge_fast, edge_pruning_costs, edge_reference, hard_concrete, huggingface
from models.edge_cache import ReferenceCache
from models.edge_graph import EdgeGraph
from models.edge_loading import load_edge_network, load_outline
from models.edge_masks import binary_circuit, save_edges
from models.edge_network import EdgeNetwork, Outline
from models.edge_sweep import as_rows
from models.edge_transformer import EdgeTransformer

if TYPE_CHECKING:
    from groundswell.experiment import Experiment
    from groundswell.planning.strategies import PlanExtras

EDGES, NODES = "masks.edges", "masks.nodes"  # log alphas [E], [W]
EDGE_MULTIPLIERS, NODE_MULTIPLIERS = "multipliers.edges", "multipliers.nodes"  # [2]: linear, quadratic
MODEL_TYPE, EDGE_LIST = "groundswell_edge_masks", "edges.json"
LISTED_EDGES = 100_000  # a checkpoint's circuit is listed when it is no larger
FORMS: dict[str, Callable[..., Tensor]] = {
    "fast": edge_fast.masked_logits,
    "reference": edge_reference.masked_logits,
}
MEGABYTE = 10**6
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class EdgeMasked(Model):
    """Masks over the edges of the network in a folder. Masks, their sums and thresholds are float32, whatever the
    network computes in.

    With `pairs` each row of tokens is a clean input and then a corrupted one of the same length T.
    """

    # how the initial noise is drawn does not change the shapes, so such runs pack
    packable: ClassVar[frozenset[str]] = frozenset({"init_log_alpha", "init_std"})

    path: str = Field(description="folder of the frozen network: a checkpoint of ours, GPT-2, Llama family, or Tracr")
    mask_embeddings: bool = Field(True, description="embeddings are writers with edges; False: part of every input")
    ablation: Literal["corrupted", "zero"] = Field(
        "corrupted", description="what an edge that is masked out carries: the corrupted run's value, or nothing"
    )
    pairs: bool = Field(True, description="rows are clean and corrupted tokens; False (zero ablation only): clean ones")
    form: Literal["fast", "reference"] = Field("fast", description="reference: written as defined, and slow")
    dtype: Literal["float32", "bfloat16", "float64"] = Field("float32", description="the frozen network computes in")
    cache_megabytes: int = Field(
        512, ge=0, description="memory for what the whole network does on training examples; 0: computed at every visit"
    )
    init_log_alpha: float = Field(10.0, description="mean of the initial log alphas; 10 is a mask of 1")
    init_std: float = Field(0.01, ge=0, description="standard deviation of the initial log alphas")
    eps: float = Field(
        1e-6, gt=0, lt=0.1, description="noise stays so far from 0 and 1 (the published Llama runs: 1e-8)"
    )

    _sharded: EdgeNetwork | None = PrivateAttr(None)  # where the workers of a run share one copy

    @model_validator(mode="after")
    def _check(self) -> EdgeMasked:
        if self.ablation == "corrupted" and not self.pairs:
            raise ValueError("ablation corrupted needs a corrupted input for each clean one; set pairs=true, or zero")
        return self

    def check(self, task: Task) -> None:
        has_pairs = getattr(task, "pairs", False)
        if self.pairs != has_pairs:
            name = type(task).__name__
            remedy = (
                f"task {name} has clean inputs only; use a circuit task with task.pairs=true, or ablation=zero with "
                "model.pairs=false"
                if self.pairs
                else f"task {name} has pairs; set task.pairs=false or model.pairs=true"
            )
            raise ValueError(f"model.pairs is {str(self.pairs).lower()}: {remedy}")
        if not Path(self.path).exists():
            return  # an experiment for another machine; a run fails for want of its parameters
        outline = self.outline
        if outline.causal and task.vocab_size > outline.num_outputs:
            raise ValueError(
                f"model.path: the network in {self.path} has {outline.num_outputs} tokens, the task {task.vocab_size}; "
                "give a network of this task, or the task its tokenizer"
            )

    @property
    def outline(self) -> Outline:
        """Of the frozen network, by its configuration. Raises ConfigError where there is none."""
        return _outline(self.path, self._changed, self.mask_embeddings)

    @property
    def graph(self) -> EdgeGraph:
        return self.outline.graph

    def frozen(self, device: torch.device | str) -> EdgeNetwork:
        """The network in `path`; one copy a device serves all models of this process.

        Raises ConfigError for a folder without a network, or with one that has no masked form.
        """
        if self._sharded is not None:
            return self._sharded
        where = torch.device(device)
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        return _load(self.path, self._changed, self.mask_embeddings, str(where), self.dtype)

    def shard_frozen(self, device: torch.device) -> None:
        if self.form != "fast":
            raise ConfigError(f"model.form {self.form} needs the whole network; use fast, or scaling.strategy=ddp")
        dtype = DTYPES[self.dtype]
        self._sharded = load_edge_network(self.path, self.mask_embeddings, device, dtype, sharded=True)

    @property
    def _changed(self) -> int:
        """When the folder was written, so that one that is written again is read again."""
        config = Path(self.path) / huggingface.CONFIG
        return config.stat().st_mtime_ns if config.exists() else 0

    # ---- parameters ----

    def parameters(self, vocab_size: int, max_length: int) -> list[ParameterSpec]:
        graph = self.graph
        masks = {EDGES: graph.num_edges, NODES: graph.num_writers}
        return [
            ParameterSpec(name, (size,), True, self.init_std, self.init_log_alpha) for name, size in masks.items()
        ] + [ParameterSpec(name, (2,), True) for name in (EDGE_MULTIPLIERS, NODE_MULTIPLIERS)]

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def noise_by_example(self) -> bool:
        return False

    def network(self, vocab_size: int, max_length: int) -> Any:
        """The masks as a module; every worker has a frozen network of its own."""
        from groundswell.scaling.network import FunctionalNetwork

        return FunctionalNetwork(self, self.parameters(vocab_size, max_length))

    # ---- masks ----

    def sample(self, parameters: Parameters, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Masks of edges [K, E] and nodes [K, W], each run's noise from its own generator in one draw."""
        edges, nodes = parameters[EDGES], parameters[NODES]
        size = edges.shape[-1] + nodes.shape[-1]
        drawn = torch.stack([hard_concrete.uniform_noise(size, source, self.eps) for source in generators])
        noise = drawn.split([edges.shape[-1], nodes.shape[-1]], dim=-1)
        return hard_concrete.sample(edges, noise[0]), hard_concrete.sample(nodes, noise[1])

    def deterministic(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Masks without noise, [K, E] and [K, W]. The number of zeros is counted over all edges and over all nodes; the
        published code counts over each of its matrices, rows that are no edges included."""
        return (
            hard_concrete.deterministic(parameters[EDGES].detach(), self.eps),
            hard_concrete.deterministic(parameters[NODES].detach(), self.eps),
        )

    # ---- forward passes ----

    def inputs(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """A task's tokens [K, B, ...] -> clean and corrupted [K, B, T]. Rows that all runs share are [1, B, T]."""
        tokens = _shared(tokens)
        if not self.pairs:
            return tokens, None
        clean, corrupted = tokens.chunk(2, dim=-1)
        return clean, corrupted if self.ablation == "corrupted" else None

    def masked_logits(self, edges: Tensor, nodes: Tensor | None, tokens: Tensor, positions: Tensor) -> Tensor:
        """Masks [K, E] and [K, W], a task's tokens [K, B, ...], positions [K, B, A] -> logits [K, B, A, V] of the
        network that the masks leave. Differentiable in the masks."""
        (clean, corrupted), places = self.inputs(tokens), _shared(positions)
        network, cache = self.frozen(tokens.device), self._cache(tokens.device)
        if cache is None or corrupted is None:
            return FORMS[self.form](network, edges, nodes, clean, corrupted, places)
        source = cache.given(len(edges), clean, corrupted, places, self.cache_megabytes * MEGABYTE)
        return edge_fast.masked_logits(network, edges, nodes, clean, corrupted, places, source=source)

    def whole_logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The network itself on the clean inputs: tokens [K, B, ...], positions [K, B, A] -> logits [K, B, A, V], of
        rows that all runs share [1, B, A, V]."""
        (clean, corrupted), places = self.inputs(tokens), _shared(positions)
        cache = self._cache(tokens.device)
        if cache is not None:
            return cache.logits(clean, corrupted, places, self.cache_megabytes * MEGABYTE)
        clean, _, places = as_rows(clean, None, places)
        with torch.no_grad():
            logits = self.frozen(tokens.device).run(clean, places).logits
        return logits.unflatten(0, (-1, positions.shape[1]))

    def _cache(self, device: torch.device) -> ReferenceCache | None:
        """In training alone: it would not hold evaluation's examples, which are many and come in the same batches. None
        either for workers that share a network, which must pass it together."""
        network = self.frozen(device)
        used = self.cache_megabytes and self.form == "fast" and self._sharded is None and torch.is_grad_enabled()
        return network.references if used and isinstance(network, EdgeTransformer) else None

    def answer_logits(
        self,
        parameters: Parameters,
        tokens: Tensor,
        positions: Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """tokens [K, B, 2T] (without pairs [K, B, T]), positions [K, B, A] -> logits [K, B, A, V]."""
        masks = self.deterministic(parameters) if generators is None else self.sample(parameters, generators)
        return self.masked_logits(*masks, tokens, positions)

    def flops_per_example(self, vocab_size: int, length: int, num_answers: int) -> float:
        """A third of a step's: the masked pass and its way back, and the whole network's runs. Blocks count as GPT-2's,
        12 d^2 weights."""
        network = self.outline
        graph, tokens = network.graph, length // 2 if self.pairs else length
        sizes = edge_pruning_costs.Graph(
            graph.num_layers, graph.num_heads, graph.num_kv_heads, graph.embeddings, network.width
        )
        form: edge_pruning_costs.Form = "fast" if self.form == "fast" else "published"
        masks = tokens * edge_pruning_costs.mask_flops(sizes, form).total
        head = num_answers * network.width * network.num_outputs
        whole = 2.0 * (tokens * graph.num_layers * 12 * network.width**2 + head)
        return whole + (masks + edge_pruning_costs.REFERENCE_RUNS * whole) / 3

    def stand_in(self, experiment: Experiment) -> tuple[Experiment, PlanExtras]:
        from models.edge_planning import stand_in

        return stand_in(self, experiment)

    # ---- folders ----

    def save_folder(self, parameters: Parameters, folder: Path, vocabulary: Sequence[str]) -> None:
        """Write config.json, model.safetensors (masks and multipliers), vocabulary.json and, where it is no longer than
        100,000 edges, the circuit as edges.json."""
        config = {
            "architectures": [import_path(type(self))],
            "model_type": MODEL_TYPE,
            "num_edges": len(parameters[EDGES]),
            huggingface.OURS: self.to_dict(),
        }
        circuit = binary_circuit(self, {name: tensor[None] for name, tensor in parameters.items()})
        folder.mkdir(parents=True, exist_ok=True)
        if circuit.num_edges <= LISTED_EDGES:
            save_edges(folder / EDGE_LIST, circuit.edges)
        huggingface.write_folder(folder, config, parameters, vocabulary)

    def load_folder(self, folder: Path, vocab_size: int, max_length: int) -> dict[str, Tensor]:
        """Masks and multipliers, each of them from the folder. Raises ConfigError where one is missing, is not finite,
        or belongs to another graph."""
        folder = Path(folder)
        found = huggingface.read_config(folder).get("model_type")
        if found != MODEL_TYPE:
            raise ConfigError(f"{folder / huggingface.CONFIG}: model_type '{found}' has no edge masks")
        weights = huggingface.read_weights(folder, self.parameters(vocab_size, max_length), tied_head=False)
        for name, tensor in weights.items():
            if not tensor.isfinite().all():
                raise ConfigError(f"{folder}: {name} is not finite; take an earlier checkpoint")
        return weights


@functools.lru_cache(maxsize=64)
def _outline(path: str, changed: int, mask_embeddings: bool) -> Outline:
    return load_outline(path, mask_embeddings)


@functools.lru_cache(maxsize=8)
def _load(path: str, changed: int, mask_embeddings: bool, device: str, dtype: str) -> EdgeNetwork:
    return load_edge_network(path, mask_embeddings, device, DTYPES[dtype])


def _shared(x: Tensor) -> Tensor:
    """[K, ...]; [1, ...] where all runs look at the same memory."""
    return x[:1] if x.stride(0) == 0 else x
