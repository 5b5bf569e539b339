"""Tolerances that follow from precision and size, so that tests pass with the rounding of any CPU and thread count."""

import torch
from torch import Tensor


def tolerance(reference: Tensor, multiple: float, dtype: torch.dtype = torch.float32) -> float:
    """Return `multiple` rounding errors of `dtype` at the Frobenius norm of `reference`.

    A sum of n products has an error of at most n of them, and of about sqrt(n) in practice. QR and SVD of an n x n
    matrix have a small multiple of n.
    """
    return multiple * torch.finfo(dtype).eps * float(reference.double().norm())


def assert_near(found: Tensor, expected: Tensor, multiple: float, reference: Tensor | None = None) -> None:
    """Assert that two tensors differ by at most `tolerance` in the Frobenius norm, in float32.

    `reference` sets the scale of the rounding errors; None is `expected`.
    """
    assert found.shape == expected.shape
    error = float((found.double() - expected.double()).norm())
    unit = tolerance(expected if reference is None else reference, 1.0)
    assert error <= multiple * unit, f"an error of {error:.3g} is {error / unit:.3g} rounding errors, not {multiple:g}"
