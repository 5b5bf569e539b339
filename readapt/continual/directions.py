"""Decoupled LoRA: frozen directions whose magnitudes are learned, beside one fresh direction.

    h' = (W_0 + sum over n < t of alpha_n D_n + alpha_t unit(B_t A_t)) x        (SD-LoRA, arXiv 2501.13198)

A direction D_n is an adapter of scaling 1; those that were learned here have Frobenius norm 1 in every module. The norm
of a product is never taken from the F x D matrix: ||B A||^2 = sum((B^T B) * (A A^T)).

Shape letters: D in, F out, R rank of one direction, K stacked rank of the frozen ones, N directions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cluster.adapter_files import Adapter, LoraFactors, check_fits
from cluster.errors import InvalidAdapterError
from readapt.fusion.fuse import Fusion
from readapt.fusion.points import Point

Normaliser = Literal["product", "factors"]


@dataclass(frozen=True, eq=False)
class Decoupled:
    """An adapter taken apart: the sum of magnitude times direction. Directions have scaling 1 and may lack modules.

    `inputs` are sketches of the modules' inputs in all stages so far (see `moments`), `classes` statistics of all their
    classes (see `recall`); empty unless the last stage's method has kept them up. `has_readout` says that the last
    direction is recall's readout, which the next stage by recall replaces.
    """

    directions: tuple[Adapter, ...] = ()
    magnitudes: tuple[float, ...] = ()
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    classes: Mapping[str, Tensor] = field(default_factory=dict)
    has_readout: bool = False

    def __post_init__(self) -> None:
        assert len(self.directions) == len(self.magnitudes), "one magnitude for each direction"

    @property
    def num_parameters(self) -> int:
        """The number of stored values: all factors, and the magnitudes."""
        factors = [each for direction in self.directions for each in direction.factors.values()]
        return sum(each.a_RD.numel() + each.b_FR.numel() for each in factors) + len(self.magnitudes)


@dataclass(frozen=True)
class Decoupling:
    """How the fresh direction is normalised: as the paper says by default, else as its released code does.

    `normaliser` is ||B A||_F ("product", the paper) or ||A||_F ||B||_F ("factors", the code). `is_fresh_unit` false
    leaves the direction under training as it is (the code). `floor` is added to the norm as sqrt(norm^2 + floor^2): B
    starts at zero, where a unit vector is not defined, and with a floor the direction grows to its full length over the
    first steps instead of jumping there with the first one. What is stored is the same function, of norm exactly 1.
    """

    normaliser: Normaliser = "product"
    is_fresh_unit: bool = True
    floor: float = 0.1
    learns_old_magnitudes: bool = True
    learns_rows: bool = True


PAPER = Decoupling()
"""The method as the paper has it."""


def inner(left: LoraFactors, right: LoraFactors) -> Tensor:
    """Frobenius inner product of two modules' deltas, without forming them; differentiable."""
    product = (left.b_FR.T @ right.b_FR) * (left.a_RD @ right.a_RD.T)
    return product.sum() * (left.scaling * right.scaling)


def norm_of(factors: LoraFactors, normaliser: Normaliser) -> Tensor:
    """The length that a direction is divided by."""
    if normaliser == "factors":
        return factors.a_RD.norm() * factors.b_FR.norm() * abs(factors.scaling)
    return inner(factors, factors).clamp_min(0.0).sqrt()


def decouple(adapter: Adapter) -> Decoupled:
    """An ordinary adapter as one direction, which keeps the proportions of its modules, and its magnitude.

    The direction's mean squared norm over the modules is 1; an adapter that adds nothing has no direction. An adapter
    with DoRA's magnitudes is no sum of directions and is refused: InvalidAdapterError.
    """
    if adapter.is_dora:
        raise InvalidAdapterError("A DoRA adapter cannot be taken apart into directions.")
    squares = [float(inner(factors, factors)) for factors in adapter.factors.values()]
    magnitude = (sum(squares) / max(1, len(squares))) ** 0.5
    if magnitude == 0.0:
        return Decoupled()
    return Decoupled((_scaled(adapter, 1.0 / magnitude),), (magnitude,))


def _scaled(adapter: Adapter, by: float) -> Adapter:
    """The adapter times a number, with scaling 1 and factors of equal size."""
    return Adapter({name: _balanced(factors, by) for name, factors in adapter.factors.items()})


def _balanced(factors: LoraFactors, by: float) -> LoraFactors:
    a_norm, b_norm = float(factors.a_RD.norm()), float(factors.b_FR.norm())
    ratio = (b_norm / a_norm) ** 0.5 if a_norm and b_norm else 1.0
    size = abs(factors.scaling * by) ** 0.5
    sign = -1.0 if factors.scaling * by < 0 else 1.0
    return LoraFactors(factors.a_RD * (size * ratio), factors.b_FR * (sign * size / ratio), 1.0)


def fold(state: Decoupled, rank: int | None = None) -> Adapter:
    """One ordinary adapter that adds what the state adds: directions concatenated, magnitudes folded into B.

    `rank` cuts every module to the best approximation of that rank (QR and a small SVD); None keeps all of it.
    """
    assert state.directions, "a state without directions adds nothing"
    modules = sorted({module for direction in state.directions for module in direction.factors})
    whole = Adapter({module: _concatenated(state, module) for module in modules})
    return whole if rank is None else Fusion(whole, Adapter({})).at(Point(1.0, 0.0), rank)


def _concatenated(state: Decoupled, module: str) -> LoraFactors:
    a_KD, b_FK, index_K = _stacked(state.directions, module)
    return LoraFactors(a_KD, b_FK * torch.tensor(state.magnitudes)[index_K], 1.0)


def _stacked(directions: Sequence[Adapter], module: str) -> tuple[Tensor, Tensor, Tensor]:
    """All directions' factors of one module side by side, and the direction that each term belongs to."""
    parts = [(n, d.factors[module]) for n, d in enumerate(directions) if module in d.factors]
    index = [n for n, factors in parts for _ in range(factors.rank)]
    return torch.cat([f.a_RD for _, f in parts]), torch.cat([f.b_FR for _, f in parts], dim=1), torch.tensor(index)


def distil(state: Decoupled, max_residual: float, rest_rank: int | None = None) -> Decoupled:
    """Drops the newest direction if the older ones can stand for it (the paper's knowledge distillation, section 3.4).

    Least squares for ||D_t - sum a_n D_n||_F^2 over all modules, by way of the Gram matrix of the directions; where the
    share of the squared norm that is left over is at most `max_residual`, alpha_n grows by a_n alpha_t. `rest_rank` is
    ours: then what is left over is no reason to keep all of the direction, but becomes one itself, cut to that rank.
    """
    if len(state.directions) < 2:
        return state
    gram_NN = gram(state.directions)
    shares_N = torch.linalg.lstsq(gram_NN[:-1, :-1], gram_NN[:-1, -1:]).solution[:, 0]
    is_dropped = float(1.0 - shares_N @ gram_NN[:-1, -1] / gram_NN[-1, -1]) <= max_residual
    if not is_dropped and rest_rank is None:
        return state
    *old, newest = state.magnitudes
    merged = [alpha + share * newest for alpha, share in zip(old, shares_N.tolist(), strict=True)]
    less = replace(state, directions=state.directions[:-1], magnitudes=tuple(merged))
    if is_dropped:
        return less
    given = tuple(-share * newest for share in shares_N.tolist())
    rest = decouple(fold(Decoupled(state.directions, (*given, newest)), rest_rank))
    return replace(
        less, directions=(*less.directions, *rest.directions), magnitudes=(*less.magnitudes, *rest.magnitudes)
    )


def restarted(state: Decoupled, magnitude: float, normaliser: Normaliser) -> Decoupled:
    """All directions brought to length 1 in every module and all magnitudes set back to one number.

    What the released code does at the start of each task; the paper goes on with the magnitudes that were learned.
    """
    directions = tuple(Adapter({n: _unit(f, normaliser) for n, f in d.factors.items()}) for d in state.directions)
    return replace(state, directions=directions, magnitudes=(magnitude,) * len(directions))


def _unit(factors: LoraFactors, normaliser: Normaliser) -> LoraFactors:
    return _balanced(factors, 1.0 / float(norm_of(factors, normaliser)))


def gram(directions: Sequence[Adapter]) -> Tensor:
    """Frobenius inner products of all pairs of directions, summed over modules, N x N in float64."""
    rows = [[_inner_of(left, right) for right in directions] for left in directions]
    return torch.tensor(rows, dtype=torch.float64)


def _inner_of(left: Adapter, right: Adapter) -> float:
    shared = left.factors.keys() & right.factors.keys()
    return sum(float(inner(left.factors[module], right.factors[module])) for module in sorted(shared))


class DirectionWeights:
    """Owner of a decoupled adapter under training on one model, on which it is until `detach`, or for a with block.

    Trainable are the fresh direction's factors and all magnitudes, one for each direction whatever its modules; the
    model and the frozen directions are not. InvalidAdapterError where a direction does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        frozen: Decoupled,
        fresh: Adapter | None = None,
        magnitude: float = 1.0,
        config: Decoupling = PAPER,
    ):
        self._frozen, self._config = frozen, config
        device = next(model.parameters()).device
        start = [*frozen.magnitudes] if fresh is None else [*frozen.magnitudes, magnitude]
        self.magnitudes_N = nn.Parameter(torch.tensor(start, device=device))
        if not config.learns_old_magnitudes:
            is_fresh_N = torch.arange(len(start), device=device) >= len(frozen.magnitudes)
            self.magnitudes_N.register_hook(lambda gradient_N: gradient_N * is_fresh_N)
        self._fresh = {name: _trainable(f, device) for name, f in (fresh.factors if fresh else {}).items()}
        for factors in self._fresh.values():
            factors.a_RD.requires_grad_(config.learns_rows)
        shapes = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        for adapter in (*frozen.directions, *([fresh] if fresh else [])):
            check_fits(adapter, shapes)
        modules = sorted({name for direction in frozen.directions for name in direction.factors} | self._fresh.keys())
        self._hooks = {name: (model.get_submodule(name), self._hook(name, device)) for name in modules}
        self._handles: list[RemovableHandle] = []
        self.attach()

    def attach(self) -> None:
        """Puts the directions on the model again after a `detach`."""
        assert not self._handles, "the directions are on the model already"
        self._handles = [module.register_forward_hook(hook) for module, hook in self._hooks.values()]

    def factors(self) -> list[nn.Parameter]:
        """The fresh direction's A and B, module by module, as far as they are trained."""
        return [p for f in self._fresh.values() for p in (f.a_RD, f.b_FR) if p.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [*self.factors(), self.magnitudes_N]

    @torch.no_grad()
    def export(self) -> Decoupled:
        """A copy of the present state on the CPU: the same function, the fresh direction normalised and last.

        A fresh direction that has not moved from zero is left out.
        """
        magnitudes = self.magnitudes_N.tolist()
        if not self._fresh:
            return replace(self._frozen, magnitudes=tuple(magnitudes))
        factors = {name: LoraFactors(_copy(f.a_RD), _copy(f.b_FR), 1.0) for name, f in self._fresh.items()}
        old = replace(self._frozen, magnitudes=tuple(magnitudes[:-1]))
        return _with_fresh(old, factors, magnitudes[-1], self._config)

    def detach(self) -> None:
        """Takes the directions off the model, which then computes what the bare base computes."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _hook(self, module: str, device: torch.device) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        holding = any(module in direction.factors for direction in self._frozen.directions)
        stack = [t.to(device) for t in _stacked(self._frozen.directions, module)] if holding else None
        fresh = self._fresh.get(module)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], y_BTF: Tensor) -> Tensor:
            if stack is not None:
                a_KD, b_FK, index_K = stack
                y_BTF = y_BTF + ((inputs[0] @ a_KD.T) * self.magnitudes_N[index_K]) @ b_FK.T
            if fresh is not None:
                weight = self.magnitudes_N[-1] / _divisor(fresh, self._config)
                y_BTF = y_BTF + (inputs[0] @ fresh.a_RD.T) @ (fresh.b_FR.T * weight)
            return y_BTF

        return hook


def _trainable(factors: LoraFactors, device: torch.device) -> LoraFactors:
    a_RD, b_FR = (nn.Parameter(f.detach().to(device, torch.float32, copy=True)) for f in (factors.a_RD, factors.b_FR))
    return LoraFactors(a_RD, b_FR, 1.0)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _divisor(fresh: LoraFactors, config: Decoupling) -> Tensor | float:
    if not config.is_fresh_unit:
        return 1.0
    if config.normaliser == "factors":
        return (norm_of(fresh, "factors").square() + config.floor**2).sqrt()
    return (inner(fresh, fresh).clamp_min(0.0) + config.floor**2).sqrt()


def _with_fresh(old: Decoupled, factors: dict[str, LoraFactors], magnitude: float, config: Decoupling) -> Decoupled:
    """The stored form of a fresh direction: unit in every module, one magnitude; the same function.

    The modules' lengths differ a little from one another where the floor has held some back, and much where the
    direction was not normalised in training: then the direction keeps these proportions.
    """
    lengths = {name: float(norm_of(f, config.normaliser)) for name, f in factors.items()}
    added = {name: magnitude * n / float(_divisor(factors[name], config)) for name, n in lengths.items()}
    size = (sum(value**2 for value in added.values()) / max(1, len(added))) ** 0.5
    if size == 0.0:
        return old
    size = size if magnitude > 0 else -size
    kept = {name: _balanced(f, added[name] / (lengths[name] * size)) for name, f in factors.items() if lengths[name]}
    return replace(old, directions=(*old.directions, Adapter(kept)), magnitudes=(*old.magnitudes, size))
