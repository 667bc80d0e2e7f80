"""One masked pass over a transformer's layers, and the way back. `models.edge_fast` tells the method and the shapes.

Further shapes: M is K, or 1 where the runs share their data; r rows of the buffer of differences so far; J readers of
q, k and v; H heads; h head width. Buffers are [rows, K, tokens, d].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.edge_folded import Attended, FoldedTransformer, MlpSaved, Projected
from models.edge_layout import Layout
from models.edge_ordinary import OrdinaryPass, hidden_bias, ordinary_pass, take
from models.edge_workspace import Workspace


@dataclass(frozen=True)
class Given:
    """What the masks do not change."""

    num_runs: int
    copies: int  # M
    embeddings: Tensor  # [e, M*B, T, d]: differences, or the outputs where the ablation is by zero
    always: Tensor | None  # [M*B, P + T, d]: clean embeddings that are no writers, less what the corrupted run has
    corrupted: OrdinaryPass | None
    start: int  # P
    stop: int  # P + T
    places: Tensor  # [M*B, A], counted from the start of the row

    def before(self, layer: int) -> Tensor | None:
        """What all readers of the layer read, [M*B, P + T, d]; None: nothing."""
        if self.corrupted is None:
            return self.always
        residual = self.corrupted.residual[layer]
        return residual if self.always is None else residual + self.always

    def final(self) -> Tensor | None:
        """What the last reader reads, [M*B, A, d]."""
        always = None if self.always is None else take(self.always, self.places)
        if self.corrupted is None:
            return always
        return self.corrupted.final if always is None else self.corrupted.final + always


def given(parts: FoldedTransformer, num_runs: int, clean: Tensor, corrupted: Tensor | None, positions: Tensor) -> Given:
    """Runs on the corrupted tokens, and finds what need not be computed: one exchange with the device."""
    clean, corrupted, places = as_rows(clean, corrupted, positions)
    copies = len(places) // positions.shape[1]
    writers = len(parts.graph.embeddings)
    if corrupted is None:
        stop = int(places.max()) + 1
        outputs = parts.embeddings(clean[:, :stop])
        always = None if writers else outputs.sum(0)
        return Given(num_runs, copies, outputs[:writers], always, None, 0, stop, places)
    same = (clean == corrupted).all(0).cumprod(0).sum()
    prefix, latest = torch.stack([same, places.max()]).tolist()
    start, stop = min(prefix, latest), latest + 1
    run = ordinary_pass(parts, corrupted[:, :stop], places)
    difference = parts.embeddings(clean[:, :stop]) - parts.embeddings(corrupted[:, :stop])
    always = None if writers else difference.sum(0)
    return Given(num_runs, copies, difference[:writers, :, start:], always, run, start, stop, places)


def as_rows(clean: Tensor, corrupted: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """[M or 1, B, ...] each -> [M*B, ...]."""
    copies = max(len(x) for x in (clean, corrupted, positions) if x is not None)
    first, second, third = (
        None if x is None else x.expand(copies, *x.shape[1:]).flatten(0, 1) for x in (clean, corrupted, positions)
    )
    assert first is not None and third is not None
    return first, second, third


@dataclass
class Stage:
    """What one layer leaves for the way back."""

    projected: list[Projected]  # of all q, k, v; in the last layer of q, then of k and v
    attended: Attended
    mlp: MlpSaved
    inputs: list[Tensor]  # of readers: what `projected` holds views of


class Sweep:
    """Forward once, then backward at most once."""

    def __init__(self, parts: FoldedTransformer, layout: Layout, source: Given) -> None:
        self.parts, self.layout, self.source = parts, layout, source
        self.heads, self.groups = parts.graph.num_heads, parts.graph.num_kv_heads
        self.readers = self.heads + 2 * self.groups
        self.last, self.repeats = len(parts.layers) - 1, source.num_runs // source.copies
        self.places = source.places.repeat(self.repeats, 1)  # [N, A]
        device = self.places.device
        self.window = torch.arange(source.start, source.stop, device=device)[None]
        length, (rows, self.num_answers) = source.stop - source.start, self.places.shape
        self.tokens = rows // source.num_runs * length
        within = (self.places - source.start).clamp(min=0)
        self.answers = (torch.arange(0, rows * length, length, device=device).unsqueeze(1) + within).flatten()
        # answers inside the shared prefix differ in nothing
        self.outside = (self.places < source.start).view(-1, 1) if source.start else None
        dtype = parts.network.dtype
        self.hidden = [hidden_bias(places, source.stop, dtype) for places in (self.window, self.places)]
        self.stages: list[Stage] = []
        self.space: Workspace = parts.space

    # ---- forward ----

    def forward(self, flat: Tensor, keep: bool) -> Tensor:
        """flat [K, size] -> logits [N, A, V]. `keep` what the way back needs."""
        source, layout, num_runs = self.source, self.layout, self.source.num_runs
        rows, width = layout.before(self.last), self.parts.width
        all_tokens = self.space.take((rows, num_runs, self.tokens, width), flat)
        self._spread(source.embeddings, all_tokens[1 : 1 + layout.num_embeddings])
        for layer in range(self.last):
            self._set_always(all_tokens[0], self._windowed(source.before(layer)))
            stage = self._layer(flat, layer, all_tokens)
            if keep:
                self.stages.append(stage)
            else:
                self.space.give(*stage.inputs, *stage.mlp.buffers)
        at_answers = flat.new_empty(layout.num_rows, num_runs, len(self.answers) // num_runs, width)
        picked = at_answers[1:rows].flatten(1, 2)
        torch.index_select(all_tokens[1:].flatten(1, 2), 1, self.answers, out=picked)
        if self.outside is not None:
            picked.masked_fill_(self.outside, 0.0)
        always = source.before(self.last)
        self._set_always(all_tokens[0], self._windowed(always))
        self._set_always(at_answers[0], None if always is None else take(always, source.places))
        stage = self._last_layer(flat, all_tokens, at_answers)
        self._set_always(at_answers[0], source.final())
        states = self._read(layout.last(flat)[:, None], at_answers)
        logits, projected = self.parts.head(states.view(-1, width))
        if keep:
            self.stages.append(stage)
            self.all_tokens, self.at_answers, self.projected = all_tokens, at_answers, projected
        else:
            self.space.give(all_tokens, *stage.inputs, *stage.mlp.buffers)
        return logits.view(*self.places.shape, -1)

    def _layer(self, flat: Tensor, layer: int, buffer: Tensor) -> Stage:
        start, masks = self.layout.before(layer), self.layout.reads(flat, layer)
        inputs = self._read(masks, buffer[:start])  # [J + 1, K, tokens, d]
        found, projected = self.parts.readers(layer, slice(self.readers))(inputs[:-1].flatten(1, 2))
        q, k, v = found.split([self.heads, self.groups, self.groups])
        attended = self._heads(layer, q, k, v, self.window, buffer[start : start + self.heads])
        mlp = self._mlp(flat, layer, inputs[-1], buffer, self.window)
        return Stage([projected], attended, mlp, [inputs])

    def _last_layer(self, flat: Tensor, all_tokens: Tensor, at_answers: Tensor) -> Stage:
        """Queries and MLP at answers only."""
        layer, start, heads = self.last, self.layout.before(self.last), self.heads
        masks = self.layout.reads(flat, layer)
        inputs = self._read(_without(masks, heads, self.readers), at_answers[:start])  # [H + 1, K, answers, d]
        keys_values = self._read(masks[:, heads : self.readers], all_tokens[:start])
        q, from_answers = self.parts.readers(layer, slice(heads))(inputs[:-1].flatten(1, 2))
        found, from_all = self.parts.readers(layer, slice(heads, self.readers))(keys_values.flatten(1, 2))
        k, v = found.split(self.groups)
        attended = self._heads(layer, q, k, v, self.places, at_answers[start : start + heads])
        mlp = self._mlp(flat, layer, inputs[-1], at_answers, self.places)
        return Stage([from_answers, from_all], attended, mlp, [inputs, keys_values])

    def _read(self, masks: Tensor, buffer: Tensor) -> Tensor:
        """masks [K, R, r], buffer [r, K, tokens, d] -> readers' inputs [R, K, tokens, d]."""
        found = self.space.take((masks.shape[1], *buffer.shape[1:]), buffer)
        for run, own in enumerate(masks):
            torch.mm(own, buffer[:, run].flatten(1), out=found[:, run].flatten(1))
        return found

    def _heads(self, layer: int, q: Tensor, k: Tensor, v: Tensor, places: Tensor, out: Tensor) -> Attended:
        """Projections [heads, tokens of all runs, h]; writes differences [H, K, tokens, d] to `out`."""
        parts, source, rows = self.parts, self.source, len(self.places)
        q, k, v = (x.unflatten(1, (rows, -1)) for x in (q, k, v))
        q, k = parts.turn(q, places), parts.turn(k, self.window)
        run, own = source.corrupted, parts.layers[layer]
        if run is not None and source.start:
            k = torch.cat([self._prefix(run.keys[layer]), k], 2)
            v = torch.cat([self._prefix(run.values[layer]), v], 2)
        mixed, attended = parts.attend(q, k, v, self.hidden[layer == self.last])
        if run is not None:
            other = run.mixed[layer] if layer == self.last else run.mixed[layer][:, :, source.start :]
            mixed = mixed.unflatten(1, (self.repeats, -1)) - other.unsqueeze(1)
        outputs = out.flatten(1, 2)
        torch.bmm(mixed.reshape(*outputs.shape[:2], -1), own.output, out=outputs)
        if run is None:
            outputs += own.output_bias / self.heads
        return attended

    def _prefix(self, x: Tensor) -> Tensor:
        """[G, M*B, P + T, h] -> [G, N, P, h]."""
        return x[:, :, : self.source.start].repeat(1, self.repeats, 1, 1)

    def _mlp(self, flat: Tensor, layer: int, x: Tensor, buffer: Tensor, places: Tensor) -> MlpSaved:
        """x [K, tokens, d] lacks what this layer's heads add; writes the difference to its row of the buffer."""
        source, parts = self.source, self.parts
        start, own = self.layout.before(layer), self.parts.layers[layer]
        run, stop = source.corrupted, start + self.heads
        if run is not None:
            self._by_copy(x).add_(self._of_layer(run.attention, layer))
        for inner, row, masks in zip(x, buffer[start:stop].unbind(1), self.layout.own_heads(flat, layer), strict=True):
            inner.view(-1).addmv_(row.flatten(1).T, masks)
        outer, saved = parts.mlp(layer, x.flatten(0, 1))
        out = buffer[stop]
        if run is None:
            out.copy_(own.mlp_output_bias.expand_as(out))
        else:
            torch.sub(
                own.mlp_output_bias,
                self._of_layer(run.mlp, layer).expand_as(self._by_copy(out)),
                out=self._by_copy(out),
            )
        out.flatten(0, 1).addmm_(outer, own.mlp_output)
        self.space.give(outer)
        return saved

    def _of_layer(self, states: list[Tensor], layer: int) -> Tensor:
        """What a run keeps of a layer, as the masked pass computes it: [1, M*B, T or A, d]."""
        return states[layer][None] if layer == self.last else states[layer][None, :, self.source.start :]

    def _windowed(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, self.source.start :]

    def _by_copy(self, x: Tensor) -> Tensor:
        """[K, tokens, d] -> [K/M, M*B, tokens of a row, d], a view."""
        return x.view(self.repeats, len(self.source.places), -1, x.shape[-1])

    def _set_always(self, row: Tensor, x: Tensor | None) -> None:
        """The buffer's row 0 [K, tokens, d] from [M*B, tokens of a row, d]."""
        if x is None:
            row.zero_()
        else:
            self._by_copy(row).copy_(x)

    def _spread(self, x: Tensor, rows: Tensor) -> None:
        for source, row in zip(x, rows, strict=False):
            self._set_always(row, source)

    # ---- the way back ----

    def backward(self, flat: Tensor, grad: Tensor) -> Tensor:
        """grad of the logits [N, A, V] -> of the masks [K, size]. Frees what was kept."""
        layout, first = self.layout, 1 + self.layout.num_embeddings
        found = torch.empty_like(flat)
        by_state = self.parts.head.backward(grad.flatten(0, 1), self.projected)
        by_state = by_state.view(1, *self.at_answers.shape[1:])
        _mask_gradients(by_state, self.at_answers, layout.last(found)[:, None])
        # a writer's gradient at answers: the last reader's share, and those of the last layer as they come
        at_answers = torch.mul(layout.last(flat).T[:, :, None, None], by_state, out=torch.empty_like(self.at_answers))
        buffer = self.space.take(self.all_tokens[first:].shape, flat)
        self._last_layer_backward(flat, at_answers, buffer, found)
        if self.outside is not None:
            at_answers.flatten(1, 2).masked_fill_(self.outside, 0.0)
        buffer.flatten(1, 2).index_add_(1, self.answers, at_answers[first : first + len(buffer)].flatten(1, 2))
        del at_answers, self.at_answers, self.projected
        for layer in reversed(range(self.last)):
            self._layer_backward(flat, layer, buffer, found)
        self.space.give(buffer, self.all_tokens)
        del self.all_tokens
        return found

    def _layer_backward(self, flat: Tensor, layer: int, buffer: Tensor, found: Tensor) -> None:
        """`buffer` holds the gradients of what writers of this layer and earlier ones put out."""
        stage, first = self.stages.pop(), 1 + self.layout.num_embeddings
        start, masks = self.layout.before(layer), self.layout.reads(flat, layer)
        own = buffer[start - first : start - first + self.heads + 1]
        inputs = self.space.take((self.readers + 1, *buffer.shape[1:]), flat)
        self._mlp_backward(flat, layer, own, self.all_tokens[start : start + self.heads], stage.mlp, inputs[-1], found)
        grads = self._heads_backward(layer, own[:-1], stage.attended, self.window)
        readers = self.parts.readers(layer, slice(self.readers))
        readers.backward(torch.cat(grads), stage.projected[0], inputs[:-1].flatten(1, 2))
        _mask_gradients(inputs, self.all_tokens[:start], self.layout.reads(found, layer))
        _push(masks[:, :, first:], inputs, buffer[: start - first])
        self.space.give(inputs, *stage.inputs)

    def _last_layer_backward(self, flat: Tensor, at_answers: Tensor, buffer: Tensor, found: Tensor) -> None:
        """Sets `buffer` to the keys' and values' share, and adds the rest to `at_answers`."""
        layer, stage, first = self.last, self.stages.pop(), 1 + self.layout.num_embeddings
        start, heads, parts = self.layout.before(self.last), self.heads, self.parts
        masks, own = self.layout.reads(flat, layer), at_answers[start : start + heads + 1]
        inputs = flat.new_empty(heads + 1, *at_answers.shape[1:])
        outputs = self.at_answers[start : start + heads]
        self._mlp_backward(flat, layer, own, outputs, stage.mlp, inputs[-1], found)
        by_q, by_k, by_v = self._heads_backward(layer, own[:-1], stage.attended, self.places)
        parts.readers(layer, slice(heads)).backward(by_q, stage.projected[0], inputs[:-1].flatten(1, 2))
        keys_values = parts.readers(layer, slice(heads, self.readers))
        others = self.space.take((2 * self.groups, *self.all_tokens.shape[1:]), flat)
        keys_values.backward(torch.cat([by_k, by_v]), stage.projected[1], others.flatten(1, 2))
        by_mask = self.layout.reads(found, layer)
        _mask_gradients(others, self.all_tokens, by_mask[:, heads : self.readers])
        few = by_mask.new_empty(len(by_mask), heads + 1, start)
        _mask_gradients(inputs, self.at_answers[:start], few)
        by_mask[:, :heads], by_mask[:, -1] = few[:, :-1], few[:, -1]
        _push(_without(masks, heads, self.readers)[:, :, first:], inputs, at_answers[first:start])
        _push(masks[:, heads : self.readers, first:], others, buffer, add=False)
        self.space.give(others, *stage.inputs)

    def _mlp_backward(
        self, flat: Tensor, layer: int, own: Tensor, outputs: Tensor, saved: MlpSaved, out: Tensor, found: Tensor
    ) -> None:
        """`own` [H + 1, K, tokens, d]: gradients of the layer's heads, which grow, and of its MLP. `outputs` of heads.
        Gradient of the MLP's input [K, tokens, d] to `out`."""
        self.parts.mlp_backward(layer, own[-1].flatten(0, 1), saved, out.flatten(0, 1))
        masks, by_mask = self.layout.own_heads(flat, layer), self.layout.own_heads(found, layer)
        for run, inner in enumerate(out.flatten(1)):
            torch.mv(outputs[:, run].flatten(1), inner, out=by_mask[run])
            own[:-1, run].flatten(1).addr_(masks[run], inner)

    def _heads_backward(self, layer: int, grad: Tensor, saved: Attended, places: Tensor) -> list[Tensor]:
        """grad [H, K, tokens, d] of what heads put out -> gradients of q, k, v [heads, tokens of all runs, h]."""
        parts, rows = self.parts, len(self.places)
        inner = torch.bmm(grad.flatten(1, 2), parts.layers[layer].output.mT).unflatten(1, (rows, -1))
        q, k, v = parts.attend_backward(inner, saved)
        k, v = (x[:, :, self.source.start :] for x in (k, v))
        return [x.flatten(1, 2) for x in (parts.turn(q, places, back=True), parts.turn(k, self.window, back=True), v)]


def _without(masks: Tensor, start: int, stop: int) -> Tensor:
    """[K, R, r], readers start to stop left out."""
    return torch.cat([masks[:, :start], masks[:, stop:]], 1)


def _mask_gradients(inputs: Tensor, buffer: Tensor, out: Tensor) -> None:
    """Gradients of inputs [R, K, tokens, d], buffer [r, K, tokens, d] -> of masks [K, R, r], to `out`."""
    for run, own in enumerate(out):
        torch.mm(inputs[:, run].flatten(1), buffer[:, run].flatten(1).T, out=own)


def _push(masks: Tensor, inputs: Tensor, buffer: Tensor, add: bool = True) -> None:
    """masks [K, R, r], gradients of inputs [R, K, tokens, d] -> added to those of writers [r, K, tokens, d]."""
    if not len(buffer):
        return
    for run, own in enumerate(masks):
        out = buffer[:, run].flatten(1)
        if add:
            out.addmm_(own.T, inputs[:, run].flatten(1))
        else:
            torch.mm(own.T, inputs[:, run].flatten(1), out=out)
