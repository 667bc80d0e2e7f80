"""A frozen network in parts on several workers computes what a whole one does."""

import pytest
import torch
import torch.distributed as dist
from networks import group_of_one

from groundswell.config import ConfigError
from models.edge_loading import load_edge_network
from models.edge_masked import EdgeMasked
from models.edge_sharded import ShardedLayers, ShardedTransformer
from tests.models.edge_golden import write_network
from tests.models.edge_sharing import inputs, passes, run_sharing


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_worker_alone(family, tmp_path):
    folder = write_network(family, tmp_path / "network")
    whole = load_edge_network(folder)
    with group_of_one(tmp_path):
        sharded = load_edge_network(folder, sharded=True)
        for found, expected in zip(passes(sharded, 3), passes(whole, 3), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_layers_are_gathered_once_for_each_direction(tmp_path, monkeypatch):
    folder = write_network("llama", tmp_path / "network")
    with group_of_one(tmp_path):
        layers = load_edge_network(folder, sharded=True).folded.layers
        calls = []
        gather = dist.all_gather_single
        monkeypatch.setattr(dist, "all_gather_single", lambda *a, **k: calls.append(1) or gather(*a, **k))
        assert isinstance(layers, ShardedLayers)
        whole = load_edge_network(folder).folded.layers
        for index in [0, 1, 2, 0, 1, 2, 2, 1, 0, 0, 1, 2]:
            torch.testing.assert_close(layers[index].mlp_output, whole[index].mlp_output)
            torch.testing.assert_close(layers[index].attention.matrix, whole[index].attention.matrix)
        assert len(calls) == 3 + 3 + 1 + 1  # turning round costs nothing for the two layers that are there
        with pytest.raises(IndexError):
            layers[3]


def test_what_needs_whole_layers_says_so(tmp_path):
    folder = write_network("llama", tmp_path / "network")
    with group_of_one(tmp_path):
        sharded = load_edge_network(folder, sharded=True)
        assert isinstance(sharded, ShardedTransformer)
        _, _, clean, _, positions = inputs(sharded.graph, sharded.num_outputs, 2, torch.float32)
        with pytest.raises(ConfigError, match=r"set model\.form=fast"):
            sharded.run(clean[0], positions[0], keep_writers=True)
        with pytest.raises(ConfigError, match=r"use fast, or scaling\.strategy=ddp"):
            EdgeMasked(path=str(folder), form="reference").shard_frozen(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_workers_keep_half_each(dtype, tmp_path):
    folder = write_network("llama", tmp_path / "network")
    whole = load_edge_network(folder, dtype=dtype)
    with group_of_one(tmp_path):
        all_bytes = load_edge_network(folder, dtype=dtype, sharded=True).folded.layers.shard_bytes
    for rank, (num_bytes, found) in enumerate(run_sharing(folder, 2, dtype)):
        expected = passes(whole, 2 + rank)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other.float(), atol=1e-6, rtol=1e-5)
        assert num_bytes == pytest.approx(all_bytes / 2, rel=0.01)
