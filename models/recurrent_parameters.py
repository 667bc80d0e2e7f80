"""Names, shapes and initial values of the recurrent decoder's tensors. Matrices are [in, out], tables [rows, width]."""

from __future__ import annotations

import math
from collections.abc import Iterator

from groundswell.protocols import ParameterSpec
from models.recurrent_settings import RecurrentSettings

TOKENS = "embedding.token.weight"
FIRE_PARTS = ("c", "multiplier", "hidden.weight", "hidden.bias", "output.weight", "output.bias")
FIRE_C = 0.1  # initial factor of distances in FIRE: of the published code


def parameter_specs(model: RecurrentSettings, vocab_size: int) -> list[ParameterSpec]:
    """Decayed are all but biases and norms, as in the published code: also FIRE's numbers and the tables."""
    return [*_embedding(model, vocab_size), *_fire(model), *_block(model), *_head(model, vocab_size)]


def _gain(model: RecurrentSettings) -> float:
    return (8.0 * model.num_effective_layers) ** -0.25


def _matrix(
    model: RecurrentSettings, name: str, size_in: int, size_out: int, gain: float | None = None
) -> Iterator[ParameterSpec]:
    """A matrix with its bias, where the model has biases. `gain`: of Xavier's initial values; default DeepNorm's."""
    yield _weight(model, f"{name}.weight", (size_in, size_out), gain)
    if model.biases:
        yield ParameterSpec(f"{name}.bias", (size_out,), False)


def _weight(model: RecurrentSettings, name: str, shape: tuple[int, int], gain: float | None = None) -> ParameterSpec:
    """Xavier-normal (Glorot & Bengio 2010, equation 16, with variance 2 / (in + out)), or normal."""
    if model.init == "normal":
        return ParameterSpec(name, shape, True, model.init_std)
    return ParameterSpec(name, shape, True, (gain or _gain(model)) * math.sqrt(2.0 / sum(shape)))


def _norm(model: RecurrentSettings, name: str, width: int) -> Iterator[ParameterSpec]:
    if model.norm == "scale_norm":
        yield ParameterSpec(f"{name}.weight", (1,), False, None, width**-0.5)
        return
    yield ParameterSpec(f"{name}.weight", (width,), False, None, 1.0)
    if model.norm == "layer_norm":
        yield ParameterSpec(f"{name}.bias", (width,), False)


def _mlp(model: RecurrentSettings, name: str, size_in: int, size_out: int) -> Iterator[ParameterSpec]:
    inner = model.hidden_width // 2 if model.activation.endswith("_glu") else model.hidden_width
    yield from _matrix(model, f"{name}.up", size_in, model.hidden_width)
    yield from _matrix(model, f"{name}.down", inner, size_out)


def _embedding(model: RecurrentSettings, vocab_size: int) -> Iterator[ParameterSpec]:
    width = model.embedded_width
    std = model.init_std if model.init == "normal" else width**-0.5
    yield ParameterSpec(TOKENS, (vocab_size, width), True, std)
    if model.position_encoding in ("learned", "abacus"):
        yield ParameterSpec("embedding.position.weight", (model.num_positions, width), True, std)
    elif model.position_encoding == "scaled_sinusoidal":
        yield ParameterSpec("embedding.position.scale", (1,), True, None, width**-0.5)
    yield from _norm(model, "embedding.norm", width)
    if width != model.width:
        yield _weight(model, "embedding.adapter.weight", (width, model.width))


def _fire(model: RecurrentSettings) -> Iterator[ParameterSpec]:
    """Outside of the layers: biases are computed once for all recurrences."""
    if model.attention_positions != "fire":
        return
    for layer in range(model.num_layers):
        name, hidden = f"fire.{layer}.", model.fire_width
        yield ParameterSpec(f"{name}c", (1,), True, None, FIRE_C)
        yield ParameterSpec(f"{name}multiplier", (1,), True, None, 1.0)
        yield _weight(model, f"{name}hidden.weight", (1, hidden))
        yield ParameterSpec(f"{name}hidden.bias", (hidden,), False)
        yield _weight(model, f"{name}output.weight", (hidden, model.num_heads))
        yield ParameterSpec(f"{name}output.bias", (model.num_heads,), False)


def _block(model: RecurrentSettings) -> Iterator[ParameterSpec]:
    if not model.inject_every_layer:
        yield from _injection(model, "injection")
    for layer in range(model.num_layers):
        name = f"layers.{layer}."
        if model.inject_every_layer:
            yield from _injection(model, f"{name}injection")
        for part, gain in (("query", 1.0), ("key", 1.0), ("value", None), ("output", None)):
            yield from _matrix(model, f"{name}attention.{part}", model.width, model.width, gain)
        yield from _mlp(model, f"{name}mlp", model.width, model.width)
        for part in ("attention", "mlp"):
            if model.norm_scheme != "simple":
                yield from _norm(model, f"{name}{part}_norm", model.width)
            if model.norm_scheme == "sandwich":
                yield from _norm(model, f"{name}{part}_norm_after", model.width)


def _injection(model: RecurrentSettings, name: str) -> Iterator[ParameterSpec]:
    if model.input_injection == "linear":  # never with a bias
        yield _weight(model, f"{name}.weight", (2 * model.width, model.width))
    elif model.input_injection == "ffn":
        yield from _mlp(model, name, 2 * model.width, model.width)


def _head(model: RecurrentSettings, vocab_size: int) -> Iterator[ParameterSpec]:
    if model.head == "ffn":
        yield from _mlp(model, "head", model.width, model.width)
    elif model.head == "linear":
        yield from _matrix(model, "head", model.width, model.width)
    yield from _norm(model, "final_norm", model.width)
    shared = model.tied_head and model.embedded_width != model.width  # with the adapter of the embedding, transposed
    if model.output_adapter and not shared:
        yield _weight(model, "output_adapter.weight", (model.width, model.embedded_width))
    if not model.tied_head:
        yield _weight(model, "decoder.weight", (vocab_size, model.embedded_width))
    if model.biases:
        yield ParameterSpec("decoder.bias", (vocab_size,), False)
