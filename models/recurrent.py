"""The depth-recurrent decoder of McLeish et al. 2024 (arXiv 2405.17399): standard, with input injection, looped.

A block of `num_layers` layers runs `num_recurrences` times over a state, and what goes into the block is the state and
the embedded input. With one recurrence it is a standard decoder. Pure functions of parameters with a leading run axis.

Where the published code and its documentation differ, this class does what makes sense, and what the published code
does is a setting: the state starts as noise of deviation 0.02 (`initial_state`), but in evaluation it is one fixed draw
by position instead of a new one each time; `deepnorm_straight` gives the gain to all rows of the value matrix, which
the published code misses with its per-head attention; tied heads work at all widths.
Shapes: K runs, B batch rows, T tokens, A answer positions, V vocabulary, E embedding width, d width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Parameters, ParameterSpec
from models import recurrent_cached, recurrent_folder, recurrent_fused
from models.abacus import digit_places, shifted
from models.layers import Generators, embed, rotate, scores, take
from models.positions import FireWeights, fire_bias, fixed_normal, random_positions, rotate_halves, sinusoids
from models.recurrent_layers import NORM_BEFORE, advance, attention, combine, mlp, norm, product, rows_of, tensor
from models.recurrent_network import RecurrentNetwork
from models.recurrent_parameters import FIRE_PARTS, TOKENS, parameter_specs
from models.recurrent_settings import RecurrentSettings

MANY_ROWS = 512  # tokens of a run from which on a CPU is as fast with one run after the other
Recurrences = tuple[Sequence[int], Sequence[int]]  # of each run: first without gradients, then with
# physical layer, state, injected, bias, positions: as `RecurrentDecoder.layer` takes them
RunLayer = Callable[[int, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


class RecurrentDecoder(RecurrentSettings):
    """A looped transformer over digits. `input_injection=none` with `initial_state=input` is a textbook decoder."""

    def parameters(self, vocab_size: int, max_length: int) -> list[ParameterSpec]:
        return parameter_specs(self, vocab_size)

    # ---- before the block ----

    def embed(
        self, parameters: Parameters, tokens: Tensor, generators: Generators | None = None, start: int = 0
    ) -> Tensor:
        """tokens [K, B, T], or the whole of them with `start` the first that is wanted -> what is injected
        [K, B, T - start, d]."""
        x = embed(parameters[TOKENS], tokens[:, :, start:])
        table = parameters.get("embedding.position.weight")
        if self.position_encoding == "abacus":
            assert table is not None
            x = x + embed(table, self.abacus_ids(tokens, self.offsets(generators, tokens.device))[:, :, start:])
        elif self.position_encoding == "learned":
            assert table is not None
            self._check_length(tokens.shape[-1])
            x = x + table[:, start : tokens.shape[-1]].unsqueeze(1)
        elif self.position_encoding != "null":
            waves = sinusoids(tokens.shape[-1], self.embedded_width, x.dtype, x.device)[start:]
            scale = parameters.get("embedding.position.scale")
            x = x + (waves if scale is None else waves * scale[:, None, None])
        rows = norm(parameters, "embedding.norm", self.norm, self.norm_eps, rows_of(x))
        if "embedding.adapter.weight" in parameters:
            rows = product(parameters, "embedding.adapter", rows)
        return rows.view(*x.shape[:-1], self.width)

    def offsets(self, generators: Generators | None, device: torch.device) -> Tensor | None:
        """One Abacus offset for each run [K], from its own generator; None: no shift."""
        if generators is None or self.abacus_max_offset == 0:
            return None
        high = self.abacus_max_offset + 1
        return torch.cat([torch.randint(high, (1,), generator=g, device=device) for g in generators])

    def abacus_ids(self, tokens: Tensor, offsets: Tensor | None) -> Tensor:
        """tokens [K, B, T] -> rows of the Abacus table [K, B, T]. Raises ConfigError for a number that is too long."""
        digit = tokens - self.first_digit_token
        places = digit_places((digit >= 0) & (digit < 10))
        if offsets is not None:
            places = shifted(places, offsets[:, None, None])
        most = tokens.shape[-1] + (0 if offsets is None else self.abacus_max_offset)
        # short rows need no look at the values, which would wait for an accelerator
        if most >= self.num_positions and int(places.max()) >= self.num_positions:
            raise ConfigError(
                f"model.num_positions: a number of {int(places.max())} digits (with its offset) does not fit the "
                f"{self.num_positions} rows of the Abacus table; ask for shorter numbers or train with more positions"
            )
        return places

    def _check_length(self, length: int) -> None:
        if length > self.num_positions:
            raise ConfigError(
                f"model.num_positions: {length} tokens do not fit the {self.num_positions} learned positions; "
                "ask for shorter rows or train with more positions"
            )

    def first_state(self, injected: Tensor, generators: Generators | None, start: int = 0) -> Tensor:
        """The state before the first recurrence, like `injected` [K, B, T, d], whose first token is at `start`.

        Without generators noise is a fixed draw by position, the same in all rows and runs.
        """
        if self.initial_state == "input":
            return injected
        if self.initial_state == "zero":
            return torch.zeros_like(injected)
        if generators is None:
            end = start + injected.shape[2]
            noise = fixed_normal(end, self.width, injected.dtype, injected.device)[start:].expand_as(injected)
        else:
            noise = torch.empty_like(injected)
            for part, generator in zip(noise.unbind(), generators, strict=True):
                part.normal_(generator=generator)
        if self.initial_state == "unit":
            deviation, mean = torch.std_mean(noise, dim=-1, keepdim=True)
            return (noise - mean) / deviation
        return noise * 0.02 if self.initial_state == "embed" else noise  # 0.02: BERT's embeddings

    def biases_of(
        self, parameters: Parameters, length: int, device: torch.device, generators: Generators | None = None
    ) -> list[Tensor | None]:
        """FIRE's attention biases of each layer [K, H, T, T], which all recurrences of a pass share; None without."""
        if self.attention_positions != "fire":
            return [None] * self.num_layers
        in_order = torch.arange(length, device=device).unsqueeze(0)
        drawn = generators if length <= self.fire_max_length else None
        biases: list[Tensor | None] = []
        for layer in range(self.num_layers):
            weights = FireWeights(*(parameters[f"fire.{layer}.{name}"] for name in FIRE_PARTS))
            places = in_order if drawn is None else random_positions(length, self.fire_max_length, drawn, device)
            places = places.to(weights.c.dtype)
            biases.append(fire_bias(weights, places, places, self.fire_length))
        return biases

    # ---- the block ----

    def inject(self, parameters: Parameters, prefix: str, state: Tensor, injected: Tensor) -> Tensor:
        """Two times [K, B, T, d] -> what the next layer works on. `prefix`: of the injection's parameters."""
        if self.input_injection == "none":
            return state
        if self.input_injection == "add":
            return state + injected
        both = rows_of(torch.cat([state, injected], -1))
        if self.input_injection == "linear":
            return product(parameters, f"{prefix}injection", both).view_as(state)
        return mlp(parameters, f"{prefix}injection", self.activation, both).view_as(state)

    def layer(
        self,
        parameters: Parameters,
        layer: int,
        x: Tensor,
        injected: Tensor,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """State [K, B, T, d] through physical layer `layer`; with `positions` [K, B, A] only those tokens come out.

        The parameters need be those of this layer only.
        """
        prefix = f"layers.{layer}."
        if self.inject_every_layer:
            x = self.inject(parameters, prefix, x, injected)
        query, key_value = self.query_key_value(parameters, layer, x, positions)
        mixed = attention(query, key_value, positions, self.num_heads, bias)
        rows = rows_of(x if positions is None else take(x, positions))
        return self.after_attention(parameters, layer, rows, rows_of(mixed)).view_as(mixed)

    def query_key_value(
        self, parameters: Parameters, layer: int, x: Tensor, positions: Tensor | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """x [K, B, T, d] from token `start` on -> queries, of all tokens or those at `positions`, keys and values
        [K, B, T, 2d]."""
        name, end = f"layers.{layer}.attention.", start + x.shape[2]
        rows = rows_of(x)
        if self.norm_scheme in NORM_BEFORE:
            rows = self._norm(parameters, f"layers.{layer}.attention_norm", rows)
        source = rows if positions is None else rows_of(take(rows.view_as(x), positions))
        queries = product(parameters, f"{name}query", source).view(
            *(x if positions is None else positions).shape[:3], -1
        )
        keys = product(parameters, f"{name}key", rows).view_as(x)
        values = product(parameters, f"{name}value", rows).view_as(x)
        if self.attention_positions.startswith("rotary"):
            places = torch.arange(start, end, device=x.device).expand(x.shape[:3]) if start else None
            queries = self._rotate(queries, places if positions is None else positions, end)
            keys = self._rotate(keys, places, end)
        return queries, torch.cat([keys, values], -1)

    def _rotate(self, x: Tensor, positions: Tensor | None, length: int) -> Tensor:
        if self.attention_positions == "rotary":
            return rotate_halves(x, positions, length, self.num_heads)
        return rotate(x, positions, length, self.num_heads, self.head_width)

    def after_attention(self, parameters: Parameters, layer: int, rows: Tensor, mixed: Tensor) -> Tensor:
        """Residual rows and what the heads found, side by side, [(K,) N, d] each -> rows after the layer."""
        name = f"layers.{layer}."
        rows = self._combine(
            parameters, f"{name}attention", rows, product(parameters, f"{name}attention.output", mixed)
        )
        normal = self._norm(parameters, f"{name}mlp_norm", rows) if self.norm_scheme in NORM_BEFORE else rows
        return self._combine(parameters, f"{name}mlp", rows, mlp(parameters, f"{name}mlp", self.activation, normal))

    def _combine(self, parameters: Parameters, part: str, rows: Tensor, branch: Tensor) -> Tensor:
        after = f"{part}_norm_after" if self.norm_scheme == "sandwich" else f"{part}_norm"
        depth = self.num_effective_layers
        return combine(self.norm_scheme, depth, rows, branch, lambda x: self._norm(parameters, after, x))

    def _norm(self, parameters: Parameters, name: str, rows: Tensor) -> Tensor:
        return norm(parameters, name, self.norm, self.norm_eps, rows)

    def recur(
        self,
        step: Callable[[Tensor, bool], Tensor],
        state: Tensor,
        generators: Generators | None,
        recurrences: Recurrences | None,
    ) -> Tensor:
        """Run the block: `step(state, last)` is one recurrence, and `last` tells that it is the last one.

        The runs of a pack end together: those with fewer recurrences wait at the start of either part.
        """
        count = self.num_recurrences if generators is not None else self.eval_recurrences
        before, after = recurrences or ([0] * len(state), [count] * len(state))
        first = state
        with torch.no_grad():
            for done in range(max(before)):
                state = advance([done < n for n in before], step(state, False), state)
        if max(before) > 0:  # a run without such recurrences keeps its gradient to the first state
            state = advance([n > 0 for n in before], state, first)
        most = max(after)
        for done in range(most):
            state = advance([done >= most - k for k in after], step(state, done == most - 1), state)
        return state

    # ---- after the block ----

    def unembed(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Last states [K, B, A, d] -> logits [K, B, A, V]."""
        rows = rows_of(x)
        if self.head == "ffn":
            rows = mlp(parameters, "head", self.activation, rows)
        elif self.head == "linear":
            rows = product(parameters, "head", rows)
        rows = self._norm(parameters, "final_norm", rows)
        if self.output_adapter:
            shared = self.tied_head and self.embedded_width != self.width
            adapter = tensor(parameters, "embedding.adapter.weight" if shared else "output_adapter.weight")
            assert adapter is not None
            rows = torch.matmul(rows, adapter.mT if shared else adapter)
        table = tensor(parameters, TOKENS if self.tied_head else "decoder.weight")
        assert table is not None
        logits = scores(rows, table)
        bias = tensor(parameters, "decoder.bias")
        if bias is not None:
            logits = logits + (bias if bias.dim() == 1 else bias.unsqueeze(1))
        return logits.view(*x.shape[:-1], -1)

    # ---- forward passes ----

    def answer_logits(
        self,
        parameters: Parameters,
        tokens: Tensor,
        positions: Tensor,
        generators: Sequence[torch.Generator] | None = None,
        *,
        recurrences: Recurrences | None = None,
    ) -> Tensor:
        """tokens [K, B, T], positions [K, B, A] -> logits [K, B, A, V]. The last layer and the head see answers only.

        `recurrences`: of each run, without and with gradients (at least one); default: all, with gradients.
        Evaluation (no generators) is deterministic. Raises ConfigError for a number or row that the tables do not fit.
        """

        if len(tokens) > 1 and not tokens.is_cuda and tokens[0].numel() >= MANY_ROWS:
            return self._one_by_one(parameters, tokens, positions, generators, recurrences)
        if recurrent_fused.can_fuse(self, tokens):
            return recurrent_fused.answer_logits(self, parameters, tokens, positions, generators, recurrences)

        def run(layer: int, x: Tensor, injected: Tensor, bias: Tensor | None, answers: Tensor | None) -> Tensor:
            return self.layer(parameters, layer, x, injected, bias, answers)

        return self.forward(parameters, tokens, positions, generators, recurrences, run)

    def _one_by_one(
        self,
        parameters: Parameters,
        tokens: Tensor,
        positions: Tensor,
        generators: Generators | None,
        recurrences: Recurrences | None,
    ) -> Tensor:
        """A pack whose runs are large enough: batched products would gain nothing, and each run has its recurrences."""
        runs = {name: value.split(1) for name, value in parameters.items()}
        results = []
        for run in range(len(tokens)):
            own = {name: parts[run] for name, parts in runs.items()}
            drawn = None if generators is None else [generators[run]]
            times = None if recurrences is None else ([recurrences[0][run]], [recurrences[1][run]])
            part = slice(run, run + 1)
            results.append(self.answer_logits(own, tokens[part], positions[part], drawn, recurrences=times))
        return torch.cat(results)

    def forward(
        self,
        parameters: Parameters,
        tokens: Tensor,
        positions: Tensor,
        generators: Generators | None,
        recurrences: Recurrences | None,
        run_layer: RunLayer,
    ) -> Tensor:
        """As `answer_logits`; `parameters` need not hold those of layers, which `run_layer` has."""
        injected = self.embed(parameters, tokens, generators)
        state = self.first_state(injected, generators)
        biases = self.biases_of(parameters, tokens.shape[-1], tokens.device, generators)

        def step(state: Tensor, last: bool) -> Tensor:
            if not self.inject_every_layer:
                state = self.inject(parameters, "", state, injected)
            for layer, bias in enumerate(biases):
                answers = positions if last and layer == self.num_layers - 1 else None
                state = run_layer(layer, state, injected, bias, answers)
            return state

        return self.unembed(parameters, self.recur(step, state, generators, recurrences))

    def logits(self, parameters: Parameters, tokens: Tensor) -> Tensor:
        """tokens [K, B, T] -> logits at every position [K, B, T, V]."""
        return self.answer_logits(
            parameters, tokens, torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
        )

    def generate(
        self, parameters: Parameters, prompts: Tensor, num_tokens: int, stop_token: int | None = None
    ) -> Tensor:
        """Greedy decoding with a key-value cache: prompts [K, B, P] -> [K, B, num_tokens]. Where `stop_token` is given,
        a row ends with it, leaves the batch, and is filled with 0."""
        return recurrent_cached.generate(self, parameters, prompts, num_tokens, stop_token)

    def network(self, vocab_size: int, max_length: int) -> RecurrentNetwork:
        """One run's network as a module. Its logits equal `answer_logits`."""
        return RecurrentNetwork(self, self.parameters(vocab_size, max_length))

    # ---- folders ----

    def save_folder(self, parameters: Parameters, folder: Path, vocabulary: Sequence[str]) -> None:
        """Write config.json, model.safetensors and vocabulary.json."""
        recurrent_folder.write(self, parameters, folder, vocabulary)

    def load_folder(self, folder: Path, vocab_size: int, max_length: int) -> dict[str, Tensor]:
        """One run's tensors from a folder of ours or of the published code. Raises ConfigError for another network."""
        return recurrent_folder.read(self, folder, self.parameters(vocab_size, max_length))
