import pytest
import torch

from readapt.lowrank.svd import decompose, squared_norm
from tests.worlds.precision import assert_near, tolerance


def matrix(num_out: int, num_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(37, 61), (61, 37), (600, 530), (1, 9), (9, 1)])
def test_exact_decomposition_equals_the_svd_in_float64(shape: tuple[int, int]) -> None:
    w_FD = matrix(*shape)
    found = decompose(w_FD, 999)
    expected_R = torch.linalg.svdvals(w_FD.double())
    assert found.is_exact
    assert found.total == pytest.approx(float(w_FD.double().square().sum()))
    assert_near(found.s_R, expected_R, multiple=max(shape))
    a_RD, b_FR = found.factors(999)
    assert_near(b_FR @ a_RD, w_FD, multiple=max(shape))
    assert_near(b_FR.norm(dim=0), a_RD.norm(dim=1), multiple=max(shape))


def test_truncation_is_optimal() -> None:
    w_FD = matrix(50, 70)
    a_RD, b_FR = decompose(w_FD, 9).factors(9)
    u, s, v = torch.linalg.svd(w_FD.double(), full_matrices=False)
    sensitivity = float(s[8] / (s[8] - s[9]))  # see `truncation`
    assert_near(b_FR @ a_RD, (u[:, :9] * s[:9]) @ v[:9], multiple=70 * sensitivity, reference=w_FD)


@pytest.mark.parametrize("shape", [(1100, 1300), (1300, 1100)])
def test_randomised_decomposition_is_near_optimal_even_for_a_flat_spectrum(shape: tuple[int, int]) -> None:
    w_FD = matrix(*shape)
    state = torch.random.get_rng_state()
    found, again = decompose(w_FD, 16), decompose(w_FD, 16)
    assert not found.is_exact
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(found.s_R, again.s_R)
    best = float(torch.linalg.eigvalsh((w_FD @ w_FD.T).double())[-16:].sum())
    held = squared_norm(found.s_R)
    assert 0.995 * best < held <= best * (1 + tolerance(1.0, max(shape)))
    assert 1 - held / best <= found.gap_bound < 1
    assert_near(found.u_FR.T @ found.u_FR, torch.eye(16), multiple=max(shape))
    kept_FD = (found.u_FR * found.s_R) @ found.v_RD
    assert squared_norm(w_FD - kept_FD) == pytest.approx(found.total - held, rel=tolerance(1.0, max(shape)))


def test_a_matrix_of_low_rank_is_reproduced() -> None:
    w_FD = matrix(1200, 5) @ matrix(5, 1500)
    found = decompose(w_FD, 20)
    assert not found.is_exact
    assert found.spectrum().energy(5) == pytest.approx(1.0, rel=tolerance(1.0, 1500))
    a_RD, b_FR = found.factors(5)
    assert_near(b_FR @ a_RD, w_FD, multiple=1500)
    assert found.gap_bound < tolerance(1.0, 1500)


def test_the_norm_is_not_finite_if_a_value_is_not() -> None:
    w_FD = matrix(3, 4)
    w_FD[1, 1] = torch.inf
    assert not squared_norm(w_FD) < torch.inf
    assert squared_norm(torch.tensor(3.0)) == 9.0
    assert squared_norm(torch.zeros(0, 4)) == 0.0
