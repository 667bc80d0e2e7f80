"""Small networks of random weights and a task of random pairs, for tests of circuits."""

import json
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment
from groundswell.experiment import ParameterGroup
from groundswell.protocols import Answer, Dataset, Split, Task
from models.decoder import Decoder
from models.edge_gpt2 import from_tensors
from models.edge_loading import load_edge_network
from models.edge_masked import EdgeMasked
from models.edge_network import EdgeNetwork
from models.edge_objective import EdgePruning
from tasks import circuit_grading

GOLDEN = Path(__file__).parents[1] / "golden" / "edge_pruning"
VOCAB = 17


class GradedPairs(Task):
    """Random tokens, others in the corrupted half from place 2 on; one answer and one distractor at the end."""

    length: int = Field(6, gt=2)
    num_examples: int = Field(10, gt=0)
    pairs: bool = True

    @property
    def vocab_size(self) -> int:
        return VOCAB

    @property
    def num_answers(self) -> int:
        return 2

    @property
    def max_length(self) -> int:
        return 2 * self.length if self.pairs else self.length

    def build(self) -> Dataset:
        source = torch.Generator().manual_seed(0)
        return Dataset(
            tuple(f"t{index}" for index in range(VOCAB)),
            self._split(source),
            {"test": self._split(source)},
            Answer(slice(0, 1)),
        )

    def _split(self, source: torch.Generator) -> Split:
        clean, other = torch.randint(VOCAB, (2, self.num_examples, self.length), generator=source)
        other[:, :2] = clean[:, :2]
        targets = torch.randint(VOCAB, (self.num_examples, 2), generator=source)
        positions = torch.full_like(targets, self.length - 1)
        return Split(torch.cat([clean, other], 1) if self.pairs else clean, positions, targets)

    def grade(self, logits: Tensor, reference: Tensor, split: Split) -> dict[str, Tensor]:
        return {
            "kl": circuit_grading.kl(logits[:, 0], reference[:, 0]),
            "exact_match": circuit_grading.exact_match(logits, reference, split.targets),
            "accuracy": (logits[:, 0].argmax(-1) == split.targets[:, 0]).float(),
            "logit_difference": circuit_grading.difference(logits[:, 0], split.targets[:, 0], split.targets[:, 1]),
        }


def decoder_tensors(decoder: Decoder, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Weights large enough that every part matters."""
    source = torch.Generator().manual_seed(seed)
    return {
        spec.name: torch.randn(spec.shape, generator=source) * (0.4 if spec.init_std else 0.0) + spec.init_value
        for spec in decoder.parameters(VOCAB, length)
    }


def decoder_network(mask_embeddings: bool = True, num_layers: int = 2, length: int = 6) -> EdgeNetwork:
    decoder = Decoder(num_layers=num_layers, num_heads=2, width=8)
    return from_tensors(decoder, decoder_tensors(decoder, length), mask_embeddings)


def write_decoder(folder: Path, length: int = 6) -> Path:
    """A checkpoint folder of ours."""
    decoder = Decoder(num_layers=2, num_heads=2, width=8)
    folder.mkdir(parents=True)
    decoder.save_folder(decoder_tensors(decoder, length), folder, [f"t{index}" for index in range(VOCAB)])
    return folder


def llama_network(folder: Path, mask_embeddings: bool = True) -> EdgeNetwork:
    """The recorded tiny Llama: two heads share each key and value."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((GOLDEN / "llama_tiny_config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(GOLDEN / "llama_tiny_weights.safetensors"), folder / "model.safetensors")
    return load_edge_network(folder, mask_embeddings)


def pruning_experiment(network: Path, steps: int = 8) -> Experiment:
    """A short pruning run of the network in a folder."""
    groups = (
        ParameterGroup(match="masks", lr=1.0),
        ParameterGroup(match="multipliers", lr=1.0, ascent=True),
    )
    return Experiment(
        task=GradedPairs(),
        model=EdgeMasked(path=str(network)),
        objective=EdgePruning(target=0.6, warmup_steps=4),
        optimizer=AdamW(lr=1.0, weight_decay=0.01, groups=groups),
        budget=Budget(steps=steps, batch_size=4),
        metrics_every=4,
        evaluation=Evaluation(schedule=Every(every=steps)),
        checkpointing=Checkpointing(schedule=Every(every=steps)),
    )
