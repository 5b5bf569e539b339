"""Many candidates of a fusion in one forward: every module's factors once, coefficients by candidate.

    y_i = W' x_i + alpha_i s B_T (A_T x_i) + beta_i B_E (A_E x_i)

Rows come candidate after candidate, each with the same rows in the same order. Uncut, all candidates share the A of
their module, and B holds the coefficients; cut to a rank, each has its own. A forward saves the launches of one forward
for each candidate and its change of adapter, not its arithmetic: activations differ from the first adapted module on.

Shape letters: C candidates, M rows x tokens of one candidate, D in, F out, K terms (those of a cut to a rank, too).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from readapt.fusion.fuse import FusionTerms, Rank
from readapt.training.causal_lm import CausalLM


@dataclass(frozen=True)
class Deltas:
    """What C candidates add to one module. DoRA's `scale_CF` (magnitude / norm of the sum) multiplies the result."""

    a_KD: Tensor  # or C x K x D
    b_CFK: Tensor
    scale_CF: Tensor | None = None

    def add_to(self, y: Tensor, x: Tensor, bias_F: Tensor | None) -> Tensor:
        """The module's output for all candidates' rows, from its own output `y` and input `x`, rows first."""
        x_CMD = x.reshape(len(self.b_CFK), -1, x.shape[-1])
        y_CMF = y.reshape(len(self.b_CFK), -1, y.shape[-1])
        if self.scale_CF is None:
            return torch.baddbmm(y_CMF, x_CMD @ self.a_KD.mT, self.b_CFK.mT).view(y.shape)
        offset_F = torch.zeros_like(y_CMF[0, 0]) if bias_F is None else bias_F
        y_CMF = torch.baddbmm(y_CMF - offset_F, x_CMD @ self.a_KD.mT, self.b_CFK.mT)
        return (y_CMF * self.scale_CF[:, None, :] + offset_F).view(y.shape)


def deltas(stack: FusionTerms, weight_FD: Tensor, pairs_C2: Tensor, rank: Rank) -> Deltas:
    """The sums at the candidates' (alpha, beta), cut to `rank` as `Fusion.at` cuts them; None is uncut.

    Differentiable in `pairs_C2`; DoRA's norm is taken as constant, as in its training. Where no gradient is wanted, the
    sums have as few terms as `rank` says.
    """
    if rank is None:
        a_KD, b_CFK = stack.whole(pairs_C2)
    else:
        cut = stack.cut if pairs_C2.requires_grad else stack.factors
        a_KD, b_CFK = cut(pairs_C2, stack.num_terms(rank))
    return Deltas(a_KD, b_CFK, _dora_scale(stack, weight_FD, a_KD, b_CFK))


@torch.no_grad()
def _dora_scale(stack: FusionTerms, weight_FD: Tensor, a_KD: Tensor, b_CFK: Tensor) -> Tensor | None:
    if stack.task.magnitude_F is None:
        return None
    each_a_CKD = a_KD.expand(len(b_CFK), -1, -1)
    norms = [(weight_FD + b_FK @ a_KD).norm(dim=1) for a_KD, b_FK in zip(each_a_CKD, b_CFK, strict=True)]
    return stack.task.magnitude_F / torch.stack(norms)


@contextlib.contextmanager
def installed(model: CausalLM, found: Mapping[str, Deltas]) -> Iterator[None]:
    """Adds the candidates' deltas, by module path, on a bare model, which is bare again afterwards."""
    handles = [model.get_submodule(name).register_forward_hook(_hook(added)) for name, added in found.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(added: Deltas) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Linear, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return added.add_to(y, inputs[0], module.bias)

    return hook
