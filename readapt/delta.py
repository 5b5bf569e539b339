"""The base model's own evolution E = W2 - W1 as a low-rank adapter, read tensor by tensor.

Computed once per base update and shared by all adapters of the fleet. Shape letters: D in, F out, R rank.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.adapter_files import Adapter, LoraFactors
from cluster.checkpoints import Checkpoint
from cluster.errors import InvalidCheckpointError

EXACT_SVD_LIMIT = 2048  # above it (smaller side) the randomised SVD; 4096 x 4096 exact took 18 s on 8 CPU threads
OVERSAMPLING, POWER_ITERATIONS = 16, 4


@dataclass(frozen=True)
class ModuleEnergy:
    """One module's share in the evolution.

    `energy` is the part of the squared Frobenius norm of E that the kept rank holds (1 where E is zero) and
    `relative_norm` is |E| / |W1|. Rank 0 means that the weight is the same in both versions.
    """

    module: str
    rank: int
    energy: float
    relative_norm: float


def base_evolution(
    old: Checkpoint, new: Checkpoint, rank: int, energy: float, modules: Collection[str] | None = None
) -> tuple[Adapter, list[ModuleEnergy]]:
    """Truncated SVD of W2 - W1 per linear module: the smallest rank that holds `energy`, at most `rank`.

    Factors are balanced (A = sqrt(S) V^T, B = U sqrt(S), scaling 1); unchanged modules are absent from the adapter.
    `modules` are kinds such as "q_proj" (None: all). Deterministic. Memory: a few times the largest matrix.
    InvalidCheckpointError where the two have different modules or shapes, or a weight is not finite.
    """
    factors, report = {}, []
    for module in _common_modules(old, new, modules):
        w_FD = _weight(old, module)
        e_FD = _weight(new, module) - w_FD
        found, module_energy = _truncate(e_FD, rank, energy)
        if found is not None:
            factors[module] = found
        found_rank = 0 if found is None else found.rank
        report.append(ModuleEnergy(module, found_rank, module_energy, float(e_FD.norm() / w_FD.norm())))
    return Adapter(factors=factors, base_model=str(new.folder)), report


def _common_modules(old: Checkpoint, new: Checkpoint, modules: Collection[str] | None) -> list[str]:
    old_shapes, new_shapes = old.linear_shapes(), new.linear_shapes()
    if not old_shapes:
        raise InvalidCheckpointError(f"{old.folder}: has no linear modules that ReLoRA knows")
    for module in sorted(old_shapes.keys() | new_shapes.keys()):
        before, after = old_shapes.get(module), new_shapes.get(module)
        if before != after:
            raise InvalidCheckpointError(
                f"{new.folder}: {module} has shape {after or 'none'}, but {before or 'none'} in {old.folder}: "
                "adapters cannot be carried over to another architecture, train them from scratch"
            )
    return [m for m in sorted(old_shapes) if modules is None or m.rsplit(".", 1)[-1] in modules]


def _weight(checkpoint: Checkpoint, module: str) -> Tensor:
    weight_FD = checkpoint.load(f"{module}.weight").float()
    if not torch.isfinite(weight_FD).all():
        raise InvalidCheckpointError(f"{checkpoint.folder}: {module}.weight has values that are not finite")
    return weight_FD


def _truncate(e_FD: Tensor, max_rank: int, energy: float) -> tuple[LoraFactors | None, float]:
    total = float(e_FD.double().square().sum())
    if total == 0.0:
        return None, 1.0
    u_FR, s_R, v_DR = _svd(e_FD, max_rank)
    held_R = s_R.double().square().cumsum(0)
    shares_R = held_R / max(total, float(held_R[-1]))  # rounding must not make a part look like the whole
    rank = min(int((shares_R < energy).sum()) + 1, max_rank, len(s_R))
    root_R = s_R[:rank].sqrt()
    a_RD = (v_DR[:, :rank] * root_R).T.contiguous()
    return LoraFactors(a_RD, u_FR[:, :rank] * root_R, 1.0), float(shares_R[rank - 1])


def _svd(e_FD: Tensor, max_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    if min(e_FD.shape) <= EXACT_SVD_LIMIT:
        u_FR, s_R, v_RD = torch.linalg.svd(e_FD, full_matrices=False)
        return u_FR, s_R, v_RD.T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        num_samples = min(max_rank + OVERSAMPLING, min(e_FD.shape))
        return torch.svd_lowrank(e_FD, q=num_samples, niter=POWER_ITERATIONS)
