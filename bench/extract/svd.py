"""Compares the speed and loss of the truncated SVD with the full SVD, on flat to steep spectra.

Times are CPU seconds of one thread, so other programs on the machine matter little. The flat spectrum (independent
normal entries) is the worst case of any randomised method, and training does not produce it. sigma_i = i^-p with p from
0.25 to 1 covers what fine-tuning produces.
"""

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from readapt.lowrank.svd import decompose, squared_norm

SPECTRA = {"flat": None, "i^-0.25": 0.25, "i^-0.5": 0.5, "i^-1": 1.0}
OVERSAMPLING, POWER_ITERATIONS = 16, 4  # of torch.svd_lowrank, as usually recommended


def measure(side: int, rank: int, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return, per spectrum, CPU seconds of the full SVD, ours and `torch.svd_lowrank`, and the energy they miss."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: _case(w_FD, rank, repeats, name, say) for name, w_FD in _matrices(side)}
    finally:
        torch.set_num_threads(threads)


def _matrices(side: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    noise_FD = torch.randn(side, side, generator=generator)
    u_FF = torch.linalg.qr(noise_FD)[0]
    v_DD = torch.linalg.qr(torch.randn(side, side, generator=generator))[0]
    for name, power in SPECTRA.items():
        values = torch.arange(1, side + 1) ** -(power or 1.0)
        yield name, noise_FD if power is None else (u_FF * values) @ v_DD.T


def _case(w_FD: Tensor, rank: int, repeats: int, name: str, say: Callable[[str], None]) -> dict[str, Any]:
    full_s, (_, s_R, _) = _timed(lambda: torch.linalg.svd(w_FD, full_matrices=False), 1)
    ours_s, found = _timed(lambda: decompose(w_FD, rank), repeats)
    lowrank_s, lowrank = _timed(lambda: _lowrank(w_FD, rank), repeats)
    best = squared_norm(s_R[:rank])
    result = {
        "full_svd_s": full_s,
        "ours_s": ours_s,
        "svd_lowrank_s": lowrank_s,
        "speedup": full_s / ours_s,
        "energy_gap": 1 - squared_norm(found.s_R) / best,
        "energy_gap_bound": found.gap_bound,
        "svd_lowrank_energy_gap": 1 - lowrank / best,
        "energy_at_rank": best / found.total,
    }
    say(f"{name}: full SVD {full_s:.1f} s, ours {ours_s:.2f} s, energy gap {100 * result['energy_gap']:.3f} %")
    return result


def _lowrank(w_FD: Tensor, rank: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u_FR2 = torch.svd_lowrank(w_FD, q=rank + OVERSAMPLING, niter=POWER_ITERATIONS)[0]
    return squared_norm(u_FR2[:, :rank].T @ w_FD)


def _timed(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    times_s, result = [], None
    for _ in range(repeats):
        start_s = time.process_time()
        result = function()
        times_s.append(time.process_time() - start_s)
    return median(times_s), result
