"""Parameters of a pack as rows of one flat buffer, and AdamW over its rows.

A row is [decayed | not decayed | not trained], so a run's optimizer step, gradient norm and checkpoint are each one
slice.
Tensors start at multiples of 64 bytes; the gap is zero and stays zero under AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from groundswell.experiment import AdamW
from groundswell.protocols import ParameterSpec

ALIGNMENT = 16  # elements: 64 bytes of float32, one cache line and one AVX-512 register


class FlatParameters:
    """K rows of P values with a named view [K, *shape] for each tensor; gradients accumulate into a twin buffer."""

    def __init__(self, specs: Sequence[ParameterSpec], flat: Tensor) -> None:
        """`specs` in any order; `flat` [K, P] with P from `layout`."""
        self.specs = list(specs)
        self.offsets, self.num_decayed, self.num_trained, self.row_size = layout(self.specs)
        self.flat = flat
        self.grad = torch.zeros_like(flat)
        self.views: dict[str, Tensor] = {}
        for spec in self.specs:
            view = self._slice(self.flat, spec).detach()  # shares memory, own autograd leaf
            if spec.trained:
                view.requires_grad_(True).grad = self._slice(self.grad, spec)
            self.views[spec.name] = view

    def _slice(self, buffer: Tensor, spec: ParameterSpec) -> Tensor:
        offset, size = self.offsets[spec.name], math.prod(spec.shape)
        return buffer[:, offset : offset + size].view(len(buffer), *spec.shape)

    def row(self, index: int) -> dict[str, Tensor]:
        """One run's tensors without the trial axis (views)."""
        return {name: view.detach()[index] for name, view in self.views.items()}

    def select(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """A sub-pack's tensors for evaluation: views when it is the whole pack, else copies."""
        if list(rows) == list(range(len(self.flat))):
            return {name: view.detach() for name, view in self.views.items()}
        return {name: view.detach()[list(rows)] for name, view in self.views.items()}


def layout(specs: Sequence[ParameterSpec]) -> tuple[dict[str, int], int, int, int]:
    """-> offset of each tensor, ends of the decayed and of the trained part, row size (in elements)."""
    decayed = [spec for spec in specs if spec.trained and spec.decayed]
    rest = [spec for spec in specs if spec.trained and not spec.decayed]
    offsets: dict[str, int] = {}
    ends, position = [], 0
    for part in (decayed, rest, [spec for spec in specs if not spec.trained]):
        for spec in part:
            offsets[spec.name] = position
            position += -(-math.prod(spec.shape) // ALIGNMENT) * ALIGNMENT
        ends.append(position)
    return offsets, ends[0], ends[1], ends[2]


def initial_row(specs: Sequence[ParameterSpec], generator: torch.Generator) -> Tensor:
    """Draw one run's parameters [P] in the order of `specs` (float32, CPU: equal on every device)."""
    offsets, *_, row_size = layout(specs)
    row = torch.zeros(row_size)
    for spec in specs:
        size = math.prod(spec.shape)
        target = row[offsets[spec.name] : offsets[spec.name] + size]
        if spec.init_std is None:
            target.fill_(spec.init_value)
        else:
            target.normal_(0.0, spec.init_std, generator=generator)
    return row


class PackedAdamW:
    """AdamW with its own settings in each row. Equal to torch.optim.AdamW with clip_grad_norm_ run by run."""

    def __init__(self, parameters: FlatParameters, settings: Sequence[AdamW], step: int = 0) -> None:
        self.parameters = parameters
        self.settings = list(settings)
        self.step_count = step  # updates done
        trained = slice(0, parameters.num_trained)
        self.flat, self.grad = parameters.flat.detach()[:, trained], parameters.grad[:, trained]
        self.exp_avg = torch.zeros_like(self.flat)
        self.exp_avg_sq = torch.zeros_like(self.flat)
        self.on_cpu = parameters.flat.device.type == "cpu"
        self._norm = torch.zeros(len(settings), device=parameters.flat.device, dtype=parameters.flat.dtype)
        self._clips = any(s.clip_norm for s in settings)
        self._clip_norm = self._column([s.clip_norm or math.inf for s in settings])
        if not self.on_cpu:
            self._place_scalars()

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.parameters.flat.device)[:, None]

    def _place_scalars(self) -> None:
        """Every number of the update on the device, so that a CUDA graph can hold the step."""
        settings, column = self.settings, self._column
        self._device_step = torch.tensor(float(self.step_count), device=self.parameters.flat.device)
        self._lr, self._decay = column([s.lr for s in settings]), column([s.weight_decay for s in settings])
        self._beta1, self._beta2 = column([s.beta1 for s in settings]), column([s.beta2 for s in settings])
        self._eps = column([s.eps for s in settings])
        self._warmup = column([float(s.warmup_steps) for s in settings])

    def set_step(self, step: int) -> None:
        """Continue the warm-up and the bias corrections after `step` updates."""
        self.step_count = step
        if not self.on_cpu:
            self._device_step.fill_(float(step))

    @torch.no_grad()
    def step(self) -> None:
        """Clip, then update. Update number s (from 0) uses lr * min(1, s / warmup_steps)."""
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
        """torch's fused kernel on each row: two calls a run (decayed part, rest)."""
        split = self.parameters.num_decayed
        count = torch.tensor(float(self.step_count + 1))
        for index, s in enumerate(self.settings):
            lr = s.lr * min(1.0, self.step_count / s.warmup_steps) if s.warmup_steps else s.lr
            for part, weight_decay in self._parts(split, s):
                torch._fused_adamw_(
                    [self.flat[index, part]], [self.grad[index, part]],
                    [self.exp_avg[index, part]], [self.exp_avg_sq[index, part]], [], [count],
                    lr=lr, beta1=s.beta1, beta2=s.beta2, weight_decay=weight_decay, eps=s.eps,
                    amsgrad=False, maximize=False,
                )  # fmt: skip

    @staticmethod
    def _parts(split: int, settings: AdamW) -> list[tuple[slice, float]]:
        """Parts of a row with the weight decay of each."""
        if settings.decay_all:
            return [(slice(None), settings.weight_decay)]
        return [(slice(0, split), settings.weight_decay), (slice(split, None), 0.0)]

    def _step_flat(self) -> None:
        """The same arithmetic as element-wise kernels over [K, P]; nothing is read back to the host."""
        split = None if self.settings[0].decay_all else self.parameters.num_decayed
        warm = torch.where(self._warmup > 0, self._device_step / self._warmup.clamp(min=1), torch.ones_like(self._lr))
        lr = self._lr * warm.clamp(max=1.0)
        self._device_step += 1
        self.flat[:, :split].mul_(1 - lr * self._decay)
        self.exp_avg.mul_(self._beta1).add_((1 - self._beta1) * self.grad)
        self.exp_avg_sq.mul_(self._beta2).add_((1 - self._beta2) * self.grad * self.grad)
        correction1 = 1 - self._beta1**self._device_step
        correction2 = (1 - self._beta2**self._device_step).sqrt()
        self.flat.sub_((lr / correction1) * self.exp_avg / (self.exp_avg_sq.sqrt() / correction2 + self._eps))
