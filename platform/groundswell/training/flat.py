"""Parameters of a pack as rows of one flat buffer, and AdamW over its rows.

A row is [decayed | not decayed] for each group of the optimizer, then [not trained], so a run's gradient norm and
checkpoint are each one slice and its optimizer step a few.
Tensors start at multiples of 64 bytes; the gap is zero and stays zero under AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from groundswell.experiment import AdamW
from groundswell.protocols import ParameterSpec, WeightReader

ALIGNMENT = 16  # elements: 64 bytes of float32, one cache line and one AVX-512 register


class FlatParameters:
    """K rows of P values with a named view [K, *shape] for each tensor; gradients of the trained ones accumulate into a
    buffer like it."""

    def __init__(self, specs: Sequence[ParameterSpec], flat: Tensor) -> None:
        """`specs` in any order; `flat` [K, P] with P from `layout`."""
        self.specs = list(specs)
        self.layout = layout(self.specs)
        self.num_trained = self.layout.num_trained
        self.flat = flat
        self.grad = flat.new_zeros(len(flat), self.num_trained)
        self.views: dict[str, Tensor] = {}
        for spec in self.specs:
            view = self._slice(self.flat, spec).detach()  # shares memory, own autograd leaf
            if spec.trained:
                view.requires_grad_(True).grad = self._slice(self.grad, spec)
            self.views[spec.name] = view

    def _slice(self, buffer: Tensor, spec: ParameterSpec) -> Tensor:
        offset, size = self.layout.offsets[spec.name], math.prod(spec.shape)
        return buffer[:, offset : offset + size].view(len(buffer), *spec.shape)

    def row(self, index: int) -> dict[str, Tensor]:
        """One run's tensors without the trial axis (views)."""
        return {name: view.detach()[index] for name, view in self.views.items()}

    def select(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """A sub-pack's tensors for evaluation: views when it is the whole pack, else copies."""
        if list(rows) == list(range(len(self.flat))):
            return {name: view.detach() for name, view in self.views.items()}
        return {name: view.detach()[list(rows)] for name, view in self.views.items()}


def assign_groups(specs: Sequence[ParameterSpec], optimizer: AdamW) -> list[ParameterSpec]:
    """The specs with the optimizer's groups: frozen ones are not trained."""
    settings = optimizer.group_settings()
    groups = [optimizer.group_of(spec.name) for spec in specs]
    return [
        replace(spec, group=group, trained=spec.trained and not settings[group].frozen)
        for spec, group in zip(specs, groups, strict=True)
    ]


@dataclass(frozen=True)
class Layout:
    """Where things are in a row, in elements."""

    offsets: dict[str, int]
    parts: list[tuple[slice, int, bool]]  # of the trained tensors: place, the optimizer's group, decayed
    num_trained: int  # end of the last part
    row_size: int


def layout(specs: Sequence[ParameterSpec]) -> Layout:
    offsets: dict[str, int] = {}
    position = 0

    def place(members: Sequence[ParameterSpec]) -> slice:
        nonlocal position
        start = position
        for spec in members:
            offsets[spec.name] = position
            position += -(-math.prod(spec.shape) // ALIGNMENT) * ALIGNMENT
        return slice(start, position)

    trained = [spec for spec in specs if spec.trained]
    kinds = sorted({(spec.group, not spec.decayed) for spec in trained})
    parts = [
        (place([s for s in trained if (s.group, not s.decayed) == (group, plain)]), group, not plain)
        for group, plain in kinds
    ]
    num_trained = position
    place([spec for spec in specs if not spec.trained])
    return Layout(offsets, parts, num_trained, position)


def initial_row(
    specs: Sequence[ParameterSpec], generator: torch.Generator, reader: WeightReader | None = None
) -> Tensor:
    """One run's parameters [P], float32 on the CPU: read, or drawn in the order of `specs` (equal on every device)."""
    where = layout(specs)
    row = torch.zeros(where.row_size)
    for spec in specs:
        start = where.offsets[spec.name]
        row[start : start + math.prod(spec.shape)] = initial_tensor(spec, generator, reader).flatten()
    return row


def initial_tensor(spec: ParameterSpec, generator: torch.Generator, reader: WeightReader | None = None) -> Tensor:
    """A tensor's initial values [*shape]. All specs must be drawn in order, even by who keeps only a part of each."""
    if reader is not None and (found := reader.read(spec.name)) is not None:
        return found
    if spec.init_std is None:
        return torch.full(spec.shape, spec.init_value)
    return torch.empty(spec.shape).normal_(spec.init_value, spec.init_std, generator=generator)


class PackedAdamW:
    """AdamW with its own settings in each row. Equal to torch.optim.AdamW with clip_grad_norm_ run by run."""

    def __init__(
        self,
        parameters: FlatParameters,
        settings: Sequence[AdamW],
        total_updates: int = 1,
        step: int = 0,
        timed: bool = False,
    ) -> None:
        """`total_updates` of the whole run, for the learning rate's schedule; `step`: updates done; `timed`: the
        schedule goes by what `set_done` is told, instead of by updates."""
        self.parameters = parameters
        self.settings = list(settings)
        self.total_updates = total_updates
        self.step_count = step
        self._starts = [0] * len(settings)  # the update at which each row's moments began
        self._done: float | None = 0.0 if timed else None
        trained = slice(0, parameters.num_trained)
        self.flat, self.grad = parameters.flat.detach()[:, trained], parameters.grad
        self.exp_avg = torch.zeros_like(self.flat)
        self.exp_avg_sq = torch.zeros_like(self.flat)
        self.on_cpu = parameters.flat.device.type == "cpu"
        self._norm = torch.zeros(len(settings), device=parameters.flat.device, dtype=parameters.flat.dtype)
        self._clips = any(s.clip_norm for s in settings)
        self._clip_norm = self._column([s.clip_norm or math.inf for s in settings])
        self._parts = [_parts(parameters.layout, s) for s in self.settings]
        if not self.on_cpu:
            self._place_scalars()

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.parameters.flat.device)[:, None]

    def _place_scalars(self) -> None:
        """Every number of the update on the device, so that a CUDA graph can hold the step."""
        settings, column = self.settings, self._column
        self._device_step = torch.tensor(float(self.step_count), device=self.parameters.flat.device)
        self._device_starts = torch.zeros(len(settings), 1, device=self.parameters.flat.device)
        self._device_done = torch.zeros((), device=self.parameters.flat.device)
        self._beta1, self._beta2 = column([s.beta1 for s in settings]), column([s.beta2 for s in settings])
        self._eps = column([s.eps for s in settings])
        self._warmup = column([float(s.warmup_steps) for s in settings])
        self._device_parts = [
            (alike[0].place, column([p.lr for p in alike]), column([p.weight_decay for p in alike]), alike[0].ascent)
            for alike in zip(*self._parts, strict=True)
        ]

    def set_step(self, step: int) -> None:
        """Continue the warm-up and the bias corrections after `step` updates."""
        self.step_count = step
        if not self.on_cpu:
            self._device_step.fill_(float(step))

    def set_start(self, row: int, start: int) -> None:
        """Before an update: the row's moments reach back to number `start`. Where that is this update, they are
        forgotten."""
        if start == self._starts[row]:
            return
        self._starts[row] = start
        if start == self.step_count:
            self.exp_avg[row].zero_()
            self.exp_avg_sq[row].zero_()
        if not self.on_cpu:
            self._device_starts[row] = float(start)

    def set_done(self, done: float) -> None:
        """Before an update: which part of the budget is done."""
        self._done = done
        if not self.on_cpu:
            self._device_done.fill_(done)

    @torch.no_grad()
    def step(self) -> None:
        """Clip, then update with the rates times `AdamW.lr_factor`."""
        if self._clips:
            self._norm = self._gradient_norm()
            self.grad.mul_((self._clip_norm.to(self.grad.dtype) / (self._norm[:, None] + 1e-6)).clamp_(max=1.0))
        if self.on_cpu:
            self._step_rows()
        else:
            self._step_flat()
        self.step_count += 1

    def _gradient_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.grad, dim=1)

    @property
    def grad_norm(self) -> Tensor:
        """Norms [K] of the last update's gradients, before clipping."""
        return self._norm if self._clips else self._gradient_norm()

    def _step_rows(self) -> None:
        """torch's fused kernel on each part of each row."""
        for index, (s, parts) in enumerate(zip(self.settings, self._parts, strict=True)):
            factor = s.lr_factor(self.step_count, self.total_updates, self._done)
            count = torch.tensor(float(self.step_count + 1 - self._starts[index]))
            for part in parts:
                place = part.place
                torch._fused_adamw_(
                    [self.flat[index, place]], [self.grad[index, place]],
                    [self.exp_avg[index, place]], [self.exp_avg_sq[index, place]], [], [count],
                    lr=part.lr * factor, beta1=s.beta1, beta2=s.beta2, weight_decay=part.weight_decay, eps=s.eps,
                    amsgrad=False, maximize=part.ascent,
                )  # fmt: skip

    def _step_flat(self) -> None:
        """The same arithmetic as element-wise kernels over [K, P]; nothing is read back to the host."""
        factor = self._device_factor()
        self._device_step += 1
        for place, lr, weight_decay, ascent in self._device_parts:
            self.flat[:, place].mul_(1 - lr * factor * weight_decay)
            if ascent:
                self.grad[:, place].neg_()
        self.exp_avg.mul_(self._beta1).add_((1 - self._beta1) * self.grad)
        self.exp_avg_sq.mul_(self._beta2).add_((1 - self._beta2) * self.grad * self.grad)
        count = self._device_step - self._device_starts
        correction1 = 1 - self._beta1**count
        correction2 = (1 - self._beta2**count).sqrt()
        for place, lr, _, _ in self._device_parts:
            root = self.exp_avg_sq[:, place].sqrt() / correction2 + self._eps
            self.flat[:, place].sub_((lr * factor / correction1) * self.exp_avg[:, place] / root)

    def _device_factor(self) -> Tensor:
        """`AdamW.lr_factor` of each run [K, 1], computed on the device."""
        step, first = self._device_step, self.settings[0]  # the schedule is the same in a whole pack
        warm = torch.where(self._warmup > 0, step / self._warmup.clamp(min=1), torch.ones_like(self._warmup))
        if first.schedule == "constant":
            return warm.clamp(max=1.0)
        done = (step - self._warmup) / (self.total_updates - self._warmup).clamp(min=1)
        done = (done if self._done is None else self._device_done.expand_as(done)).clamp(0.0, 1.0)
        final, rise, fall = first.final_lr, first.warmup_fraction, first.cooldown_fraction
        if first.schedule == "trapezoid":
            curve = ((1.0 - done) / max(fall, 1e-12)).clamp(max=1.0)
            return torch.where(done < rise, done / max(rise, 1e-12), final + (1.0 - final) * curve)
        curve = 1.0 - done if first.schedule == "linear" else 0.5 * (1.0 + torch.cos(math.pi * done))
        return torch.where(step < self._warmup, warm, final + (1.0 - final) * curve)


@dataclass(frozen=True)
class _Part:
    """A stretch of one run's row with settings of its own."""

    place: slice
    lr: float
    weight_decay: float
    ascent: bool


def _parts(where: Layout, settings: AdamW) -> list[_Part]:
    groups = settings.group_settings()
    parts: list[_Part] = []
    for place, group, decayed in where.parts:
        g = groups[group]
        weight_decay = g.weight_decay if decayed or settings.decay_all else 0.0
        part = _Part(place, g.lr or settings.lr, weight_decay or 0.0, g.ascent)
        last = parts[-1] if parts else None
        if settings.decay_all and last and replace(last, place=place) == part:  # one kernel call instead of two
            parts[-1] = replace(part, place=slice(last.place.start, place.stop))
        else:
            parts.append(part)
    return parts
