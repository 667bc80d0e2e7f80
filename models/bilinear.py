"""The bilinear model of the Reversal Curse analysis (arXiv 2405.04669, section 3): one matrix between fixed embeddings.

Embeddings are random, nearly orthogonal and never trained; the logit of y after a context c is e_c^T W e_y, where e_c
is the sum of the context's embeddings. W starts at zero. Gradient descent on x -> y raises e_x^T W e_y and leaves
e_y^T W e_x alone: the asymmetry behind the reversal curse, without anything else in the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from groundswell.config import import_path
from groundswell.protocols import Model, Parameters, ParameterSpec
from models import huggingface
from models.layers import embed, scores, take

EMBEDDING, MATRIX = "embedding.weight", "bilinear.weight"


class Bilinear(Model):
    """Logits that are bilinear in fixed embeddings of context and answer."""

    packable: ClassVar[frozenset[str]] = frozenset()

    width: int = Field(
        512, gt=0, description="of the embeddings; two of them have an inner product of about width^-0.5"
    )

    def parameters(self, vocab_size: int, max_length: int) -> list[ParameterSpec]:
        return [
            ParameterSpec(EMBEDDING, (vocab_size, self.width), False, self.width**-0.5, trained=False),
            ParameterSpec(MATRIX, (self.width, self.width), True),
        ]

    def answer_logits(
        self,
        parameters: Parameters,
        tokens: Tensor,
        positions: Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """tokens [K, B, T], positions [K, B, A] -> logits [K, B, A, V]. The context of a position ends with it."""
        context = take(embed(parameters[EMBEDDING], tokens).cumsum(2), positions)
        mixed = torch.matmul(context.flatten(1, 2), parameters[MATRIX])
        return scores(mixed, parameters[EMBEDDING]).view(*positions.shape, -1)

    def logits(self, parameters: Parameters, tokens: Tensor) -> Tensor:
        """tokens [K, B, T] -> logits at every position [K, B, T, V]."""
        return self.answer_logits(parameters, tokens, torch.arange(tokens.shape[-1]).expand_as(tokens))

    def token_embeddings(self, parameters: Parameters) -> Tensor:
        """[K, V, width]."""
        return parameters[EMBEDDING]

    def flops_per_example(self, vocab_size: int, length: int, num_answers: int) -> float:
        return 2.0 * num_answers * self.width * (self.width + vocab_size)

    def save_folder(self, parameters: Parameters, folder: Path, vocabulary: Sequence[str]) -> None:
        config = {
            "architectures": [import_path(type(self))],
            "model_type": "groundswell_bilinear",
            "vocab_size": len(parameters[EMBEDDING]),
            huggingface.OURS: self.to_dict(),
        }
        huggingface.write_folder(folder, config, parameters, vocabulary)

    def load_folder(self, folder: Path, vocab_size: int, max_length: int) -> dict[str, Tensor]:
        return huggingface.read_weights(folder, self.parameters(vocab_size, max_length), tied_head=False)
