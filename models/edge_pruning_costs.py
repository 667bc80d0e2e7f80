"""What Edge Pruning (Bhaskar et al. 2024, arXiv 2406.16778) costs besides its network, in two forms.

A transformer's residual stream is kept apart as the outputs of W writers; each reader forms its own input as a masked
sum over the writers before it. `published`: as the authors' code computes it, with einsums over all W rows, clean and
corrupted, a new buffer for every write, and reference runs in the same form. `fast`: the same losses and gradients from
differences to the corrupted run, one preallocated buffer of which a layer reads only the rows that are filled, and
plain reference runs; what readers read is kept for the way back. A multiply-add counts 2.
Shapes: L layers, H heads, K key/value heads, W writers, R readers of a layer, B rows, S tokens, d width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from groundswell.planning.strategies import Extra
from models.edge_graph import EdgeGraph

Form = Literal["published", "fast"]
REFERENCE_RUNS = 2  # the full model on the clean and on the corrupted input
FAST_BUFFERS = 2  # differences, and their gradients
READ_COPIES = 3  # of a layer's read inputs where they are recomputed: as read, normalised, and the gradient
KEPT_STREAMS = 4  # of a layer of the corrupted run, each as wide as the residual stream: it, heads, attention, MLP
READ_PASSES = 6  # over the read inputs: written and read forward, both again as gradients, and twice for the masks'


@dataclass(frozen=True)
class Graph(EdgeGraph):
    """An edge graph whose writers have a width."""

    width: int = 0


@dataclass(frozen=True)
class MaskFlops:
    """Reads and writes of one token, FLOPs."""

    reference: float  # both reference runs
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.reference + self.forward + self.backward


def mask_flops(graph: Graph, form: Form) -> MaskFlops:
    """Of one token in one training step, the network's own products apart."""
    if form == "fast":  # one product a layer over the filled rows, its heads for the MLP, and the last reader
        rows = sum(graph.writers_before(layer) for layer in range(graph.num_layers))
        own_heads = graph.num_layers * graph.num_heads
        forward = 2.0 * graph.width * (rows * graph.readers_per_layer + own_heads + graph.num_writers)
        return MaskFlops(0.0, forward, 2 * forward)
    everywhere = 2.0 * graph.num_writers * graph.width * graph.num_layers
    read, write = everywhere * graph.readers_per_layer, everywhere * (graph.num_heads + 1)
    # forward: clean and corrupted reads; backward: gradients of the buffer, of both products' masks, of the writes
    return MaskFlops(REFERENCE_RUNS * (read + write), 2 * read + write, 3 * read + write)


def buffer_bytes(graph: Graph, batch: int, length: int, element: int) -> int:
    """All writers' outputs, W B S d."""
    return graph.num_writers * stream_bytes(graph, batch, length, element)


def stream_bytes(graph: Graph, batch: int, length: int, element: int) -> int:
    """One residual stream, B S d."""
    return batch * length * graph.width * element


def saved_bytes(graph: Graph, form: Form, batch: int, length: int, element: int, checkpointing: bool = False) -> int:
    """What a step keeps until its way back, and the buffer of gradients there. published: two buffers a layer, one with
    a recomputation of each layer. fast: also all read inputs, L R B S d, and of the corrupted run what differences are
    formed with."""
    buffer = buffer_bytes(graph, batch, length, element)
    if form == "published":
        return graph.num_layers * (1 if checkpointing else 2) * buffer
    streams = graph.num_layers * (graph.readers_per_layer + KEPT_STREAMS) * stream_bytes(graph, batch, length, element)
    return FAST_BUFFERS * buffer + streams


def read_bytes(graph: Graph, form: Form, batch: int, length: int, element: int) -> int:
    """Besides, the readers' inputs of one layer [R, B, S, d]: published: what recomputing it needs. fast: gradients."""
    copies = READ_COPIES if form == "published" else 1
    return copies * graph.readers_per_layer * stream_bytes(graph, batch, length, element)


def moved_bytes(graph: Graph, form: Form, batch: int, length: int, element: int) -> float:
    """Between the GPU and its memory in one training step.

    published: 4 writes and about 16 reads of the buffer a layer (counted in the authors' code). fast: the filled rows
    once forward; backward once for the masks' gradients, and read and written for the buffer's; and the read inputs.
    """
    if form == "published":
        return 20.0 * graph.num_layers * buffer_bytes(graph, batch, length, element)
    rows = sum(graph.writers_before(layer) for layer in range(graph.num_layers))
    reads = graph.num_layers * graph.readers_per_layer
    return float(4 * rows + READ_PASSES * reads) * stream_bytes(graph, batch, length, element)


def extra(graph: Graph, form: Form, batch: int, length: int, element: int) -> Extra:
    """For `groundswell plan`. Blocks are recomputed in the published form, as its launch scripts do for large models.

    The network's own passes are measured by the planner: one with gradients towards the masks, and the reference runs.
    """
    return Extra(
        name=f"edge pruning, {form} form",
        bytes_per_gpu=saved_bytes(graph, form, batch, length, element, checkpointing=True)
        + read_bytes(graph, form, batch, length, element),
        flops_per_example=length * mask_flops(graph, form).total,
        moved_bytes_per_example=moved_bytes(graph, form, 1, length, element),
        trained_parameters=graph.num_edges + graph.num_writers,
        forwards=REFERENCE_RUNS,
        gradients_pass_network=True,
    )
