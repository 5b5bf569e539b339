"""Where a fresh direction should look: at what the new stage's inputs have and those of the earlier stages have not.

A direction B A answers an input x by A x. With random rows in A it answers the earlier stages' inputs as loudly as the
new ones. Here the rows of A are the top generalised eigenvectors of the two second moments of the module's inputs, new
against old, so that for its length A x is as large as can be on the new rows and as small as can be on the old ones;
they stay frozen, and B is learned. Related: InfLoRA (arXiv 2404.00228), which takes the new inputs' main directions in
the orthogonal complement of the old ones'. Of the old rows only the moments are kept.

Shape letters: D in, F out, R rank, K rows of a sketch, T tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cluster.adapter_files import Adapter, LoraFactors

MAX_SKETCH_ROWS = 512
RIDGE = 1e-3


@torch.no_grad()
def input_moments(
    model: nn.Module, modules: Iterable[str], forward: Any, rows: Sequence[Any], most: int = 512
) -> dict[str, Tensor]:
    """The sum of x x^T over all input tokens of each module, D x D, while `forward` gets the rows one by one.

    One by one, so that there is no padding among the tokens. At most `most` rows are looked at, evenly spread.
    """
    sums: dict[str, Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TD = inputs[0].flatten(0, -2)
            sums[name] = sums.get(name, 0.0) + x_TD.T @ x_TD

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in modules]
    try:
        for row in rows[:: -(-len(rows) // most)]:
            forward([row])
    finally:
        for handle in handles:
            handle.remove()
    return sums


def with_moments(sketches: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sketches S (K x D, S^T S the moments so far) with further moments added; exact up to D = MAX_SKETCH_ROWS."""
    found = dict(sketches)
    for name, moment_DD in moments.items():
        old_KD = sketches.get(name)
        values_D, vectors_DD = torch.linalg.eigh(moment_DD if old_KD is None else moment_DD + old_KD.T @ old_KD)
        kept = min(MAX_SKETCH_ROWS, len(values_D))
        found[name] = values_D[-kept:].clamp_min(0.0).sqrt()[:, None] * vectors_DD[:, -kept:].T
    return found


def contrasting(fresh: Adapter, moments: Mapping[str, Tensor], sketches: Mapping[str, Tensor]) -> Adapter:
    """The adapter with rows of A that answer the new inputs and not the old ones; where nothing is old, as it was."""
    factors = {
        name: LoraFactors(_rows(moments[name], sketches[name], f.rank), f.b_FR, f.scaling) if name in sketches else f
        for name, f in fresh.factors.items()
    }
    return Adapter(factors)


def _rows(new_DD: Tensor, old_KD: Tensor, rank: int) -> Tensor:
    """The `rank` generalised eigenvectors of (new, old + ridge) with the largest eigenvalues, as unit rows.

    The ridge is a share of the old inputs' mean energy: directions that the old inputs hardly use count alike.
    """
    old_DD = old_KD.double().T @ old_KD.double()  # in float32 it would not be sure to have a Cholesky factor
    ridge = RIDGE * float(old_DD.trace()) / len(old_DD)
    lower_DD = torch.linalg.cholesky(old_DD + ridge * torch.eye(len(old_DD), dtype=torch.float64))
    half_DD = torch.linalg.solve_triangular(lower_DD, new_DD.double(), upper=False)
    whole_DD = torch.linalg.solve_triangular(lower_DD, half_DD.T, upper=False)
    _, vectors_DD = torch.linalg.eigh((whole_DD + whole_DD.T) / 2)
    rows_RD = torch.linalg.solve_triangular(lower_DD.T, vectors_DD[:, -rank:], upper=True).T
    return torch.nn.functional.normalize(rows_RD, dim=1).float()
