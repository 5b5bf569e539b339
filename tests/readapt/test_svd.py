import pytest
import torch

from readapt.lowrank.svd import decompose, squared_norm


def matrix(num_out: int, num_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(37, 61), (61, 37), (600, 530), (1, 9), (9, 1)])
def test_exact_decomposition_is_the_svd_in_float64(shape: tuple[int, int]) -> None:
    w_FD = matrix(*shape)
    found = decompose(w_FD, 999)
    expected_R = torch.linalg.svdvals(w_FD.double())
    assert found.is_exact
    assert found.total == pytest.approx(float(w_FD.double().square().sum()))
    torch.testing.assert_close(found.s_R.double(), expected_R, rtol=1e-4, atol=1e-4)
    a_RD, b_FR = found.factors(999)
    torch.testing.assert_close(b_FR @ a_RD, w_FD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b_FR.norm(dim=0), a_RD.norm(dim=1), rtol=1e-3, atol=1e-3)


def test_truncation_is_optimal() -> None:
    w_FD = matrix(50, 70)
    a_RD, b_FR = decompose(w_FD, 9).factors(9)
    u, s, v = torch.linalg.svd(w_FD.double(), full_matrices=False)
    torch.testing.assert_close((b_FR @ a_RD).double(), (u[:, :9] * s[:9]) @ v[:9], rtol=1e-4, atol=1e-4)


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
    assert 0.995 * best < held <= best * (1 + 1e-5)
    assert 1 - held / best <= found.gap_bound < 1
    eye_RR = torch.eye(16)
    torch.testing.assert_close(found.u_FR.T @ found.u_FR, eye_RR, rtol=0, atol=1e-4)
    kept_FD = (found.u_FR * found.s_R) @ found.v_RD
    assert squared_norm(w_FD - kept_FD) == pytest.approx(found.total - held, rel=1e-4)


def test_matrix_of_low_rank_is_found_whole() -> None:
    w_FD = matrix(1200, 5) @ matrix(5, 1500)
    found = decompose(w_FD, 20)
    assert not found.is_exact
    assert found.spectrum().energy(5) == pytest.approx(1.0, abs=1e-6)
    a_RD, b_FR = found.factors(5)
    torch.testing.assert_close(b_FR @ a_RD, w_FD, rtol=1e-3, atol=1e-3)
    assert found.gap_bound < 1e-5


def test_values_that_are_not_finite_show_in_the_norm() -> None:
    w_FD = matrix(3, 4)
    w_FD[1, 1] = torch.inf
    assert not squared_norm(w_FD) < torch.inf
    assert squared_norm(torch.tensor(3.0)) == 9.0
    assert squared_norm(torch.zeros(0, 4)) == 0.0
