"""Workers that share a frozen network, as bare processes of torch."""

import datetime
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from models import edge_fast
from models.edge_loading import load_edge_network
from models.edge_sharded import ShardedTransformer

TOKENS, ANSWERS = 6, 2


def inputs(graph, num_tokens: int, rows: int, dtype: torch.dtype):
    """Masks of edges [2, E] and nodes [2, W], clean and corrupted tokens [1, rows, T], positions [1, rows, A]."""
    source = torch.Generator().manual_seed(rows)
    edges, nodes = (
        torch.rand(2, size, generator=source).requires_grad_() for size in (graph.num_edges, graph.num_writers)
    )
    clean, corrupted = torch.randint(1, num_tokens, (2, 1, rows, TOKENS), generator=source)
    positions = torch.tensor([TOKENS - 1, TOKENS - 2]).expand(1, rows, ANSWERS)
    return edges, nodes, clean, corrupted, positions


def passes(network, rows: int) -> list[torch.Tensor]:
    """Logits of the whole and of the masked network, and gradients of the masks."""
    edges, nodes, clean, corrupted, positions = inputs(network.graph, network.num_outputs, rows, network.dtype)
    whole = network.run(clean[0], positions[0]).logits
    logits = edge_fast.masked_logits(network, edges, nodes, clean, corrupted, positions)
    logits.float().square().sum().backward()
    return [whole, logits.detach(), edges.grad, nodes.grad]


def _work(rank: int, num_workers: int, port: int, folder: str, dtype: torch.dtype, results) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, num_workers, is_master=rank == 0)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_workers, timeout=timeout)
    try:
        network = load_edge_network(folder, mask_embeddings=True, dtype=dtype, sharded=True)
        assert isinstance(network, ShardedTransformer)
        found = [passes(network, rows=2 + rank) for _ in range(2)]
        results.put((rank, network.folded.layers.shard_bytes, [x.float().numpy() for x in found[1]]))
    except Exception:
        results.put((rank, 0, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()


def run_sharing(folder: Path, num_workers: int, dtype: torch.dtype) -> list[tuple[int, list[torch.Tensor]]]:
    """Of each worker: bytes of its parts of the layers, and `passes` of 2 + rank rows."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # a free port
    port = store.port
    del store
    processes = [
        context.Process(target=_work, args=(rank, num_workers, port, str(folder), dtype, results))
        for rank in range(num_workers)
    ]
    for process in processes:
        process.start()
    found = sorted((results.get() for _ in processes), key=lambda result: result[0])
    for process in processes:
        process.join(60)
        process.kill()
    for _, _, outcome in found:
        assert not isinstance(outcome, str), outcome
    return [(num_bytes, [torch.from_numpy(x) for x in outcome]) for _, num_bytes, outcome in found]
