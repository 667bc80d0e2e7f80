"""Settings of the recurrent decoder and the checks on them. What they do is in models/recurrent.py.

Shapes: d width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from groundswell.config import ConfigError
from groundswell.protocols import Model, Task

PUBLISHED_SHAPES: dict[str, tuple[int, int]] = {  # layers in the block, recurrences
    "16x1": (16, 1),
    "8x2": (8, 2),
    "4x4": (4, 4),
    "2x8": (2, 8),
    "1x16": (1, 16),
    "8x1": (8, 1),
    "1x8": (1, 8),
}


class RecurrentSettings(Model):
    """Fields of `RecurrentDecoder`."""

    packable: ClassVar[frozenset[str]] = frozenset({"init_std"})

    num_layers: int = Field(2, gt=0, description="layers of the block, with weights of their own")
    num_recurrences: int = Field(1, gt=0, description="runs of the block in training (the most, in a progressive loss)")
    num_recurrences_in_eval: int | None = Field(None, gt=0, description="in evaluation; default num_recurrences")
    width: int = Field(64, gt=0, description="size of the state")
    num_heads: int = Field(4, gt=0, description="attention heads; must divide width")
    mlp_width: int | None = Field(None, gt=0, description="hidden units; gated: values and gates together; default 2 d")
    embedding_width: int | None = Field(None, gt=0, description="of the tables; default width; else an adapter follows")
    activation: Literal["gelu_glu", "silu_glu", "relu_glu", "gelu", "silu", "relu"] = Field(
        "gelu_glu", description="of the MLPs; _glu: half of the units gate the other half"
    )
    input_injection: Literal["add", "none", "linear", "ffn"] = Field(
        "add", description="how the embedded input enters the block: added, or both through a matrix or an MLP"
    )
    inject_every_layer: bool = Field(False, description="before each layer, not only the first (skip connections)")
    initial_state: Literal["embed", "normal", "unit", "zero", "input"] = Field(
        "embed", description="N(0, 0.02^2); N(0, 1); N(0, 1) standardised token by token; zero; the embedded input"
    )
    norm: Literal["layer_norm", "rms_norm", "scale_norm"] = Field("layer_norm", description="kind of every norm")
    norm_eps: float = Field(1e-12, ge=0, description="added to variances (scale_norm: least length)")
    norm_scheme: Literal["post", "pre", "simple", "sandwich", "deepnorm", "shaped"] = Field(
        "post", description="where a layer normalises, h the state and f a branch: norm(h + f(h)), h + f(norm(h)), ..."
    )
    head: Literal["ffn", "linear", "identity"] = Field("ffn", description="between the last state and the final norm")
    output_adapter: bool = Field(True, description="a matrix from width to embedding_width before the output matrix")
    tied_head: bool = Field(False, description="the token embedding is also the output matrix, the adapters are one")
    biases: bool = Field(False, description="of attention, MLPs, head and output matrix")
    position_encoding: Literal["learned", "abacus", "sinusoidal", "scaled_sinusoidal", "null"] = Field(
        "abacus", description="added to the token embedding; null: nothing"
    )
    num_positions: int = Field(512, gt=0, description="rows of the learned or Abacus table")
    abacus_max_offset: int = Field(100, ge=0, description="largest random shift of Abacus places in training")
    first_digit_token: int = Field(4, ge=0, description="id of the digit 0; those of 1 to 9 follow")
    attention_positions: Literal["null", "fire", "rotary", "rotary_interleaved"] = Field(
        "null", description="in attention: nothing, FIRE's biases, or rotation of queries and keys by halves or pairs"
    )
    fire_length: float = Field(512.0, gt=0, description="FIRE's initial threshold, in tokens")
    fire_width: int = Field(32, gt=0, description="hidden units of FIRE's MLP")
    fire_max_length: int = Field(
        0, ge=0, description="FIRE's positions are drawn from so many in training (0: in order), unless rows are longer"
    )
    init: Literal["deepnorm_straight", "normal"] = Field(
        "deepnorm_straight", description="Xavier with gain (8 * effective layers)^(-1/4) (arXiv 2203.00555); normal"
    )
    init_std: float = Field(0.02, gt=0, description="of init=normal")

    @classmethod
    def published(cls, shape: str, **fields: Any) -> Self:
        """A shape of the paper, layers x recurrences, at its width 1024. Raises ConfigError for another name."""
        if shape not in PUBLISHED_SHAPES:
            raise ConfigError(f"model: no published shape '{shape}'; known: {', '.join(PUBLISHED_SHAPES)}")
        layers, recurrences = PUBLISHED_SHAPES[shape]
        size = {"num_layers": layers, "num_recurrences": recurrences, "width": 1024, "num_heads": 16, "mlp_width": 2048}
        return cls.from_dict(size | fields)

    @classmethod
    def from_original(cls, folder: str | Path) -> Self:
        """The configuration of a checkpoint folder of the published code. Raises ConfigError."""
        from models.recurrent_original import fields_of_folder

        return cls.from_dict(fields_of_folder(Path(folder)))

    @field_validator("position_encoding", "attention_positions", mode="before")
    @classmethod
    def _null_is_a_name(cls, value: Any) -> Any:
        return "null" if value is None else value  # what JSON and YAML make of the bare word

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.num_heads:
            remedy = ", ".join(str(n) for n in range(1, min(self.width, 64) + 1) if self.width % n == 0)
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}; choose one of {remedy}")
        if self.attention_positions.startswith("rotary") and self.head_width % 2:
            raise ValueError(f"attention_positions {self.attention_positions} turns pairs; take fewer num_heads")
        if self.activation.endswith("_glu") and self.hidden_width % 2:
            raise ValueError(f"mlp_width {self.hidden_width} must be even for activation {self.activation}")
        if self.embedded_width != self.width and not self.output_adapter:
            raise ValueError("output_adapter=false needs embedding_width equal to width; leave embedding_width out")
        if self.input_injection == "none" and self.initial_state != "input":
            raise ValueError("input_injection=none loses the input; set initial_state=input")
        if self.input_injection == "none" and self.inject_every_layer:
            raise ValueError("inject_every_layer needs an input_injection; take add")
        if self.position_encoding == "abacus" and self.abacus_max_offset + 1 >= self.num_positions:
            raise ValueError(f"abacus_max_offset {self.abacus_max_offset} leaves no digits; raise num_positions")
        return self

    def check(self, task: Task) -> None:
        """Raise ValueError where the task does not fit the position table."""
        rows = self.num_positions
        longest_row = max(task.max_length, getattr(task, "evaluation_length", 0))
        if self.position_encoding == "learned" and longest_row > rows:
            raise ValueError(f"model.num_positions {rows} is less than the task's {longest_row} tokens; raise it")
        if self.position_encoding != "abacus":
            return
        if task.vocab_size < self.first_digit_token + 10:
            raise ValueError(
                f"model.first_digit_token {self.first_digit_token}: the task has {task.vocab_size} tokens and no "
                "digits there; abacus is for tasks of numbers, so set model.position_encoding=null"
            )
        longest = getattr(task, "longest_number", None)
        if longest is not None and longest + self.abacus_max_offset >= rows:
            raise ValueError(
                f"model.num_positions {rows} is too few for numbers of {longest} digits at offsets up to "
                f"model.abacus_max_offset {self.abacus_max_offset}; raise it to {longest + self.abacus_max_offset + 1}"
            )
        tested = getattr(task, "longest_test_number", None)
        if tested is not None and tested >= rows:
            raise ValueError(
                f"model.num_positions {rows} is too few for test numbers of {tested} digits; raise it to {tested + 1}"
            )

    @property
    def hidden_width(self) -> int:
        return self.mlp_width or 2 * self.width

    @property
    def embedded_width(self) -> int:
        return self.embedding_width or self.width

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def num_effective_layers(self) -> int:
        return self.num_layers * self.num_recurrences

    @property
    def eval_recurrences(self) -> int:
        return self.num_recurrences_in_eval or self.num_recurrences

    @property
    def stochastic(self) -> bool:
        """Does training draw random numbers? A progressive loss does for its recurrences."""
        return (
            self.initial_state in ("embed", "normal", "unit")
            or (self.position_encoding == "abacus" and self.abacus_max_offset > 0)
            or (self.attention_positions == "fire" and self.fire_max_length > 0)
            or self.num_recurrences > 1
            or self.eval_recurrences != self.num_recurrences
        )

    def flops_per_example(self, vocab_size: int, length: int, num_answers: int) -> float:
        """Matrix-multiply FLOPs of `answer_logits` in training, with all recurrences, for one example."""
        d, m, embedded = self.width, self.hidden_width, self.embedded_width
        inner = m // 2 if self.activation.endswith("_glu") else m
        keys_values = 2 * length * d * 2 * d
        per_query = 2 * (2 * d * d + d * m + inner * d) + 4 * length * d  # query and output, MLP, attention
        full, pruned = keys_values + length * per_query, keys_values + num_answers * per_query
        injection = {"linear": 2 * d * d, "ffn": 2 * d * m + inner * d}.get(self.input_injection, 0)
        injections = self.num_effective_layers if self.inject_every_layer else self.num_recurrences
        head = {"ffn": d * m + inner * d, "linear": d * d}.get(self.head, 0) + embedded * (vocab_size + d)
        adapter = 2.0 * length * embedded * d * (embedded != d)
        layers = (self.num_effective_layers - 1) * full + pruned + 2 * length * injection * injections
        return layers + adapter + 2.0 * num_answers * head
