"""GPT-2 as pure functions of parameters with a leading run axis, with switches for its variants.

Numerically GPT-2 (Radford et al. 2019): pre-norm, learned positions, fused c_attn, biases, tanh-gelu, tied head.
Parameter names and layouts are those of Hugging Face's GPT2LMHeadModel, so folders are exchanged without renaming.
Shapes: K runs, B batch rows, T tokens, A answer positions, V vocabulary, d width, S effective layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Model, Parameters, ParameterSpec, Task
from models import cached, huggingface
from models.attention import SHORT, attention
from models.decoder_network import DecoderNetwork
from models.fused import PARTS, FusedBlock, Geometry
from models.layers import (
    ACTIVATIONS,
    Generators,
    dropout,
    embed,
    keep_masks,
    layer_norm,
    linear,
    rotate,
    scores,
    take,
)

WTE = "transformer.wte.weight"
WPE = "transformer.wpe.weight"
HEAD = "lm_head.weight"
Masks = tuple[Tensor | None, Tensor | None, Tensor | None]


class Decoder(Model):
    """A decoder-only transformer. Its block stack runs `num_recurrences` times over the residual stream."""

    packable: ClassVar[frozenset[str]] = frozenset({"init_scale"})

    num_layers: int = Field(2, gt=0, description="blocks with weights of their own")
    num_heads: int = Field(4, gt=0, description="attention heads; must divide width")
    width: int = Field(128, gt=0, description="size of the residual stream")
    mlp_width: int | None = Field(None, gt=0, description="hidden units of the MLP; default 4 * width")
    activation: Literal["gelu_new", "gelu", "relu"] = Field(
        "gelu_new", description="of the MLP; gelu_new is GPT-2's tanh form"
    )
    layer_norm: bool = Field(True, description="False leaves every LayerNorm out")
    tied_head: bool = Field(True, description="the token embedding is also the output matrix")
    position_encoding: Literal["absolute", "rotary", "null"] = Field(
        "absolute", description="learned table; rotation of queries and keys; none (the causal mask alone tells order)"
    )
    rotary_dim: int = Field(32, gt=0, multiple_of=2, description="leading dimensions of each head that rotary turns")
    freeze_embeddings: bool = Field(False, description="token and position tables keep their initial values")
    dropout: float = Field(0.0, ge=0, lt=1, description="on embeddings, attention weights and residual branches")
    init_scale: float = Field(1.0, gt=0, description="multiplies the standard deviation of every initial weight")
    init_std: float = Field(0.02, gt=0, description="of initial weights; c_proj: divided by sqrt(2 * num_layers)")
    num_positions: int | None = Field(None, gt=0, description="rows of the position table; default the task's length")
    num_recurrences: int = Field(1, gt=0, description="passes of the whole block stack, without a norm in between")
    re_embed: bool = Field(False, description="before passes 2..: x += softmax(temperature * x E^T) E, E the embedding")
    re_embed_temperature: float = Field(1.0, gt=0, description="factor on the scores of re_embed")

    @field_validator("position_encoding", mode="before")
    @classmethod
    def _null_is_a_name(cls, value: Any) -> Any:
        return "null" if value is None else value  # what JSON and YAML make of the bare word

    @model_validator(mode="after")
    def _check(self) -> Decoder:
        if self.width % self.num_heads:
            remedy = ", ".join(str(n) for n in range(1, min(self.width, 64) + 1) if self.width % n == 0)
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}; choose one of {remedy}")
        head = self.width // self.num_heads
        if self.position_encoding == "rotary" and head < self.rotary_dim:
            most = self.width // self.rotary_dim
            raise ValueError(
                f"num_heads {self.num_heads} gives heads of {head} dimensions, rotary turns {self.rotary_dim}; "
                + (f"at width {self.width} use 1 to {most} heads" if most else f"use width {self.rotary_dim} or more")
                + ", or a smaller rotary_dim"
            )
        return self

    def check(self, task: Task) -> None:
        if self.num_positions is not None and self.num_positions < task.max_length:
            raise ValueError(
                f"model.num_positions {self.num_positions} is less than the task's {task.max_length} tokens; "
                f"set model.num_positions={task.max_length} or leave it out"
            )

    @property
    def hidden_width(self) -> int:
        return self.mlp_width or 4 * self.width

    @property
    def num_effective_layers(self) -> int:
        return self.num_layers * self.num_recurrences

    # ---- parameters ----

    def parameters(self, vocab_size: int, max_length: int) -> list[ParameterSpec]:
        """Decayed tensors first: matrices and embeddings are decayed, biases and LayerNorms are not."""
        d, m = self.width, self.hidden_width
        std = self.init_std * self.init_scale
        residual_std = std / math.sqrt(2 * self.num_layers)  # GPT-2's c_proj; counts physical layers
        trained = not self.freeze_embeddings
        decayed = [ParameterSpec(WTE, (vocab_size, d), True, std, trained=trained)]
        if self.position_encoding == "absolute":
            decayed += [ParameterSpec(WPE, (self.num_positions or max_length, d), True, std, trained=trained)]
        if not self.tied_head:
            decayed += [ParameterSpec(HEAD, (vocab_size, d), True, std)]
        rest: list[ParameterSpec] = []
        for layer in range(self.num_layers):
            name = f"transformer.h.{layer}."
            for part, shape, deviation in (
                ("attn.c_attn", (d, 3 * d), std),
                ("attn.c_proj", (d, d), residual_std),
                ("mlp.c_fc", (d, m), std),
                ("mlp.c_proj", (m, d), residual_std),
            ):
                decayed += [ParameterSpec(f"{name}{part}.weight", shape, True, deviation)]
                rest += [ParameterSpec(f"{name}{part}.bias", shape[1:], False)]
            if self.layer_norm:
                rest += self._norm_specs(f"{name}ln_1") + self._norm_specs(f"{name}ln_2")
        return decayed + rest + (self._norm_specs("transformer.ln_f") if self.layer_norm else [])

    def _norm_specs(self, name: str) -> list[ParameterSpec]:
        shape = (self.width,)
        return [ParameterSpec(f"{name}.weight", shape, False, None, 1.0), ParameterSpec(f"{name}.bias", shape, False)]

    # ---- forward pieces ----

    def embed(
        self,
        parameters: Parameters,
        tokens: Tensor,
        generators: Generators | None = None,
        start: int = 0,
        places: Tensor | None = None,
    ) -> Tensor:
        """tokens [K, B, T], the first at position `start` -> residual stream before the first block [K, B, T, d].
        `places` [K, B, T]: positions of a learned table, where they do not follow each other."""
        x = embed(parameters[WTE], tokens)
        if places is not None:
            x = x + embed(parameters[WPE], places)
        elif self.position_encoding == "absolute":
            positions = parameters[WPE]
            length = tokens.shape[-1]
            if length < positions.shape[1]:
                positions = positions[:, start : start + length]
            x = x + positions.unsqueeze(1)
        return dropout(x, self.dropout, generators)

    def token_embeddings(self, parameters: Parameters) -> Tensor:
        """[K, V, d]."""
        return parameters[WTE]

    def block(
        self,
        parameters: Parameters,
        layer: int,
        x: Tensor,
        positions: Tensor | None = None,
        generators: Generators | None = None,
    ) -> Tensor:
        """Residual stream through effective layer `layer` (physical layer modulo num_layers): [K, B, T, d] -> the same.

        With `positions` [K, B, A] only those tokens come out, [K, B, A, d]; the others serve as keys and values.
        """
        name = f"transformer.h.{layer % self.num_layers}."
        masks = self._dropout_masks(x, positions, generators)
        if self._can_fuse(x):
            return self._fused_block(parameters, name, x, positions, masks)
        attention_mask, branch_mask, mlp_mask = masks
        length = x.shape[2]
        if positions is None:
            rows, (query, key_value) = _rows(x), self.query_key_value(parameters, layer, x)
        else:
            rows = _rows(take(x, positions))
            weight, bias = _weights(parameters, f"{name}attn.c_attn")
            widths = [self.width, 2 * self.width]
            (query_weight, kv_weight), (query_bias, kv_bias) = weight.split(widths, -1), bias.split(widths, -1)
            query = linear(self._norm(parameters, f"{name}ln_1", rows), query_weight, query_bias)
            key_value = linear(self._norm(parameters, f"{name}ln_1", _rows(x)), kv_weight, kv_bias)
            query = self._rotate(query.view(*positions.shape, -1), positions, length)
            key_value = self._rotate_keys(key_value.view(*x.shape[:-1], -1), None, length)
        mixed = attention(query, key_value, positions, self.num_heads, attention_mask)
        branch = self.attention_branch(parameters, layer, _rows(mixed))
        rows = rows + (branch if branch_mask is None else branch * _rows(branch_mask))
        branch = self.mlp_branch(parameters, layer, rows)
        return (rows + (branch if mlp_mask is None else branch * _rows(mlp_mask))).view(*mixed.shape)

    def query_key_value(self, parameters: Parameters, layer: int, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """x [K, B, T, d] of the positions from `start` on -> queries [K, B, T, d], keys and values [K, B, T, 2d]."""
        name = f"transformer.h.{layer % self.num_layers}."
        normal = self._norm(parameters, f"{name}ln_1", _rows(x))
        both = linear(normal, *_weights(parameters, f"{name}attn.c_attn")).view(*x.shape[:-1], 3 * self.width)
        query, key_value = both.split([self.width, 2 * self.width], -1)
        end = start + x.shape[2]
        positions = torch.arange(start, end, device=x.device).expand(x.shape[:3]) if start else None
        return self._rotate(query, positions, end), self._rotate_keys(key_value, positions, end)

    def _rotate(self, x: Tensor, positions: Tensor | None, length: int) -> Tensor:
        """Queries or keys of tokens at `positions` below `length` (None: all in order), turned where that is asked."""
        rotary = self.position_encoding == "rotary"
        return rotate(x, positions, length, self.num_heads, self.rotary_dim) if rotary else x

    def _rotate_keys(self, key_value: Tensor, positions: Tensor | None, length: int) -> Tensor:
        if self.position_encoding != "rotary":
            return key_value
        key, value = key_value.chunk(2, -1)
        return torch.cat([self._rotate(key, positions, length), value], -1)

    def attention_branch(self, parameters: Parameters, layer: int, rows: Tensor) -> Tensor:
        """What the heads found, side by side [(K,) N, d] -> what the attention adds to the residual stream."""
        return linear(rows, *_weights(parameters, f"transformer.h.{layer % self.num_layers}.attn.c_proj"))

    def mlp_branch(self, parameters: Parameters, layer: int, rows: Tensor) -> Tensor:
        """Residual stream after the attention [(K,) N, d] -> what the MLP adds to it."""
        name = f"transformer.h.{layer % self.num_layers}."
        hidden = linear(self._norm(parameters, f"{name}ln_2", rows), *_weights(parameters, f"{name}mlp.c_fc"))
        return linear(ACTIVATIONS[self.activation](hidden), *_weights(parameters, f"{name}mlp.c_proj"))

    def _dropout_masks(self, x: Tensor, positions: Tensor | None, generators: Generators | None) -> Masks:
        """A block's three, drawn together: for attention weights [K, B, H, A, T] and for both branches [K, B, A, d]."""
        if generators is None or self.dropout == 0.0:
            return None, None, None
        _, batch, length, width = x.shape
        num_queries = length if positions is None else positions.shape[-1]
        branch = (batch, num_queries, width)
        shapes = [(batch, self.num_heads, num_queries, length), branch, branch]
        first, second, third = keep_masks(shapes, self.dropout, generators, x)
        return first, second, third

    def _can_fuse(self, x: Tensor) -> bool:
        """The written-out block is for CPUs and plain GPT-2s."""
        plain = self.layer_norm and self.activation == "gelu_new" and self.position_encoding != "rotary"
        return plain and x.shape[2] <= SHORT and not (x.is_cuda or torch.compiler.is_compiling())

    def _fused_block(
        self, parameters: Parameters, name: str, x: Tensor, positions: Tensor | None, masks: Masks
    ) -> Tensor:
        num_runs, batch, length, width = x.shape
        num_queries = length if positions is None else positions.shape[-1]
        attention_mask, *others = masks
        ours = (attention_mask, *(None if mask is None else _rows(mask) for mask in others))
        weights = [tensor for part in PARTS for tensor in _weights(parameters, f"{name}{part}")]
        geometry = Geometry(num_runs, batch, length, num_queries, self.num_heads)
        rows = FusedBlock.apply(_rows(x), positions, geometry, ours, *weights)
        return rows.view(num_runs, batch, num_queries, width)

    def before_block(self, parameters: Parameters, layer: int, x: Tensor) -> Tensor:
        """What happens to the residual stream between two passes: nothing, or re-embedding."""
        if not (self.re_embed and layer > 0 and layer % self.num_layers == 0):
            return x
        table = _tensor(parameters, WTE)
        weights = (self.re_embed_temperature * scores(_rows(x), table)).softmax(-1)
        return x + torch.matmul(weights, table).view_as(x)

    def final_norm(self, parameters: Parameters, x: Tensor) -> Tensor:
        """[K, B, T, d] -> the same shape."""
        return self._norm(parameters, "transformer.ln_f", _rows(x)).view_as(x)

    def unembed(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Normalised states [K, B, T, d] -> logits [K, B, T, V]."""
        logits = scores(_rows(x), _tensor(parameters, WTE if self.tied_head else HEAD))
        return logits.view(*x.shape[:-1], -1)

    def _norm(self, parameters: Parameters, name: str, rows: Tensor) -> Tensor:
        return layer_norm(rows, *_weights(parameters, name)) if self.layer_norm else rows

    # ---- forward passes ----

    def answer_logits(
        self,
        parameters: Parameters,
        tokens: Tensor,
        positions: Tensor,
        generators: Sequence[torch.Generator] | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """tokens [K, B, T], positions [K, B, A] -> logits [K, B, A, V]. Last block and head see answers only.
        `places` as for `embed`."""
        x = self.embed(parameters, tokens, generators, places=places)
        last = self.num_effective_layers - 1
        for layer in range(last + 1):
            x = self.before_block(parameters, layer, x)
            x = self.block(parameters, layer, x, positions if layer == last else None, generators)
        return self.unembed(parameters, self.final_norm(parameters, x))

    def network(self, vocab_size: int, max_length: int) -> DecoderNetwork:
        """One run's network as a module. Its logits equal `answer_logits`."""
        return DecoderNetwork(self, self.parameters(vocab_size, max_length))

    def hidden_states(self, parameters: Parameters, tokens: Tensor) -> Tensor:
        """tokens [K, B, T] -> [K, S+1, B, T, d]: entry l is the residual stream after l blocks, the last one after
        the final LayerNorm. Where a pass begins with re-embedding, the entry is the re-embedded state."""
        x = self.embed(parameters, tokens)
        states = []
        for layer in range(self.num_effective_layers):
            x = self.before_block(parameters, layer, x)
            states.append(x)
            x = self.block(parameters, layer, x)
        return torch.stack([*states, self.final_norm(parameters, x)], dim=1)

    def logits(self, parameters: Parameters, tokens: Tensor) -> Tensor:
        """tokens [K, B, T] -> logits at every position [K, B, T, V]."""
        return self.unembed(parameters, self.hidden_states(parameters, tokens)[:, -1])

    def generate(
        self, parameters: Parameters, prompts: Tensor, num_tokens: int, stop_token: int | None = None
    ) -> Tensor:
        return cached.generate(self, parameters, prompts, num_tokens, stop_token)

    def flops_per_example(self, vocab_size: int, length: int, num_answers: int) -> float:
        """Matrix-multiply FLOPs of `answer_logits` for one example."""
        d, m = self.width, self.hidden_width
        keys_values = 2 * length * d * 2 * d
        per_query = 2 * (2 * d * d + 2 * d * m) + 4 * length * d  # query and output projections, MLP, attention
        full, pruned = keys_values + length * per_query, keys_values + num_answers * per_query
        between = 4.0 * length * d * vocab_size * (self.num_recurrences - 1) * self.re_embed
        return (self.num_effective_layers - 1) * full + pruned + between + 2.0 * num_answers * d * vocab_size

    # ---- folders ----

    def save_folder(self, parameters: Parameters, folder: Path, vocabulary: Sequence[str]) -> None:
        """Write config.json, model.safetensors and vocabulary.json. Plain GPT-2s load with GPT2LMHeadModel.

        Raises ConfigError where the vocabulary has more tokens than the embedding has rows.
        """
        rows = len(parameters[WTE])
        positions = len(parameters[WPE]) if WPE in parameters else self.num_positions
        if len(vocabulary) > rows:
            raise ConfigError(
                f"vocabulary: {len(vocabulary)} tokens for {rows} embedding rows; build the model for this task"
            )
        huggingface.write_folder(folder, huggingface.to_config(self, rows, positions), parameters, vocabulary)

    def load_folder(self, folder: Path, vocab_size: int, max_length: int) -> dict[str, Tensor]:
        """Read a folder of ours or a GPT-2 folder of Hugging Face: one run's tensors [*shape], float32 (or float64).

        Raises ConfigError, which names the file and the tensor or field, where the folder is another network.
        """
        huggingface.check_config(self, folder)
        return huggingface.read_weights(folder, self.parameters(vocab_size, max_length), self.tied_head)

    @classmethod
    def from_huggingface(cls, folder: str | Path) -> Decoder:
        """The configuration of the network in a folder. Raises ConfigError for one this class cannot compute."""
        return cls.from_dict(huggingface.decoder_fields(Path(folder)))


def _rows(x: Tensor) -> Tensor:
    """[K, B, T, d] -> [K, B*T, d], for one run [B*T, d]."""
    return x.flatten(0, 2) if len(x) == 1 else x.flatten(1, 2)


def _tensor(parameters: Parameters, name: str) -> Tensor:
    """Without the run axis for one run (squeeze: indexing would cost a zero-fill and a copy in the backward pass)."""
    tensor = parameters[name]
    return tensor.squeeze(0) if len(tensor) == 1 else tensor


def _weights(parameters: Parameters, name: str) -> tuple[Tensor, Tensor]:
    return _tensor(parameters, f"{name}.weight"), _tensor(parameters, f"{name}.bias")
