"""Lens and tracing on a GPU find what they find on a CPU."""

import pytest
import torch

from analysis.causal_tracing import trace
from analysis.logit_lens import lens_ranks
from models.decoder import Decoder
from tasks.composition import Composition

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TASK = Composition(num_entities=25, num_relations=8, out_degree=6, phi=3, iid_fraction=0.1, ood_fraction=0.1)


@pytest.mark.parametrize("recurrences", [1, 2])
def test_same_ranks_as_on_a_cpu(recurrences: int) -> None:
    model = Decoder(num_layers=2, num_heads=2, width=16, num_recurrences=recurrences)
    generator = torch.Generator().manual_seed(0)
    specs = model.parameters(TASK.vocab_size, TASK.max_length)
    parameters = {s.name: torch.randn(1, *s.shape, generator=generator, dtype=torch.float64) * 0.5 for s in specs}
    examples = TASK.tracing_examples(TASK.build(), "train_inferred", 40, 0)
    there = {name: tensor.cuda() for name, tensor in parameters.items()}
    assert (lens_ranks(model, parameters, examples) == lens_ranks(model, there, examples)).all()
    arguments = (examples, ["answer", "b@2"], ["states", "heads", "mlps"])
    for mine, theirs in zip(trace(model, parameters, *arguments), trace(model, there, *arguments), strict=True):
        assert (mine.ranks == theirs.ranks).all() and (mine.changed == theirs.changed).all()
