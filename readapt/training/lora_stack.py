"""Several adapters of one layout side by side on a model: one batched product instead of one small product each.

All values of an adapter are one row of an A x Z tensor, and so are its gradients. Clipping, AdamW and the pull treat
each adapter separately, yet each is one operation on rows. B is stored transposed, R x F: both passes run their skinny
products fastest in this layout. U in shapes here: the tokens of one adapter in the batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cluster.adapters.files import Adapter
from readapt.training.causal_lm import CausalLM

ALL_ROWS = slice(None)
Layout = tuple[tuple[str, tuple[int, int], int, bool], ...]  # of each module: path, shape (out, in), rank, is it DoRA


def layout_of(adapter: Adapter) -> Layout:
    """Return what two adapters must have in common to share a `LoraStack`."""
    return tuple((name, f.shape, f.rank, f.magnitude_F is not None) for name, f in adapter.factors.items())


def values_of(adapter: Adapter) -> Tensor:
    """Return all values of an adapter as one float32 vector [Z]: every A, every B transposed, every magnitude."""
    factors = adapter.factors.values()
    magnitudes = [f.magnitude_F for f in factors if f.magnitude_F is not None]
    tensors = [*(f.a_RD for f in factors), *(f.b_FR.T for f in factors), *magnitudes]
    return torch.cat([t.detach().reshape(-1).to(torch.float32) for t in tensors])


def _with_values(template: Adapter, values_Z: Tensor) -> Adapter:
    """Return the adapter whose `values_of` are `values_Z`, with the scalings, kind and base model of `template`."""
    a, b, magnitudes = _views(values_Z[None], template)
    factors = {
        name: replace(
            f,
            a_RD=a[name][0].clone(),
            b_FR=b[name][0].T.contiguous(),
            magnitude_F=magnitudes[name][0].clone() if name in magnitudes else None,
        )
        for name, f in template.factors.items()
    }
    return replace(template, factors=factors)


def _views(values_AZ: Tensor, template: Adapter) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return views of the rows by module: A [A, R, D], B transposed [A, R, F], and DoRA's magnitudes [A, F]."""
    a = {name: (f.rank, f.shape[1]) for name, f in template.factors.items()}
    b = {name: (f.rank, f.shape[0]) for name, f in template.factors.items()}
    magnitudes = {name: (f.shape[0],) for name, f in template.factors.items() if f.magnitude_F is not None}
    num_values = [torch.Size(shape).numel() for part in (a, b, magnitudes) for shape in part.values()]
    views = iter(values_AZ.split(num_values, dim=1))
    a_views, b_views, magnitude_views = (
        {name: next(views).unflatten(1, shape) for name, shape in part.items()} for part in (a, b, magnitudes)
    )
    return a_views, b_views, magnitude_views


@dataclass(frozen=True)
class StackedFactors:
    """One module's factors of all adapters of a stack. They are leaves of the autograd graph."""

    a_ARD: Tensor
    b_ARF: Tensor
    magnitude_AF: Tensor | None
    scaling_A11: Tensor

    def only(self, member: int) -> "StackedFactors":
        """Return the factors of one adapter, with A = 1."""
        chosen = slice(member, member + 1)
        magnitude_AF = None if self.magnitude_AF is None else self.magnitude_AF[chosen]
        return StackedFactors(self.a_ARD[chosen], self.b_ARF[chosen], magnitude_AF, self.scaling_A11[chosen])


class LoraStack:
    """The values of several adapters of one layout. Values change in place; the number of adapters is fixed.

    Row i of `values_AZ` is adapter i as `values_of` lays it out. `templates[i]` gives its layout, scalings and kind.
    """

    def __init__(self, templates: Sequence[Adapter], values_AZ: Tensor):
        assert len({layout_of(template) for template in templates}) == 1, "adapters of one layout"
        assert len(templates) == len(values_AZ)
        self._templates = tuple(templates)
        self.values_AZ = values_AZ
        parts = _views(values_AZ, templates[0])
        self._leaves = [{name: nn.Parameter(view) for name, view in part.items()} for part in parts]
        self.factors = {name: self._stacked(name) for name in templates[0].factors}

    def _stacked(self, name: str) -> StackedFactors:
        a, b, magnitudes = self._leaves
        scalings = [template.factors[name].scaling for template in self._templates]
        scaling_A11 = torch.tensor(scalings, device=self.values_AZ.device)[:, None, None]
        return StackedFactors(a[name], b[name], magnitudes.get(name), scaling_A11)

    def parameters(self) -> list[Tensor]:
        """Return every A [A, R, D], every B transposed [A, R, F], every magnitude [A, F], in order of the modules."""
        return [leaf for part in self._leaves for leaf in part.values()]

    def take_gradients(self) -> Tensor:
        """Return the gradients [A, Z] summed since the last call, in the layout of the values, and clear them."""
        leaves = self.parameters()
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)

    def adapter(self, member: int) -> Adapter:
        """Return a copy of one adapter on the CPU."""
        return _with_values(self._templates[member], self.values_AZ[member].cpu())


@dataclass(frozen=True)
class Segment:
    """Rows of a batch and the adapters they run: `member` of the stack, or all in equal shares if it is None."""

    stack: LoraStack
    rows: slice
    member: int | None = None

    def factors(self, module: str) -> StackedFactors:
        """Return the factors that these rows run at this module."""
        stacked = self.stack.factors[module]
        return stacked if self.member is None else stacked.only(self.member)


class LoraHooks:
    """The forward hooks that make the linears of a model also run the adapters of `segments`."""

    def __init__(self, model: CausalLM):
        self._model = model
        self._handles: dict[str, RemovableHandle] = {}
        self.segments: tuple[Segment, ...] = ()

    def set_modules(self, modules: Iterable[str]) -> None:
        """Put hooks on these modules and take them off all others."""
        wanted = set(modules)
        for name in self._handles.keys() - wanted:
            self._handles.pop(name).remove()
        for name in wanted - self._handles.keys():
            self._handles[name] = self._model.get_submodule(name).register_forward_hook(self._hook(name))

    @contextmanager
    def running(self, *segments: Segment) -> Iterator[None]:
        """Run these segments inside the block; outside it the model computes what the bare base computes."""
        self.segments = segments
        try:
            yield
        finally:
            self.segments = ()

    def _hook(self, name: str) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(linear: nn.Linear, inputs: tuple[Tensor, ...], y_BTF: Tensor) -> Tensor:
            parts = [(s.rows, s.factors(name)) for s in self.segments if name in s.stack.factors]
            return _adapted(linear, inputs[0], y_BTF, parts) if parts else y_BTF

        return hook


def _adapted(linear: nn.Linear, x_BTD: Tensor, y_BTF: Tensor, parts: Sequence[tuple[slice, StackedFactors]]) -> Tensor:
    rows = [part_rows for part_rows, _ in parts]
    scalings = [factors.scaling_A11 for _, factors in parts]
    y_BTF = _AddDelta.apply(y_BTF, x_BTD, rows, scalings, *(t for _, f in parts for t in (f.a_ARD, f.b_ARF)))
    if all(f.magnitude_AF is None for _, f in parts):
        return y_BTF
    gain_B1F = _gains(linear.weight, y_BTF, parts)
    return y_BTF * gain_B1F if linear.bias is None else (y_BTF - linear.bias) * gain_B1F + linear.bias


def _gains(weight_FD: Tensor, y_BTF: Tensor, parts: Sequence[tuple[slice, StackedFactors]]) -> Tensor:
    """Return DoRA's factor for each row's outputs, magnitude / norm; it is 1 in rows without DoRA."""
    gain_B1F = torch.ones_like(y_BTF[:, :1])
    for rows, factors in parts:
        if factors.magnitude_AF is not None:
            gain_AF = factors.magnitude_AF / _adapted_norms(weight_FD, factors)
            num_rows = len(gain_B1F[rows]) // len(gain_AF)
            gain_B1F[rows] = gain_AF.repeat_interleave(num_rows, dim=0)[:, None]
    return gain_B1F


@torch.no_grad()
def _adapted_norms(weight_FD: Tensor, factors: StackedFactors) -> Tensor:
    """Return the norm [A, F] of each row of W + scaling * B A. It is a constant to the gradient (DoRA, section 4.3).

    The sum is never formed: |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b for a row w of W and b of B.
    """
    a_ARD = factors.a_ARD
    b_ARF = factors.b_ARF * factors.scaling_A11
    cross_ARF = 2 * (a_ARD @ weight_FD.T) + (a_ARD @ a_ARD.mT) @ b_ARF
    return ((b_ARF * cross_ARF).sum(1) + weight_FD.square().sum(1)).clamp(min=0).sqrt()


class _AddDelta(torch.autograd.Function):
    """Add `scaling * x A^T B^T` to the rows of y in place, with each part's own factors.

    Written by hand because autograd's version of these products runs in slow layouts. `factors` are A and B of each
    part in turn.
    """

    @staticmethod
    def forward(
        ctx: Any, y_BTF: Tensor, x_BTD: Tensor, rows: list[slice], scalings: list[Tensor], *factors: Tensor
    ) -> Tensor:
        z_parts = []
        for part, scaling_A11, a_ARD, b_ARF in zip(rows, scalings, factors[::2], factors[1::2], strict=True):
            x_AUD = _by_adapter(x_BTD[part], len(a_ARD))
            z_ARU = (a_ARD @ x_AUD.mT).mul_(scaling_A11)
            y_BTF[part].view(*x_AUD.shape[:2], -1).baddbmm_(z_ARU.mT, b_ARF)
            z_parts.append(z_ARU)
        ctx.mark_dirty(y_BTF)
        ctx.save_for_backward(x_BTD, *factors, *z_parts)
        ctx.rows = rows
        ctx.scalings = scalings
        return y_BTF

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        [dy_BTF] = gradients
        x_BTD, *saved = ctx.saved_tensors
        num_parts = len(ctx.rows)
        a_parts = saved[:-num_parts:2]
        b_parts = saved[1:-num_parts:2]
        z_parts = saved[-num_parts:]
        dx_BTD = _empty_gradient(ctx.rows, x_BTD) if ctx.needs_input_grad[1] else None
        d_factors: list[Tensor] = []
        for part, scaling_A11, a_ARD, b_ARF, z_ARU in zip(
            ctx.rows, ctx.scalings, a_parts, b_parts, z_parts, strict=True
        ):
            x_AUD, dy_AUF = (_by_adapter(t[part], len(a_ARD)) for t in (x_BTD, dy_BTF))
            dz_ARU = (b_ARF @ dy_AUF.mT).mul_(scaling_A11)
            d_factors += [dz_ARU @ x_AUD, z_ARU @ dy_AUF]
            if dx_BTD is not None:
                torch.bmm(dz_ARU.mT, a_ARD, out=dx_BTD[part].view(x_AUD.shape))
        return dy_BTF, dx_BTD, None, None, *d_factors


def _by_adapter(rows_BTD: Tensor, num_adapters: int) -> Tensor:
    """Return the rows as [A, U, D]: equally many in turn for each adapter."""
    return rows_BTD.reshape(num_adapters, -1, rows_BTD.shape[-1])


def _empty_gradient(rows: Sequence[slice], x_BTD: Tensor) -> Tensor:
    """Return memory for the gradient of x, which is zero in rows that no part writes to."""
    is_covered = sum(len(range(*part.indices(len(x_BTD)))) for part in rows) == len(x_BTD)
    return x_BTD.new_empty(x_BTD.shape) if is_covered else x_BTD.new_zeros(x_BTD.shape)
