"""Starts a new direction so that it responds to what is new in the inputs of a stage.

A direction B A responds to an input x by A x. With random rows in A, it responds to inputs of earlier stages as
strongly as to new ones. Here the rows of A are the top generalised eigenvectors of two second moments of the module's
inputs, new against old. So A x is as large as possible on the new rows and as small as possible on the old ones. A
stays frozen, and B is trained. Of the old rows, only the moments are kept.

Related: InfLoRA (arXiv 2404.00228) takes the main directions of the new inputs in the orthogonal complement of the old
ones.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cluster.adapters.files import Adapter, LoraFactors

MAX_SKETCH_ROWS = 512
MAX_ROWS = 512
RIDGE = 1e-3


@torch.no_grad()
def input_moments(
    model: nn.Module, modules: Iterable[str], forward: Callable[[list[Any]], object], rows: Sequence[Any]
) -> dict[str, Tensor]:
    """Return the sum of x x^T over all input tokens of each module, [D, D].

    `forward` gets the rows one by one, so no token is padding. At most `MAX_ROWS` rows are used, evenly spread.
    """
    sums: dict[str, Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TD = inputs[0].flatten(0, -2)
            sums[name] = sums.get(name, 0.0) + x_TD.T @ x_TD

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in modules]
    try:
        for row in rows[:: -(-len(rows) // MAX_ROWS)]:
            forward([row])
    finally:
        for handle in handles:
            handle.remove()
    return sums


def with_moments(sketches: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sketches with further moments added.

    A sketch S [R2, D] stands for the moment S^T S. It is exact up to D = `MAX_SKETCH_ROWS`.
    """
    found = dict(sketches)
    for name, moment_DD in moments.items():
        old_R2D = sketches.get(name)
        values_D, vectors_DD = torch.linalg.eigh(moment_DD if old_R2D is None else moment_DD + old_R2D.T @ old_R2D)
        kept = min(MAX_SKETCH_ROWS, len(values_D))
        found[name] = values_D[-kept:].clamp_min(0.0).sqrt()[:, None] * vectors_DD[:, -kept:].T
    return found


def contrasting(fresh: Adapter, moments: Mapping[str, Tensor], sketches: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter with contrasting rows in A. Modules without a sketch of old inputs keep their rows."""
    factors = {
        name: LoraFactors(_rows(moments[name], sketches[name], f.rank), f.b_FR, f.scaling) if name in sketches else f
        for name, f in fresh.factors.items()
    }
    return Adapter(factors)


def _rows(new_DD: Tensor, old_R2D: Tensor, rank: int) -> Tensor:
    """Return the `rank` generalised eigenvectors of (new, old + ridge) with the largest eigenvalues, as unit rows.

    The ridge is a share of the mean energy of the old inputs. It makes all directions that the old inputs barely use
    count the same.
    """
    old_DD = old_R2D.double().T @ old_R2D.double()  # in float32 the Cholesky factor might not exist
    ridge = RIDGE * float(old_DD.trace()) / len(old_DD)
    lower_DD = torch.linalg.cholesky(old_DD + ridge * torch.eye(len(old_DD), dtype=torch.float64))
    half_DD = torch.linalg.solve_triangular(lower_DD, new_DD.double(), upper=False)
    whole_DD = torch.linalg.solve_triangular(lower_DD, half_DD.T, upper=False)
    _, vectors_DD = torch.linalg.eigh((whole_DD + whole_DD.T) / 2)
    rows_RD = torch.linalg.solve_triangular(lower_DD.T, vectors_DD[:, -rank:], upper=True).T
    return torch.nn.functional.normalize(rows_RD, dim=1).float()
