"""Registering a fleet file, and which weights are read for it."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config.settings import AdapterSpec, BaseSpec, Fleet
from cluster.errors import ConfigError, ConflictError
from cluster.fleet import (
    bases_to_serve,
    has_registry,
    open_blobs,
    open_fleet,
    open_registry,
    register_adapters,
    register_base,
)
from cluster.registry.registry import Status
from cluster.storage.checkpoints import Checkpoint, open_checkpoint
from tests.worlds.serving import make_adapter, make_checkpoint


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


def test_weights_are_read_once_while_their_files_stay_the_same(fleet: Fleet, read: list[Path]):
    registry = open_registry(fleet)
    first = register_base(fleet, registry, "v1")
    assert register_base(fleet, registry, "v1") == first
    assert len(read) == 1
    assert first.fingerprint == open_checkpoint(fleet.base("v1").path).fingerprint()
    registry.close()


def test_touched_files_are_read_again_and_found_unchanged(fleet: Fleet, read: list[Path]):
    registry = open_registry(fleet)
    first = register_base(fleet, registry, "v1")
    os.utime(fleet.base("v1").path / "model.safetensors", ns=(1, 1))
    again = register_base(fleet, registry, "v1")
    assert (again.fingerprint, len(read)) == (first.fingerprint, 2)
    assert again.stamp != first.stamp
    assert register_base(fleet, registry, "v1") == again
    assert len(read) == 2, "the new stamp is kept"
    registry.close()


def test_replaced_weights_are_detected_every_time(fleet: Fleet):
    registry = open_registry(fleet)
    register_base(fleet, registry, "v1")
    make_checkpoint(fleet.base("v1").path, seed=5)
    for _ in range(2):
        with pytest.raises(ConflictError, match="other weights"):
            register_base(fleet, registry, "v1")
    registry.close()


def with_adapter(fleet: Fleet) -> Fleet:
    base = fleet.base("v1").path
    spec = AdapterSpec(name="intent", path=make_adapter(fleet.folder / "intent", base), base="v1", data=fleet.folder)
    return replace(fleet, blobs=str(fleet.folder / "blobs"), adapters=(spec,))


def test_replaced_files_of_a_registered_adapter_are_an_error(fleet: Fleet):
    """Otherwise a user would believe that the new files are served, but the old ones are."""
    fleet = with_adapter(fleet)
    registry, blobs = open_registry(fleet), open_blobs(fleet)
    (first,) = register_adapters(fleet, registry, blobs)
    assert register_adapters(fleet, registry, blobs) == []
    (fleet.folder / "intent" / "adapter_config.json").unlink()
    make_adapter(fleet.folder / "intent", fleet.base("v1").path, seed=5)
    with pytest.raises(ConflictError, match=r"not those that intent@1 is registered with.*Restore the old files"):
        register_adapters(fleet, registry, blobs)
    assert registry.versions() == [first]
    registry.close()


def test_another_base_for_a_registered_adapter_is_an_error(fleet: Fleet):
    fleet = with_adapter(fleet)
    registry, blobs = open_registry(fleet), open_blobs(fleet)
    register_adapters(fleet, registry, blobs)
    make_checkpoint(fleet.folder / "v2", seed=1)
    moved = replace(fleet.adapters[0], base="v2", traffic=7.0)
    bases = (*fleet.bases, BaseSpec(name="v2", path=fleet.folder / "v2"))
    expected = r"says base 'v2', but intent@1 is registered on 'v1'.*relora upgrade --to v2"
    with pytest.raises(ConflictError, match=expected):
        register_adapters(replace(fleet, bases=bases, adapters=(moved,)), registry, blobs)
    assert registry.adapter("intent").traffic == 1.0, "nothing is written"
    registry.close()


def test_looking_for_a_registry_does_not_create_it(fleet: Fleet):
    assert not has_registry(fleet)
    assert not (fleet.folder / "registry.db").exists()
    open_registry(fleet).close()
    assert has_registry(fleet)
    assert has_registry(replace(fleet, registry="postgresql://host/fleet"))


# Which bases are served.


def test_a_fleet_without_adapters_serves_its_bases(fleet: Fleet, tmp_path: Path):
    make_checkpoint(tmp_path / "v2", seed=1)
    fleet = replace(fleet, bases=(*fleet.bases, BaseSpec(name="org/v2", path=tmp_path / "v2")))
    opened = open_fleet(fleet)
    assert bases_to_serve(opened) == ["v1", "org/v2"]
    assert [base.name for base in opened.registry.bases()] == ["v1", "org/v2"], "an engine's base must be registered"
    opened.registry.close()


def test_a_fleet_with_adapters_serves_the_bases_on_which_they_are_live(fleet: Fleet, tmp_path: Path):
    make_adapter(tmp_path / "intent", tmp_path / "v1", rank=2)
    spec = AdapterSpec(name="intent", path=tmp_path / "intent", base="v1", data=tmp_path)
    bases = (*fleet.bases, BaseSpec(name="v2", path=tmp_path / "v2"))
    opened = open_fleet(replace(fleet, bases=bases, adapters=(spec,)))
    assert bases_to_serve(opened) == ["v1"]
    make_checkpoint(tmp_path / "v2", seed=1)
    assert bases_to_serve(opened, ["v2"]) == ["v2"]
    assert {base.name for base in opened.registry.bases()} == {"v1", "v2"}
    opened.registry.move(opened.new_versions[0].id, Status.LIVE, Status.RETIRED)
    assert bases_to_serve(opened) == ["v1", "v2"], "clients can load adapters into either"
    opened.registry.close()


def test_a_fleet_without_bases_serves_nothing(fleet: Fleet):
    opened = open_fleet(replace(fleet, bases=()))
    with pytest.raises(ConfigError, match=r"Fleet 'f' has no base model\. Add a \[\[bases\]\] table"):
        bases_to_serve(opened)
    opened.registry.close()


@pytest.fixture
def moved(fleet: Fleet, tmp_path: Path) -> Fleet:
    """A fleet with bases v1 and v2, whose adapter "a" has moved from v1 to v2: its second version is live."""
    make_checkpoint(tmp_path / "v2", seed=1)
    make_adapter(tmp_path / "a", tmp_path / "v1")
    spec = AdapterSpec(name="a", path=tmp_path / "a", base="v1", data=tmp_path)
    v2 = BaseSpec(name="v2", path=tmp_path / "v2")
    fleet = replace(fleet, bases=(*fleet.bases, v2), adapters=(spec,))
    opened = open_fleet(fleet)
    register_base(fleet, opened.registry, "v2")
    key = opened.blobs.put_folder(make_adapter(tmp_path / "carried", tmp_path / "v2", seed=3))
    version = opened.registry.add_version("a", "v2", Status.RETIRED, key, key, parent_id=1)
    opened.registry.promote(version.id)
    opened.registry.close()
    return fleet


@pytest.mark.parametrize("base", ["v1", "v2"])
def test_a_fleet_restarts_on_its_new_base_without_the_old_one(moved: Fleet, tmp_path: Path, base: str):
    """The registry says where an adapter is. The old base and the first version's folder may be gone."""
    for name in ("v1", "a"):
        shutil.rmtree(tmp_path / name)
    spec = replace(moved.adapters[0], base=base, traffic=7.0)
    opened = open_fleet(replace(moved, bases=moved.bases[1:], adapters=(spec,)))
    assert opened.new_versions == ()
    assert (opened.registry.routes()["a"].live.label, opened.registry.adapter("a").traffic) == ("a@2", 7.0)
    assert bases_to_serve(opened) == ["v2"]
    opened.registry.close()


def test_the_file_may_name_the_live_files(moved: Fleet, tmp_path: Path):
    spec = replace(moved.adapters[0], base="v2", path=tmp_path / "carried")
    assert open_fleet(replace(moved, adapters=(spec,))).new_versions == ()


def test_other_files_and_other_bases_are_still_refused(moved: Fleet, tmp_path: Path):
    make_adapter(tmp_path / "b", tmp_path / "v1", seed=9)
    other = replace(moved.adapters[0], path=tmp_path / "b")
    with pytest.raises(ConflictError, match="are not those"):
        open_fleet(replace(moved, adapters=(other,)))
    make_checkpoint(tmp_path / "v3", seed=2)
    bases = (*moved.bases, BaseSpec(name="v3", path=tmp_path / "v3"))
    with pytest.raises(ConflictError, match=r"says base 'v3', but a@2 is registered on 'v2'"):
        open_fleet(replace(moved, bases=bases, adapters=(replace(moved.adapters[0], base="v3"),)))


def test_a_new_adapter_needs_its_base_in_the_file(moved: Fleet):
    new = replace(moved.adapters[0], name="new", base="v9")
    with pytest.raises(ConfigError, match=r"adapters\[1\].base: no base 'v9' among: v1, v2"):
        open_fleet(replace(moved, adapters=(*moved.adapters, new)))
