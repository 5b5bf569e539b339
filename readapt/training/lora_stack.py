"""Adapters of one layout side by side on a model: one batched product where there would be K small ones.

All values of an adapter are one row of a K x N tensor, and so are its gradients: whatever is done to each adapter on
its own (clipping, AdamW, the pull) is one operation on rows. B lies transposed, R x F, which is how the skinny products
of both passes run fastest. Shape letters: K adapters, N values of one adapter, B rows of the batch, T tokens, M tokens
of one adapter in the batch, D in, F out, R rank.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cluster.adapter_files import Adapter
from readapt.training.causal_lm import CausalLM

ALL_ROWS = slice(None)
Layout = tuple[tuple[str, tuple[int, int], int, bool], ...]  # by module: path, shape (out, in), rank, is it DoRA


def layout_of(adapter: Adapter) -> Layout:
    """What two adapters must have in common to be stacked."""
    return tuple((name, f.shape, f.rank, f.magnitude_F is not None) for name, f in adapter.factors.items())


def flatten(adapter: Adapter) -> Tensor:
    """All values of an adapter as one float32 vector [N]: every A, then every B transposed, then every magnitude."""
    factors = adapter.factors.values()
    magnitudes = [f.magnitude_F for f in factors if f.magnitude_F is not None]
    tensors = [*(f.a_RD for f in factors), *(f.b_FR.T for f in factors), *magnitudes]
    return torch.cat([t.detach().reshape(-1).to(torch.float32) for t in tensors])


def _unflatten(vector_N: Tensor, like: Adapter) -> Adapter:
    """The adapter whose `flatten` is this vector; what is not a value (scalings, kind, base model) is from `like`."""
    a, b, magnitudes = _split(vector_N[None], like)
    factors = {
        name: replace(
            f,
            a_RD=a[name][0].clone(),
            b_FR=b[name][0].T.contiguous(),
            magnitude_F=magnitudes[name][0].clone() if name in magnitudes else None,
        )
        for name, f in like.factors.items()
    }
    return replace(like, factors=factors)


def _split(values_KN: Tensor, like: Adapter) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Views of the rows, by module: A [K, R, D], B transposed [K, R, F], and the magnitudes [K, F] where there are."""
    a = {name: (f.rank, f.shape[1]) for name, f in like.factors.items()}
    b = {name: (f.rank, f.shape[0]) for name, f in like.factors.items()}
    magnitudes = {name: (f.shape[0],) for name, f in like.factors.items() if f.magnitude_F is not None}
    num_values = [torch.Size(shape).numel() for part in (a, b, magnitudes) for shape in part.values()]
    views = iter(values_KN.split(num_values, dim=1))
    a_views, b_views, magnitude_views = (
        {name: next(views).unflatten(1, shape) for name, shape in part.items()} for part in (a, b, magnitudes)
    )
    return a_views, b_views, magnitude_views


@dataclass(frozen=True)
class StackedFactors:
    """One module's factors of all adapters of a stack, as leaves of the autograd graph."""

    a_KRD: Tensor
    b_KRF: Tensor
    magnitude_KF: Tensor | None
    scaling_K11: Tensor

    def only(self, member: int) -> "StackedFactors":
        """The same for one adapter; K is then 1."""
        chosen = slice(member, member + 1)
        magnitude_KF = None if self.magnitude_KF is None else self.magnitude_KF[chosen]
        return StackedFactors(self.a_KRD[chosen], self.b_KRF[chosen], magnitude_KF, self.scaling_K11[chosen])


class LoraStack:
    """Owner of the values of K adapters of one layout. Values change in place; the number of adapters does not.

    `likes` say what is not a value: layout, scalings, kind. Row k of `values_KN` is adapter k as `flatten` lays it out.
    """

    def __init__(self, likes: Sequence[Adapter], values_KN: Tensor):
        assert len({layout_of(like) for like in likes}) == 1, "adapters of one layout"
        assert len(likes) == len(values_KN)
        self._likes = tuple(likes)
        self.values_KN = values_KN
        self._leaves = [{n: nn.Parameter(view) for n, view in part.items()} for part in _split(values_KN, likes[0])]
        self.factors = {name: self._stacked(name) for name in likes[0].factors}

    def _stacked(self, name: str) -> StackedFactors:
        a, b, magnitudes = self._leaves
        scalings = [like.factors[name].scaling for like in self._likes]
        scaling_K11 = torch.tensor(scalings, device=self.values_KN.device)[:, None, None]
        return StackedFactors(a[name], b[name], magnitudes.get(name), scaling_K11)

    def parameters(self) -> list[Tensor]:
        """Every A [K, R, D], every B transposed [K, R, F], every magnitude [K, F]; in order of the modules' paths."""
        return [leaf for part in self._leaves for leaf in part.values()]

    def take_gradients(self) -> Tensor:
        """Gradients [K, N] of all backward passes since the last call, laid out as the values."""
        leaves = self.parameters()
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)

    def adapter(self, member: int) -> Adapter:
        """A copy of one adapter as it is now, on the CPU."""
        return _unflatten(self.values_KN[member].cpu(), self._likes[member])


@dataclass(frozen=True)
class Segment:
    """Which rows of a batch go through which adapters: one `member` of the stack, or (None) all, in equal shares."""

    stack: LoraStack
    rows: slice
    member: int | None = None

    def factors(self, module: str) -> StackedFactors:
        """What the rows go through at this module."""
        stacked = self.stack.factors[module]
        return stacked if self.member is None else stacked.only(self.member)


class LoraHooks:
    """Owner of the forward hooks by which the linears of a model also run the adapters of `segments`."""

    def __init__(self, model: CausalLM):
        self._model = model
        self._handles: dict[str, RemovableHandle] = {}
        self.segments: tuple[Segment, ...] = ()

    def cover(self, modules: Iterable[str]) -> None:
        """Hooks these modules and no others."""
        wanted = set(modules)
        for name in self._handles.keys() - wanted:
            self._handles.pop(name).remove()
        for name in wanted - self._handles.keys():
            self._handles[name] = self._model.get_submodule(name).register_forward_hook(self._hook(name))

    @contextmanager
    def running(self, *segments: Segment) -> Iterator[None]:
        """Within it the model runs these segments; outside it is bare."""
        self.segments = segments
        try:
            yield
        finally:
            self.segments = ()

    def _hook(self, name: str) -> Any:
        def hook(linear: nn.Linear, inputs: tuple[Tensor, ...], y_BTF: Tensor) -> Tensor:
            parts = [(s.rows, s.factors(name)) for s in self.segments if name in s.stack.factors]
            return _adapted(linear, inputs[0], y_BTF, parts) if parts else y_BTF

        return hook


def _adapted(linear: nn.Linear, x_BTD: Tensor, y_BTF: Tensor, parts: Sequence[tuple[slice, StackedFactors]]) -> Tensor:
    rows, scalings = [r for r, _ in parts], [f.scaling_K11 for _, f in parts]
    y_BTF = _AddDelta.apply(y_BTF, x_BTD, rows, scalings, *(t for _, f in parts for t in (f.a_KRD, f.b_KRF)))
    if all(f.magnitude_KF is None for _, f in parts):
        return y_BTF
    gain_B1F = _gains(linear.weight, y_BTF, parts)
    return y_BTF * gain_B1F if linear.bias is None else (y_BTF - linear.bias) * gain_B1F + linear.bias


def _gains(weight_FD: Tensor, y_BTF: Tensor, parts: Sequence[tuple[slice, StackedFactors]]) -> Tensor:
    """What DoRA multiplies each row's outputs by: magnitude over norm; 1 in rows without DoRA."""
    gain_B1F = torch.ones_like(y_BTF[:, :1])
    for rows, factors in parts:
        if factors.magnitude_KF is not None:
            gain_KF = factors.magnitude_KF / _adapted_norms(weight_FD, factors)
            num_rows = len(gain_B1F[rows]) // len(gain_KF)
            gain_B1F[rows] = gain_KF.repeat_interleave(num_rows, dim=0)[:, None]
    return gain_B1F


@torch.no_grad()
def _adapted_norms(weight_FD: Tensor, factors: StackedFactors) -> Tensor:
    """Norm [K, F] of each row of W + scaling * B A, without forming it; a constant to the gradient (DoRA, section 4.3).

    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b for a row w of W and b of B.
    """
    a_KRD, b_KRF = factors.a_KRD, factors.b_KRF * factors.scaling_K11
    cross_KRF = 2 * (a_KRD @ weight_FD.T) + (a_KRD @ a_KRD.mT) @ b_KRF
    return ((b_KRF * cross_KRF).sum(1) + weight_FD.square().sum(1)).clamp(min=0).sqrt()


class _AddDelta(torch.autograd.Function):
    """Adds `scaling * x A^T B^T` to the rows of y in place, each part with its own factors.

    By hand, because what autograd makes of these products runs in slow layouts. `factors`: A and B of each part.
    """

    @staticmethod
    def forward(
        ctx: Any, y_BTF: Tensor, x_BTD: Tensor, rows: list[slice], scalings: list[Tensor], *factors: Tensor
    ) -> Tensor:
        z_parts = []
        for part, scaling_K11, a_KRD, b_KRF in zip(rows, scalings, factors[::2], factors[1::2], strict=True):
            x_KMD = _by_adapter(x_BTD[part], len(a_KRD))
            z_KRM = (a_KRD @ x_KMD.mT).mul_(scaling_K11)
            y_BTF[part].view(*x_KMD.shape[:2], -1).baddbmm_(z_KRM.mT, b_KRF)
            z_parts.append(z_KRM)
        ctx.mark_dirty(y_BTF)
        ctx.save_for_backward(x_BTD, *factors, *z_parts)
        ctx.rows, ctx.scalings = rows, scalings
        return y_BTF

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        [dy_BTF], (x_BTD, *saved), num_parts = gradients, ctx.saved_tensors, len(ctx.rows)
        a_parts, b_parts, z_parts = saved[:-num_parts:2], saved[1:-num_parts:2], saved[-num_parts:]
        dx_BTD = _room_for(ctx.rows, x_BTD) if ctx.needs_input_grad[1] else None
        d_factors: list[Tensor] = []
        for part, scaling_K11, a_KRD, b_KRF, z_KRM in zip(
            ctx.rows, ctx.scalings, a_parts, b_parts, z_parts, strict=True
        ):
            x_KMD, dy_KMF = (_by_adapter(t[part], len(a_KRD)) for t in (x_BTD, dy_BTF))
            dz_KRM = (b_KRF @ dy_KMF.mT).mul_(scaling_K11)
            d_factors += [dz_KRM @ x_KMD, z_KRM @ dy_KMF]
            if dx_BTD is not None:
                torch.bmm(dz_KRM.mT, a_KRD, out=dx_BTD[part].view(x_KMD.shape))
        return dy_BTF, dx_BTD, None, None, *d_factors


def _by_adapter(rows_BTD: Tensor, num_adapters: int) -> Tensor:
    """[K, M, D]: the rows shared out evenly among the adapters, in order."""
    return rows_BTD.reshape(num_adapters, -1, rows_BTD.shape[-1])


def _room_for(rows: Sequence[slice], x_BTD: Tensor) -> Tensor:
    """For the gradient of x: zero where no part will write."""
    is_covered = sum(len(range(*part.indices(len(x_BTD)))) for part in rows) == len(x_BTD)
    return x_BTD.new_empty(x_BTD.shape) if is_covered else x_BTD.new_zeros(x_BTD.shape)
