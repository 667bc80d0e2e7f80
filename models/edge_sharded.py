"""A frozen transformer whose layers are spread over the workers of a run: each keeps an equal part of every layer.

A layer is put together where a pass comes to it, and the next one of that pass is on its way meanwhile (fully sharded
data parallel, Zhao et al. 2023, arXiv 2304.11277, section 3), in two buffers that take turns. Frozen weights have no
gradients, so nothing goes back. Embeddings and unembedding are whole on every worker.

Workers are those of the default process group of torch.distributed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn, overload

import torch
import torch.distributed as dist
from torch import Tensor

from groundswell.config import ConfigError
from models.edge_folded import FoldedLayer, FoldedTransformer, Projection
from models.edge_graph import EdgeGraph
from models.edge_network import WholeRun
from models.edge_transformer import EdgeTransformer, Layer, Tables
from models.weight_files import WeightFiles

ALIGNMENT = 64  # elements; matrix products on GPUs are slower for matrices that start anywhere


def read_together(files: WeightFiles, name: str, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """A whole tensor of a folder, of which each worker reads its share of the rows."""
    shape, num_workers = files.shape(name), dist.get_world_size()
    each = -(-shape[0] // num_workers)
    start = min(shape[0], dist.get_rank() * each)
    read = files.read(name, slice(start, min(shape[0], start + each))).to(device, dtype)
    own = read.new_zeros(each, *shape[1:])
    own[: len(read)] = read
    whole = own.new_empty(num_workers * each, *shape[1:])
    dist.all_gather_single(whole, own)
    return whole[: shape[0]]


class ShardedLayers(Sequence[FoldedLayer]):
    """A graph's layers, of which all workers must ask for the same ones in the same order. A layer's tensors are valid
    until another layer is asked for."""

    def __init__(self, layers: Iterable[FoldedLayer], length: int) -> None:
        """`layers`: all of the same form, taken one by one and not kept. `length`: of the graph, which passes them in
        turn, perhaps several times."""
        self._shards: list[Tensor] = []  # this worker's part of each, flat
        for layer in layers:
            self._shards.append(_shard(layer))
        size = dist.get_world_size() * len(self._shards[0])
        self._buffers = [self._shards[0].new_empty(size) for _ in range(2)]
        self._layers = [_rebuilt(layer, _views(buffer, layer)) for buffer in self._buffers]
        self._length, self._last = length, -1  # `_last`: what was asked for last
        self._current = 0  # the buffer it is in
        self._held: list[int | None] = [None, None]  # shard that is whole in each buffer
        self._arriving: list[Any] = [None, None]

    @property
    def shard_bytes(self) -> int:
        """Of this worker's parts."""
        return sum(x.nbytes for x in self._shards)

    @property
    def buffer_bytes(self) -> int:
        """Of the two whole layers."""
        return sum(x.nbytes for x in self._buffers)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> FoldedLayer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[FoldedLayer]: ...
    def __getitem__(self, index: int | slice) -> FoldedLayer | Sequence[FoldedLayer]:
        if isinstance(index, slice) or not 0 <= index < self._length:
            raise IndexError(f"layer {index} of {self._length}")
        if index != self._last:
            self._current = self._fetch(index, 1 - self._current)
            ahead = index + 1 if index == 0 or self._last < index < self._length - 1 else index - 1
            self._last = index
            if ahead < self._length:
                self._fetch(ahead, 1 - self._current)
            self._wait(self._current)
        return self._layers[self._current]

    def _fetch(self, index: int, buffer: int) -> int:
        """Where the layer is: in `buffer`, unless it is whole already."""
        shard = index % len(self._shards)
        if shard in self._held:
            return self._held.index(shard)
        self._wait(buffer)
        self._held[buffer] = shard
        self._arriving[buffer] = dist.all_gather_single(self._buffers[buffer], self._shards[shard], async_op=True)
        return buffer

    def _wait(self, buffer: int) -> None:
        if self._arriving[buffer] is not None:
            self._arriving[buffer].wait()
            self._arriving[buffer] = None


def _tensors(layer: FoldedLayer) -> list[Tensor]:
    attention, hidden = layer.attention, layer.hidden
    return [
        attention.matrix, attention.bias, layer.output, layer.output_bias,
        hidden.matrix, hidden.bias, layer.mlp_output, layer.mlp_output_bias,
    ]  # fmt: skip


def _rebuilt(like: FoldedLayer, tensors: Sequence[Tensor]) -> FoldedLayer:
    matrix, bias, output, output_bias, hidden, hidden_bias, mlp_output, mlp_output_bias = tensors
    return FoldedLayer(
        Projection(matrix, bias, like.attention.eps), output, output_bias,
        Projection(hidden, hidden_bias, like.hidden.eps), mlp_output, mlp_output_bias,
    )  # fmt: skip


def _views(flat: Tensor, layer: FoldedLayer) -> list[Tensor]:
    """Where the layer's tensors lie in the flat one, strides as they are."""
    found, offset = [], 0
    for x in _tensors(layer):
        found.append(flat.as_strided(x.shape, x.stride(), offset))
        offset += _aligned(x.numel())
    return found


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _shard(layer: FoldedLayer) -> Tensor:
    num_workers, tensors = dist.get_world_size(), _tensors(layer)
    each = -(-sum(_aligned(x.numel()) for x in tensors) // num_workers)
    flat = tensors[0].new_zeros(num_workers * each)
    for place, x in zip(_views(flat, layer), tensors, strict=True):
        place.copy_(x)
    return flat[dist.get_rank() * each :][:each].clone()


class ShardedTransformer(EdgeTransformer):
    """For fast passes only: layers are kept folded, in parts. The whole weights of a layer are never kept."""

    folded: FoldedTransformer

    def __init__(self, graph: EdgeGraph, tables: Tables, layers: Iterable[Layer], *others: Any, **options: Any) -> None:
        """As EdgeTransformer; `layers` are taken one by one."""
        layers = iter(layers)
        first = next(layers)
        super().__init__(graph, tables, (first,), *others, **options)
        self.layers = ()
        self.folded = parts = FoldedTransformer(self)
        parts.layers = ShardedLayers(map(parts.fold, itertools.chain([first], layers)), graph.num_layers)
        self.tables = replace(tables, head=tables.head.to("meta"))  # folded too

    def run(self, tokens: Tensor, positions: Tensor, keep_writers: bool = False) -> WholeRun:
        return self._missing() if keep_writers else super().run(tokens, positions)

    def attend(self, *inputs: Any, **more: Any) -> NoReturn:
        self._missing()

    def mlp(self, *inputs: Any) -> NoReturn:
        self._missing()

    def logits(self, x: Tensor) -> NoReturn:
        self._missing()

    def _missing(self) -> NoReturn:
        raise ConfigError(
            "model.form reference needs whole layers on each worker; set model.form=fast, or scaling.strategy=ddp"
        )
