"""A fleet file made known to the registry, and what is not read twice for it."""

import os
from pathlib import Path

import pytest

from cluster.checkpoints import Checkpoint, open_checkpoint
from cluster.config import BaseSpec, Fleet
from cluster.errors import ConflictError
from cluster.fleet import open_registry, register_base
from tests.worlds import make_checkpoint


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    make_checkpoint(tmp_path / "v1")
    url = f"sqlite:///{tmp_path}/registry.db"
    return Fleet(name="f", folder=tmp_path, registry=url, bases=(BaseSpec(name="v1", path=tmp_path / "v1"),))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints whose weights were read for a fingerprint."""
    folders: list[Path] = []
    fingerprint = Checkpoint.fingerprint
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda self: folders.append(self.folder) or fingerprint(self))
    return folders


def test_weights_are_read_once_as_long_as_their_files_are_the_same(fleet: Fleet, read: list[Path]):
    registry = open_registry(fleet)
    first = register_base(fleet, registry, "v1")
    assert register_base(fleet, registry, "v1") == first
    assert len(read) == 1
    assert first.fingerprint == open_checkpoint(fleet.base("v1").path).fingerprint()
    registry.close()


def test_files_that_were_only_touched_are_read_again_and_found_the_same(fleet: Fleet, read: list[Path]):
    registry = open_registry(fleet)
    first = register_base(fleet, registry, "v1")
    os.utime(fleet.base("v1").path / "model.safetensors", ns=(1, 1))
    again = register_base(fleet, registry, "v1")
    assert (again.fingerprint, len(read)) == (first.fingerprint, 2)
    assert again.stamp != first.stamp
    assert register_base(fleet, registry, "v1") == again
    assert len(read) == 2, "the new stamp is kept"
    registry.close()


def test_exchanged_weights_are_found_out_however_often_the_old_ones_were_seen(fleet: Fleet):
    registry = open_registry(fleet)
    register_base(fleet, registry, "v1")
    make_checkpoint(fleet.base("v1").path, seed=5)
    for _ in range(2):
        with pytest.raises(ConflictError, match="other weights"):
            register_base(fleet, registry, "v1")
    registry.close()
