"""The closed-form parts of re-adaptation, on a real GPU compared with the CPU."""

from pathlib import Path

import pytest
import torch

from cluster.config.readapt import TransplantConfig
from readapt.ladder.transplant import transplant
from readapt.lowrank.svd import decompose
from readapt.training.lora import load_base
from tests.worlds.readapt import evolve, make_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("shape", [(300, 200), (1100, 1300)])
def test_decompositions_are_equal_and_stay_on_the_device(shape: tuple[int, int]) -> None:
    w_FD = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected, found = decompose(w_FD, 16), decompose(w_FD.cuda(), 16)
    assert {t.device.type for t in (found.u_FR, found.s_R, found.v_RD)} == {"cuda"}
    torch.testing.assert_close(found.s_R.cpu(), expected.s_R, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("map_head", [False, True])
def test_transplants_are_equal(tmp_path: Path, map_head: bool) -> None:
    world = make_world(tmp_path)
    new = evolve(world.base, tmp_path / "v2", rank=None, scale=0.25)
    rows = world.encoder.encode_all(world.task.train[:100])
    config = TransplantConfig(rank=8, map_head=map_head)
    expected, found = (
        transplant(load_base(world.base, device), world.specialist, load_base(new, device), rows, config).adapter
        for device in ("cpu", "cuda")
    )
    for name, factors in expected.factors.items():
        delta_FD, expected_FD = found.factors[name].delta(), factors.delta()
        assert delta_FD.device.type == "cpu"
        assert (delta_FD - expected_FD).norm() < 0.05 * expected_FD.norm()
