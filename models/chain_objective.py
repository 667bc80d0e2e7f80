"""What an emulator is trained to do: predict a teacher's states (Deng et al. 2023, arXiv 2311.01460, section 3.2).

Shapes: K runs, B rows, L layers, d width, C mixture components.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from pydantic import Field
from torch import Tensor

from groundswell.experiment import Experiment
from groundswell.protocols import Answer, Model, Objective, Parameters, Split
from models.chain_emulator import ThoughtEmulator
from models.objectives import token_losses


class StateRegression(Objective):
    """Half the squared distance from predicted to teacher's states, summed over layers and dimensions, mean over rows:
    d L / 2 times the mean squared error.

    With one mixture component for each token, that of layer l is the token where the teacher's state l is read. In
    training it is given; `mixture_weight` adds the cross-entropy of the scores (without temperature), summed over
    layers. Evaluation mixes by the softmax, as it is used later.

    Metrics: `state_loss`, `state_mse_layer_<l>` (mean over d); of such a mixture `mixture_loss` and `mixture_accuracy`.
    """

    mixture_weight: float = Field(0.0, ge=0, description="of the cross-entropy of mixture components")
    mixture_offset: int = Field(0, ge=0, description="the component is the token so many places after the state's")

    def check(self, experiment: Experiment) -> None:
        model = experiment.model
        if not isinstance(model, ThoughtEmulator):
            raise ValueError(
                f"objective.StateRegression needs a ThoughtEmulator, not {type(model).__name__}; use AnswerLoss"
            )
        if self.mixture_weight and model.mixture_size != "vocabulary":
            raise ValueError(
                "objective.mixture_weight needs a component for each token; set model.mixture_size=vocabulary"
            )

    def loss(
        self,
        model: Model,
        parameters: Parameters,
        batch: Split,
        answer: Answer,
        generators: Sequence[torch.Generator] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = self._compare(cast(ThoughtEmulator, model), parameters, batch, given=True)
        return losses.mean(-1), {name: value.mean(-1) for name, value in metrics.items()}

    def evaluate(self, model: Model, parameters: Parameters, batch: Split, answer: Answer) -> dict[str, Tensor]:
        return self._compare(cast(ThoughtEmulator, model), parameters, batch, given=False)[1]

    def _compare(
        self, model: ThoughtEmulator, parameters: Parameters, batch: Split, given: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-> losses [K, B] and metrics [K, B]."""
        taught = model.taught(batch.tokens, batch.positions)
        components = None
        if model.mixture_size == "vocabulary":
            places = (taught.places + self.mixture_offset).minimum(taught.separators.second.unsqueeze(-1))
            components = batch.tokens.gather(-1, places)
        found = model.emulate(parameters, batch.tokens, taught.separators.first, components if given else None)
        squares = (found.states - taught.states).square().sum(-1)  # [K, B, L]
        losses = squares.sum(-1) / 2
        width = found.states.shape[-1]
        errors = (squares.detach() / width).unbind(-1)
        metrics = {"state_loss": losses.detach()} | {f"state_mse_layer_{n}": mse for n, mse in enumerate(errors)}
        if components is None or found.scores is None:
            return losses, metrics
        entropies, right = token_losses(found.scores, components)
        metrics |= {"mixture_loss": entropies.detach().sum(-1), "mixture_accuracy": right.float().mean(-1)}
        return losses + self.mixture_weight * entropies.sum(-1), metrics
