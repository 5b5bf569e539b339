import torch

from readapt.lowrank.truncation import truncate
from tests.worlds.precision import assert_near


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_gradient_equals_finite_differences() -> None:
    m_CR2R2 = random(2, 6, 5).requires_grad_()
    for rank in (1, 3, 5):
        assert torch.autograd.gradcheck(lambda m, rank=rank: truncate(m, rank), m_CR2R2)


def test_the_gradient_of_a_matrix_of_lower_rank_is_finite_and_right() -> None:
    """Some singular values are zero, and some on one side of the cut are equal, as in a copy."""
    left, right = torch.linalg.qr(random(6, 6))[0], torch.linalg.qr(random(6, 6).T)[0]
    values = torch.tensor([2.0, 2.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    m = (left * values) @ right
    assert torch.autograd.gradcheck(lambda m: truncate(m, 3), m[None].requires_grad_())
    zero = torch.zeros(1, 4, 4, requires_grad=True)
    truncate(zero, 2).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_the_kept_part_is_the_nearest_of_its_rank() -> None:
    m_CR2R2 = random(3, 5, 4)
    s_CR2 = torch.linalg.svdvals(m_CR2R2)
    kept = truncate(m_CR2R2, 2)
    assert torch.linalg.matrix_rank(kept).tolist() == [2, 2, 2]
    expected_C = s_CR2[:, 2:].square().sum(1)
    assert_near((m_CR2R2 - kept).square().sum((1, 2)), expected_C, multiple=16, dtype=torch.float64)
