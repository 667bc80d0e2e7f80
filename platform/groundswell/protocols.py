"""What the engine asks of a task, a model and an objective. It knows none of them by name.

Shapes: K runs of a pack, N examples, B batch rows, T tokens, A answer positions, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from groundswell.config import Component, ConfigError

if TYPE_CHECKING:  # slow to import, and commands that list runs do without
    import torch
    from torch import Tensor

    from groundswell.experiment import Experiment
    from groundswell.planning.strategies import PlanExtras

IGNORE = -100  # target that counts neither in a loss nor in an accuracy (torch's own convention)


@dataclass(frozen=True)
class Split:
    """Examples as resident tensors. `targets[n, a]` is the token that follows `tokens[n, positions[n, a]]`."""

    tokens: Tensor  # [N, T] int64
    positions: Tensor  # [N, A] int64, places in `tokens` whose next token is an answer token
    targets: Tensor  # [N, A] int64, IGNORE where a row has fewer answer tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Split:
        return Split(self.tokens.to(device), self.positions.to(device), self.targets.to(device))

    def select(self, rows: Tensor | slice | tuple[slice, ...]) -> Split:
        return Split(self.tokens[rows], self.positions[rows], self.targets[rows])


class Examples(ABC):
    """Training examples that are made when they are asked for: example n is a pure function of n."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def select(self, rows: Tensor) -> Split:
        """Row numbers [N] int64 on the CPU -> N examples on the CPU, each with the same T and A in every call."""


@dataclass(frozen=True)
class Answer:
    """What metrics of answers need to know about a data set."""

    columns: slice  # which of the A answer columns are the answer proper (others are delimiters, or further targets)
    # [V] int64 ([K, V] in a pack): tokens of one kind could stand in for each other; -1: never an answer
    token_kinds: Tensor | None = None

    def to(self, device: torch.device | str) -> Answer:
        return Answer(self.columns, None if self.token_kinds is None else self.token_kinds.to(device))


@dataclass(frozen=True)
class Dataset:
    """What a task builds: a closed vocabulary, the training split and named evaluation splits.

    The training split may have more answer columns than the evaluation splits. As `Examples` it is not held in memory,
    and a run goes through its rows in order, from a start that depends on the run's seed.
    """

    vocabulary: tuple[str, ...]  # token string of each id
    train: Split | Examples
    evaluation: Mapping[str, Split]
    answer: Answer
    manifest: Mapping[str, Any] = field(default_factory=dict)  # spec, counts, sha256

    @property
    def train_split(self) -> Split:
        """All training examples as tensors; those that are made as they are read are all made."""
        import torch

        return self.train if isinstance(self.train, Split) else self.train.select(torch.arange(len(self.train)))


class Task(Component, ABC):
    """A pure function of its fields: two builds of one config are equal tensor by tensor."""

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abstractmethod
    def max_length(self) -> int:
        """T of every split, in tokens."""

    @property
    @abstractmethod
    def num_answers(self) -> int:
        """A of the training split."""

    @property
    def num_train(self) -> int | None:
        """Training examples, where that is known without building; for estimates of time only."""
        return None

    @property
    def resident(self) -> bool:
        """Is the training data a `Split`, which is held in memory? For estimates of memory only."""
        return True

    @abstractmethod
    def build(self) -> Dataset: ...


@dataclass(frozen=True)
class ParameterSpec:
    """One tensor of a network. `init_std` draws N(init_value, std^2) in the given order; else `init_value` fills."""

    name: str
    shape: tuple[int, ...]
    decayed: bool  # does weight decay apply
    init_std: float | None = None
    init_value: float = 0.0
    trained: bool = True  # False: keeps its initial value
    group: int = 0  # which of the optimizer's groups; the engine sets it


Parameters = Mapping[str, "Tensor"]  # name -> [K, *shape]


class Network(Protocol):
    """One run's network as a torch.nn.Module.

    Its parameters are on the meta device (buffers are real) and named as in `Model.parameters`; a tied one counts once.
    Calling it: tokens [B, T], positions [B, A], generator (as in `answer_logits`) -> logits [B, A, V].
    """

    blocks: Sequence[torch.nn.Module]  # what is sharded and recomputed as one unit, in order; together most of it

    def __call__(self, tokens: Tensor, positions: Tensor, generator: torch.Generator | None = None) -> Tensor: ...


class WeightReader(Protocol):
    """Tensors of a folder, read one at a time or in parts, so that no process ever holds them all."""

    def read(self, name: str, rows: slice = slice(None)) -> Tensor | None:
        """`rows` of dimension 0 of the tensor with this spec name, float32 (float64 stays); None: it is drawn."""
        ...


class Model(Component, ABC):
    """A network as pure functions of parameters that carry a leading trial axis K. K = 1 is the ordinary case."""

    @abstractmethod
    def parameters(self, vocab_size: int, max_length: int) -> Sequence[ParameterSpec]: ...

    @abstractmethod
    def answer_logits(
        self,
        parameters: Parameters,
        tokens: Tensor,
        positions: Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """tokens [K, B, T], positions [K, B, A] -> logits [K, B, A, V].

        `generators` (one a run, on the tokens' device) switches the stochastic parts on; None is evaluation.
        """

    @property
    def stochastic(self) -> bool:
        """Does training draw random numbers? Then the engine hands `generators` to the objective."""
        return getattr(self, "dropout", 0.0) > 0

    @property
    def noise_by_example(self) -> bool:
        """Does each example have random numbers of its own, as with dropout? False: they belong to the parameters, and
        all workers of a run draw the same."""
        return True

    def generate(
        self, parameters: Parameters, prompts: Tensor, num_tokens: int, stop_token: int | None = None
    ) -> Tensor:
        """Greedy decoding: prompts [K, B, P] -> the next tokens [K, B, num_tokens], each the lowest id of the best.
        Where `stop_token` is given, a row ends with it and is filled with 0.

        This simple version runs all tokens again for each new one; a model with a key-value cache has its own.
        """
        import torch

        tokens, length = prompts, prompts.shape[-1]
        ended = torch.zeros_like(prompts[:, :, :1], dtype=torch.bool)
        for _ in range(num_tokens):
            last = tokens.new_full((*tokens.shape[:2], 1), tokens.shape[-1] - 1)
            best = self.answer_logits(parameters, tokens, last).argmax(-1).masked_fill(ended, 0)
            tokens = torch.cat([tokens, best], -1)
            if stop_token is not None:
                ended = ended | (best == stop_token)
                if ended.all():
                    break
        return torch.nn.functional.pad(tokens[:, :, length:], (0, length + num_tokens - tokens.shape[-1]))

    @abstractmethod
    def save_folder(self, parameters: Parameters, folder: Path, vocabulary: Sequence[str]) -> None:
        """Write one run's network (parameters [*shape], no trial axis) as a folder others can load."""

    @abstractmethod
    def load_folder(self, folder: Path, vocab_size: int, max_length: int) -> dict[str, Tensor]:
        """Read back what `save_folder` wrote. Raises ConfigError for a folder of another shape."""

    def check(self, task: Task) -> None:
        """Raise ValueError for a combination that cannot work, naming the field."""

    def network(self, vocab_size: int, max_length: int) -> Network:
        """One run's network as a module, for strategies that wrap and shard modules. Raises ConfigError where there
        is none."""
        raise ConfigError(f"model {type(self).__name__} cannot be spread over workers; use scaling.strategy=single")

    def shard_frozen(self, device: torch.device) -> None:
        """Spread weights that are frozen, and no parameters, over the workers of torch's default process group. Called
        on each of them before the first pass by strategies that shard weights. Raises ConfigError."""

    def initial_weights(self, vocab_size: int, max_length: int) -> WeightReader | None:
        """Where a pretrained network's tensors are read from; None: they are drawn by their specs.
        Raises ConfigError for a folder of another network."""
        return None

    def stand_in(self, experiment: Experiment) -> tuple[Experiment, PlanExtras] | None:
        """What `groundswell plan` measures in place of an experiment with this model, and what the model adds to that;
        None: the experiment itself. Raises ConfigError for what cannot be planned."""
        return None

    def flops_per_example(self, vocab_size: int, length: int, num_answers: int) -> float:
        """Matrix-multiply FLOPs of one forward pass of one example; a step costs three times that."""
        specs = self.parameters(vocab_size, length)
        return 2.0 * length * sum(math.prod(spec.shape) for spec in specs if len(spec.shape) == 2)


class Objective(Component, ABC):
    """Model and batch to losses: what is special about a method lives here."""

    def check(self, experiment: Experiment) -> None:
        """Raise ValueError for a combination that cannot work, naming the field."""

    def scheduled(self, update: int, total: int) -> Mapping[str, float]:
        """Numbers of one run that change from update to update (targets, coefficients): their values in number `update`
        (from 0) of at most `total`. Where there are any, `loss` is given them as `scheduled`: name -> [K]."""
        return {}

    def optimizer_start(self, update: int, total: int) -> int:
        """The optimizer's memory in number `update` reaches back to this one: where it is `update` itself, moments and
        bias corrections begin anew. A pure function, so that a resumed run does the same."""
        return 0

    @property
    def stochastic(self) -> bool:
        """Does the loss itself draw random numbers? Then it is given `generators`, as for a stochastic model."""
        return False

    @abstractmethod
    def loss(
        self,
        model: Model,
        parameters: Parameters,
        batch: Split,
        answer: Answer,
        generators: Sequence[torch.Generator] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch tensors carry the trial axis ([K, B, ...]). Returns the loss [K] and named metrics [K] (detached)."""

    def weight(self, batch: Split) -> Tensor:
        """How many equal parts the loss of this batch is the mean of [K]: what the batch's losses are weighted with
        when it is computed in pieces, on several workers or one after the other. Rows, unless the objective says."""
        import torch

        return torch.full(batch.tokens.shape[:1], float(batch.tokens.shape[1]), device=batch.tokens.device)

    @abstractmethod
    def evaluate(self, model: Model, parameters: Parameters, batch: Split, answer: Answer) -> dict[str, Tensor]:
        """Named metrics of each example [K, B]; their means over a split are what is recorded. No gradients."""
