from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.adapters.files import load_adapter, save_adapter
from cluster.errors import InvalidCheckpointError
from cluster.storage.checkpoints import open_checkpoint
from readapt.fusion.fuse import Fusion
from readapt.fusion.points import UNDO
from readapt.lowrank.delta import base_evolution
from readapt.training.lora import attach, load_base
from tests.worlds.precision import FORWARD, assert_near, tolerance
from tests.worlds.readapt import evolve, logits
from tests.worlds.serving import make_adapter, make_checkpoint


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("delta") / "v1")


@pytest.fixture(scope="module")
def new(old: Path) -> Path:
    return evolve(old, old.parent / "v2", rank=None, scale=0.4)


def weight_change(old: Path, new: Path, module: str) -> torch.Tensor:
    name = f"{module}.weight"
    return (open_checkpoint(new).load(name).double() - open_checkpoint(old).load(name).double()).squeeze()


def test_full_rank_holds_the_whole_change(old: Path, new: Path) -> None:
    evolution, report = base_evolution(open_checkpoint(old), open_checkpoint(new), rank=999, energy=1.0)
    assert len(report) == len(evolution.factors) == 14
    for module, factors in evolution.factors.items():
        assert_near(factors.delta(), weight_change(old, new, module), multiple=4 * max(factors.shape))
        assert factors.rank == min(factors.shape)


def test_rank_is_the_smallest_that_holds_the_energy(old: Path, new: Path) -> None:
    evolution, report = base_evolution(open_checkpoint(old), open_checkpoint(new), rank=999, energy=0.8)
    for entry in report:
        squares = torch.linalg.svdvals(weight_change(old, new, entry.module)).square()
        shares = squares.cumsum(0) / squares.sum()
        assert entry.rank == evolution.factors[entry.module].rank
        assert shares[entry.rank - 1] >= 0.8 > shares[entry.rank - 2]
        assert entry.energy == pytest.approx(float(shares[entry.rank - 1]), abs=tolerance(1.0, 4 * len(shares)))
        assert 0.3 < entry.relative_norm < 0.5


def test_rank_is_capped_and_the_energy_left_is_reported(old: Path, new: Path) -> None:
    evolution, report = base_evolution(open_checkpoint(old), open_checkpoint(new), rank=5, energy=0.99)
    assert {f.rank for f in evolution.factors.values()} == {5}
    assert all(entry.energy < 0.6 for entry in report)


def test_equal_modules_are_absent_and_kinds_can_be_chosen(old: Path, tmp_path: Path) -> None:
    new = evolve(old, tmp_path / "v2", rank=3, scale=0.4, kinds=("q_proj", "down_proj"))
    checkpoints = open_checkpoint(old), open_checkpoint(new)
    evolution, report = base_evolution(*checkpoints, rank=64, energy=0.999)
    assert {name.rsplit(".", 1)[-1] for name in evolution.factors} == {"q_proj", "down_proj"}
    assert {f.rank for f in evolution.factors.values()} == {3}
    assert [(e.rank, e.energy) for e in report if "k_proj" in e.module] == [(0, 1.0)] * 2
    only, _ = base_evolution(*checkpoints, rank=64, energy=0.999, modules=("q_proj", "v_proj"))
    assert {name.rsplit(".", 1)[-1] for name in only.factors} == {"q_proj"}


def test_same_checkpoint_has_no_evolution(old: Path) -> None:
    evolution, report = base_evolution(open_checkpoint(old), open_checkpoint(old), rank=64, energy=0.9)
    assert not evolution.factors
    assert {entry.rank for entry in report} == {0}


def test_evolution_is_stored_as_an_adapter(old: Path, new: Path, tmp_path: Path) -> None:
    evolution, _ = base_evolution(open_checkpoint(old), open_checkpoint(new), rank=64, energy=0.7)
    save_adapter(evolution, tmp_path / "evolution")
    loaded = load_adapter(tmp_path / "evolution")
    assert {n: f.rank for n, f in loaded.factors.items()} == {n: f.rank for n, f in evolution.factors.items()}
    for name, factors in evolution.factors.items():
        assert_near(loaded.factors[name].delta(), factors.delta(), multiple=4)


def test_undoing_the_full_evolution_restores_the_old_specialist(old: Path, new: Path, tmp_path: Path) -> None:
    task = load_adapter(make_adapter(tmp_path / "task", old, rank=4, scale=0.08))
    evolution, _ = base_evolution(open_checkpoint(old), open_checkpoint(new), rank=999, energy=1.0)
    old_model, new_model = load_base(old), load_base(new)
    attach(old_model, task)
    lora = attach(new_model, task)
    assert (logits(new_model) - logits(old_model)).abs().max() > 0.5
    lora.load(Fusion(task, evolution).at(UNDO, None))
    assert_near(logits(new_model), logits(old_model), 4 * FORWARD)  # an SVD on top


def test_other_shape_is_refused_with_module_and_shapes(old: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", intermediate_size=88)
    with pytest.raises(InvalidCheckpointError, match=r"intermediate_size 88.*intermediate_size 92.*from scratch"):
        base_evolution(open_checkpoint(old), open_checkpoint(other), rank=4, energy=0.9)


def test_other_depth_is_refused(old: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(InvalidCheckpointError, match=r"num_hidden_layers 3, .*layers\.2.*num_hidden_layers 2, .*none"):
        base_evolution(open_checkpoint(old), open_checkpoint(other), rank=4, energy=0.9)


def test_weights_that_are_not_finite_are_refused_by_name(old: Path, tmp_path: Path) -> None:
    broken = evolve(old, tmp_path / "broken", rank=1, scale=0.1)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(InvalidCheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight .*not finite"):
        base_evolution(open_checkpoint(old), open_checkpoint(broken), rank=4, energy=0.9)
