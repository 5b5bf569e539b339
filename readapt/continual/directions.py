"""An adapter as frozen directions with learned magnitudes, and one fresh direction under training.

    h' = (W_0 + sum over n < t of alpha_n D_n + alpha_t unit(B_t A_t)) x        (SD-LoRA, arXiv 2501.13198)

A direction D_n is an adapter with scaling 1. A learned direction has a mean squared Frobenius norm of 1 over its
modules. Norms are computed from the factors and never from the F x D matrix: ||B A||^2 = sum((B^T B) * (A A^T)).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from cluster.adapters.files import Adapter, LoraFactors, check_fits
from cluster.errors import InvalidAdapterError
from readapt.fusion.fuse import Fusion
from readapt.fusion.points import Point

Normaliser = Literal["product", "factors"]


@dataclass(frozen=True, eq=False)
class Decoupled:
    """An adapter as a sum of magnitude times direction. Directions have scaling 1 and may lack modules.

    `inputs` holds sketches of the modules' inputs over all stages (see `moments`). `classes` holds statistics of the
    classes of all stages (see `recall`). Both are empty unless the method of the last stage maintains them. If
    `has_readout`, the last direction is recall's readout, which the next recall stage replaces.
    """

    directions: tuple[Adapter, ...] = ()
    magnitudes: tuple[float, ...] = ()
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    classes: Mapping[str, Tensor] = field(default_factory=dict)
    has_readout: bool = False

    def __post_init__(self) -> None:
        assert len(self.directions) == len(self.magnitudes), "each direction needs one magnitude"

    @property
    def num_parameters(self) -> int:
        """The number of values in all factors, plus the magnitudes."""
        factors = [factors for direction in self.directions for factors in direction.factors.values()]
        return sum(f.a_RD.numel() + f.b_FR.numel() for f in factors) + len(self.magnitudes)


@dataclass(frozen=True)
class DirectionSettings:
    """How the fresh direction is normalised, and what is trained. The defaults follow the paper.

    `normaliser` is ||B A||_F ("product", the paper) or ||A||_F ||B||_F ("factors", the released code). The released
    code also leaves the direction under training as it is (`is_fresh_unit` false).

    `floor` enters the norm as sqrt(norm^2 + floor^2). B starts at zero, which has no unit vector. With a floor the
    direction grows to its full length over the first steps and does not jump there at once. The exported direction has
    no floor and computes the same function.
    """

    normaliser: Normaliser = "product"
    is_fresh_unit: bool = True
    floor: float = 0.1
    learns_old_magnitudes: bool = True
    learns_rows: bool = True


PAPER = DirectionSettings()
"""The settings of the paper."""


def inner(left: LoraFactors, right: LoraFactors) -> Tensor:
    """Return the Frobenius inner product of two modules' deltas. It is differentiable and never forms the deltas."""
    product = (left.b_FR.T @ right.b_FR) * (left.a_RD @ right.a_RD.T)
    return product.sum() * (left.scaling * right.scaling)


def norm_of(factors: LoraFactors, normaliser: Normaliser) -> Tensor:
    """Return the norm that a direction is divided by."""
    if normaliser == "factors":
        return factors.a_RD.norm() * factors.b_FR.norm() * abs(factors.scaling)
    return inner(factors, factors).clamp_min(0.0).sqrt()


def decouple(adapter: Adapter) -> Decoupled:
    """Return an ordinary adapter as one direction, which keeps the proportions of its modules, and one magnitude.

    The direction's mean squared norm over the modules is 1. An adapter that adds nothing becomes a state without
    directions. Raises InvalidAdapterError for DoRA, which is not a sum of directions.
    """
    if adapter.is_dora:
        raise InvalidAdapterError("Continual learning needs a plain LoRA: a DoRA adapter is not a sum of directions.")
    squares = [float(inner(factors, factors)) for factors in adapter.factors.values()]
    magnitude = (sum(squares) / max(1, len(squares))) ** 0.5
    if magnitude == 0.0:
        return Decoupled()
    return Decoupled((_scaled(adapter, 1.0 / magnitude),), (magnitude,))


def _scaled(adapter: Adapter, by: float) -> Adapter:
    """Return the adapter times a number, with scaling 1 and factors of equal norm."""
    return Adapter({name: _balanced(factors, by) for name, factors in adapter.factors.items()})


def _balanced(factors: LoraFactors, by: float) -> LoraFactors:
    a_norm, b_norm = float(factors.a_RD.norm()), float(factors.b_FR.norm())
    ratio = (b_norm / a_norm) ** 0.5 if a_norm and b_norm else 1.0
    size = abs(factors.scaling * by) ** 0.5
    sign = -1.0 if factors.scaling * by < 0 else 1.0
    return LoraFactors(factors.a_RD * (size * ratio), factors.b_FR * (sign * size / ratio), 1.0)


def fold(state: Decoupled, rank: int | None = None) -> Adapter:
    """Return the ordinary adapter that computes the same: directions are concatenated, magnitudes multiplied into B.

    With `rank`, every module is truncated to its best approximation of that rank (QR and a small SVD).
    """
    assert state.directions, "a state without directions cannot be folded"
    modules = sorted({module for direction in state.directions for module in direction.factors})
    whole = Adapter({module: _concatenated(state, module) for module in modules})
    return whole if rank is None else Fusion(whole, Adapter({})).at(Point(1.0, 0.0), rank)


def _concatenated(state: Decoupled, module: str) -> LoraFactors:
    a_R2D, b_FR2, index_R2 = _stacked(state.directions, module)
    return LoraFactors(a_R2D, b_FR2 * torch.tensor(state.magnitudes)[index_R2], 1.0)


def _stacked(directions: Sequence[Adapter], module: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return all directions' factors of one module side by side, and the index of each term's direction."""
    parts = [(n, d.factors[module]) for n, d in enumerate(directions) if module in d.factors]
    index = [n for n, factors in parts for _ in range(factors.rank)]
    return torch.cat([f.a_RD for _, f in parts]), torch.cat([f.b_FR for _, f in parts], dim=1), torch.tensor(index)


def distil(state: Decoupled, max_residual: float, rest_rank: int | None = None) -> Decoupled:
    """Drop the newest direction if the older ones can express it (knowledge distillation, section 3.4 of the paper).

    Least squares minimises ||D_t - sum a_n D_n||_F^2 over all modules, through the Gram matrix of the directions. If
    the residual is at most `max_residual` of the squared norm, alpha_n grows by a_n alpha_t and D_t is dropped.

    `rest_rank` is our addition: a larger residual then becomes the new direction itself, truncated to that rank.
    """
    if len(state.directions) < 2:
        return state
    gram_AA = gram(state.directions)
    shares_A = torch.linalg.lstsq(gram_AA[:-1, :-1], gram_AA[:-1, -1:]).solution[:, 0]
    is_dropped = float(1.0 - shares_A @ gram_AA[:-1, -1] / gram_AA[-1, -1]) <= max_residual
    if not is_dropped and rest_rank is None:
        return state
    *old, newest = state.magnitudes
    merged = [alpha + share * newest for alpha, share in zip(old, shares_A.tolist(), strict=True)]
    older = replace(state, directions=state.directions[:-1], magnitudes=tuple(merged))
    if is_dropped:
        return older
    taken = tuple(-share * newest for share in shares_A.tolist())
    rest = decouple(fold(Decoupled(state.directions, (*taken, newest)), rest_rank))
    return replace(
        older, directions=(*older.directions, *rest.directions), magnitudes=(*older.magnitudes, *rest.magnitudes)
    )


def restarted(state: Decoupled, magnitude: float, normaliser: Normaliser) -> Decoupled:
    """Return the state with unit directions in every module and all magnitudes reset to one number.

    The released code does this at the start of each task. The paper continues with the learned magnitudes.
    """
    directions = tuple(Adapter({n: _unit(f, normaliser) for n, f in d.factors.items()}) for d in state.directions)
    return replace(state, directions=directions, magnitudes=(magnitude,) * len(directions))


def _unit(factors: LoraFactors, normaliser: Normaliser) -> LoraFactors:
    return _balanced(factors, 1.0 / float(norm_of(factors, normaliser)))


def gram(directions: Sequence[Adapter]) -> Tensor:
    """Return the inner products of all pairs of directions, summed over modules: [A, A] in float64."""
    rows = [[_inner_of(left, right) for right in directions] for left in directions]
    return torch.tensor(rows, dtype=torch.float64)


def _inner_of(left: Adapter, right: Adapter) -> float:
    shared = left.factors.keys() & right.factors.keys()
    return sum(float(inner(left.factors[module], right.factors[module])) for module in sorted(shared))


class DirectionWeights:
    """Applies directions to a model and trains them, until `detach` or the end of a with block.

    Trainable are the fresh direction's factors and one magnitude per direction. The model and the frozen directions
    stay as they are. Raises InvalidAdapterError if a direction does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        frozen: Decoupled,
        fresh: Adapter | None = None,
        magnitude: float = 1.0,
        settings: DirectionSettings = PAPER,
    ):
        self._frozen = frozen
        self._settings = settings
        device = next(model.parameters()).device
        start = [*frozen.magnitudes] if fresh is None else [*frozen.magnitudes, magnitude]
        self.magnitudes_A = nn.Parameter(torch.tensor(start, device=device))
        if not settings.learns_old_magnitudes:
            is_fresh_A = torch.arange(len(start), device=device) >= len(frozen.magnitudes)
            self.magnitudes_A.register_hook(lambda gradient_A: gradient_A * is_fresh_A)
        self._fresh = {name: _trainable(f, device) for name, f in (fresh.factors if fresh else {}).items()}
        for factors in self._fresh.values():
            factors.a_RD.requires_grad_(settings.learns_rows)
        shapes = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        for adapter in (*frozen.directions, *([fresh] if fresh else [])):
            check_fits(adapter, shapes)
        modules = sorted({name for direction in frozen.directions for name in direction.factors} | self._fresh.keys())
        self._handles = [model.get_submodule(name).register_forward_hook(self._hook(name, device)) for name in modules]

    def factors(self) -> list[nn.Parameter]:
        """Return the trainable factors of the fresh direction: A and B of each module."""
        return [p for f in self._fresh.values() for p in (f.a_RD, f.b_FR) if p.requires_grad]

    @torch.no_grad()
    def export(self) -> Decoupled:
        """Return a copy of the present state on the CPU, with the fresh direction last and normalised.

        The state computes the same function. A fresh direction that is still zero is left out.
        """
        magnitudes = self.magnitudes_A.tolist()
        if not self._fresh:
            return replace(self._frozen, magnitudes=tuple(magnitudes))
        factors = {name: LoraFactors(_copy(f.a_RD), _copy(f.b_FR), 1.0) for name, f in self._fresh.items()}
        old = replace(self._frozen, magnitudes=tuple(magnitudes[:-1]))
        return _with_fresh(old, factors, magnitudes[-1], self._settings)

    def detach(self) -> None:
        """Remove the directions from the model, which is bare again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _hook(self, module: str, device: torch.device) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        is_frozen = any(module in direction.factors for direction in self._frozen.directions)
        frozen = [t.to(device) for t in _stacked(self._frozen.directions, module)] if is_frozen else None
        fresh = self._fresh.get(module)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], y_BTF: Tensor) -> Tensor:
            if frozen is not None:
                a_R2D, b_FR2, index_R2 = frozen
                y_BTF = y_BTF + ((inputs[0] @ a_R2D.T) * self.magnitudes_A[index_R2]) @ b_FR2.T
            if fresh is not None:
                weight = self.magnitudes_A[-1] / _divisor(fresh, self._settings)
                y_BTF = y_BTF + (inputs[0] @ fresh.a_RD.T) @ (fresh.b_FR.T * weight)
            return y_BTF

        return hook


def _trainable(factors: LoraFactors, device: torch.device) -> LoraFactors:
    a_RD, b_FR = (nn.Parameter(f.detach().to(device, torch.float32, copy=True)) for f in (factors.a_RD, factors.b_FR))
    return LoraFactors(a_RD, b_FR, 1.0)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _divisor(fresh: LoraFactors, settings: DirectionSettings) -> Tensor | float:
    if not settings.is_fresh_unit:
        return 1.0
    if settings.normaliser == "factors":
        return (norm_of(fresh, "factors").square() + settings.floor**2).sqrt()
    return (inner(fresh, fresh).clamp_min(0.0) + settings.floor**2).sqrt()


def _with_fresh(
    old: Decoupled, factors: dict[str, LoraFactors], magnitude: float, settings: DirectionSettings
) -> Decoupled:
    """Return the old state with a fresh direction appended as one direction and one magnitude.

    The mean squared norm of the direction over the modules is 1. The proportions of the modules are kept: they differ
    a little because of the floor, and much if the direction was not normalised in training.
    """
    lengths = {name: float(norm_of(f, settings.normaliser)) for name, f in factors.items()}
    added = {name: magnitude * n / float(_divisor(factors[name], settings)) for name, n in lengths.items()}
    size = (sum(value**2 for value in added.values()) / max(1, len(added))) ** 0.5
    if size == 0.0:
        return old
    size = size if magnitude > 0 else -size
    kept = {name: _balanced(f, added[name] / (lengths[name] * size)) for name, f in factors.items() if lengths[name]}
    return replace(old, directions=(*old.directions, Adapter(kept)), magnitudes=(*old.magnitudes, size))
