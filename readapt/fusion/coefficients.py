"""Many candidates of a fusion in one forward pass: the factors of each module once, coefficients per candidate.

    y_i = W' x_i + alpha_i s B_T (A_T x_i) + beta_i B_E (A_E x_i)

A batch has the same rows in the same order for each candidate, one candidate after the other. Uncut, all candidates
share the A of their module, and B holds the coefficients. Cut to a rank, each candidate has its own A.

One forward pass for all candidates saves launches and changes of adapter. It does not save arithmetic: activations
differ from the first adapted module on. T in shapes here: all tokens of one candidate, with their padding.
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
    """What C candidates add to one module. With DoRA, `scale_CF` (magnitude / norm of the sum) scales the result."""

    a_R2D: Tensor  # or C x R2 x D
    b_CFR2: Tensor
    scale_CF: Tensor | None = None

    def add_to(self, y: Tensor, x: Tensor, bias_F: Tensor | None) -> Tensor:
        """Return the module's output for all candidates, from its own output `y` [B, T, F] and input `x` [B, T, D]."""
        x_CTD = x.reshape(len(self.b_CFR2), -1, x.shape[-1])
        y_CTF = y.reshape(len(self.b_CFR2), -1, y.shape[-1])
        if self.scale_CF is None:
            return torch.baddbmm(y_CTF, x_CTD @ self.a_R2D.mT, self.b_CFR2.mT).view(y.shape)
        offset_F = torch.zeros_like(y_CTF[0, 0]) if bias_F is None else bias_F
        y_CTF = torch.baddbmm(y_CTF - offset_F, x_CTD @ self.a_R2D.mT, self.b_CFR2.mT)
        return (y_CTF * self.scale_CF[:, None, :] + offset_F).view(y.shape)


def deltas(terms: FusionTerms, weight_FD: Tensor, pairs_C2: Tensor, rank: Rank) -> Deltas:
    """Return what the candidates at these (alpha, beta) add, cut to `rank` as `Fusion.at` cuts it (None: uncut).

    Differentiable in `pairs_C2`; DoRA's norm counts as constant, as in its training. Without a gradient the sums have
    only as many terms as `rank` says.
    """
    if rank is None:
        a_R2D, b_CFR2 = terms.whole(pairs_C2)
    else:
        cut = terms.cut if pairs_C2.requires_grad else terms.factors
        a_R2D, b_CFR2 = cut(pairs_C2, terms.num_terms(rank))
    return Deltas(a_R2D, b_CFR2, _dora_scale(terms, weight_FD, a_R2D, b_CFR2))


@torch.no_grad()
def _dora_scale(terms: FusionTerms, weight_FD: Tensor, a_R2D: Tensor, b_CFR2: Tensor) -> Tensor | None:
    if terms.task.magnitude_F is None:
        return None
    a_CR2D = a_R2D.expand(len(b_CFR2), -1, -1)
    norms = [(weight_FD + b_FR2 @ a_R2D).norm(dim=1) for a_R2D, b_FR2 in zip(a_CR2D, b_CFR2, strict=True)]
    return terms.task.magnitude_F / torch.stack(norms)


@contextlib.contextmanager
def installed(model: CausalLM, deltas_by_module: Mapping[str, Deltas]) -> Iterator[None]:
    """Add the candidates' deltas, by module path, to a bare model inside the block. It is bare again afterwards."""
    handles = [
        model.get_submodule(name).register_forward_hook(_hook(added)) for name, added in deltas_by_module.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(added: Deltas) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Linear, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return added.add_to(y, inputs[0], module.bias)

    return hook
