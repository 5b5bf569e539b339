"""Tolerances that follow from precision and size, so that tests pass with the rounding of any CPU and thread count.

They are multiples of the rounding error of float32 at the norm of a reference. A sum of n products has an error of at
most n of these, of about sqrt(n) in practice. QR, SVD or Cholesky of an n x n matrix have a small multiple of n, times
what the problem itself amplifies (its condition).
"""

import torch
from torch import Tensor

FORWARD = 512  # rounding errors of a tiny model's forward or backward pass: 2 layers, sums of up to 92 products
TRAINED = 8 * FORWARD  # after some 20 steps, which amplify differences: AdamW divides by the size of a gradient


def tolerance(reference: Tensor | float, multiple: float, dtype: torch.dtype = torch.float32) -> float:
    """Return `multiple` rounding errors of `dtype` at the Frobenius norm of `reference`."""
    return multiple * torch.finfo(dtype).eps * float(torch.as_tensor(reference, dtype=torch.float64).detach().norm())


def assert_near(
    found: Tensor | float,
    expected: Tensor | float,
    multiple: float,
    reference: Tensor | float | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Assert that the Frobenius norm of a difference is at most `tolerance`; None is `expected` as the reference."""
    difference = torch.as_tensor(found, dtype=torch.float64) - torch.as_tensor(expected, dtype=torch.float64)
    error = float(difference.detach().norm())
    unit = tolerance(expected if reference is None else reference, 1.0, dtype)
    assert error <= multiple * unit, f"an error of {error:.3g} is {error / unit:.3g} rounding errors, not {multiple:g}"
