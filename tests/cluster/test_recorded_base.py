"""An adapter of another base of the same shape is refused if the weights are known to differ. Else people are told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.adapters.recorded_base import check_recorded_base
from cluster.errors import InvalidAdapterError
from cluster.registry.records import BaseModel
from cluster.storage.checkpoints import open_checkpoint
from tests.worlds.serving import make_checkpoint

ADAPTER = Path("/adapters/tone")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for seed, name in enumerate(("v1", "v2")):
        make_checkpoint(folder / name, seed=seed)
    shutil.copytree(folder / "v1", folder / "copy-of-v1")
    return folder


def known(folder: Path, name: str) -> BaseModel:
    return BaseModel(name, str(folder), open_checkpoint(folder).fingerprint(), "", 0.0)


@pytest.fixture
def bases(folders: Path) -> list[BaseModel]:
    return [known(folders / name, name) for name in ("v1", "v2")]


def test_the_base_itself_a_copy_of_it_and_no_name_are_accepted(folders: Path, bases: list[BaseModel]):
    v1 = bases[0]
    for recorded in (
        "",
        "v1",
        str(folders / "v1"),
        f"{folders}/v2/../v1/",
        "bases0/v1",
        "./v1",
        str(folders / "copy-of-v1"),
    ):
        assert check_recorded_base(recorded, v1, bases, ADAPTER) == (), recorded


def test_a_hub_id_is_recognised_in_the_hubs_cache_and_by_the_name_of_the_folder(bases: list[BaseModel]):
    cached = replace(bases[0], path="/hub/models--Org--Model-1B/snapshots/abc")
    named = replace(bases[0], path="/models/model-1b")
    for base in (cached, named):
        assert check_recorded_base("Org/Model-1B", base, [base], ADAPTER) == ()
        [warning] = check_recorded_base("Org/Model-2B", base, [base], ADAPTER)
        assert "'Org/Model-2B'" in warning
        assert base.path in warning


def test_another_known_base_is_refused_by_its_name(folders: Path, bases: list[BaseModel]):
    for recorded in (str(folders / "v2"), "v2", "org/v2"):
        with pytest.raises(InvalidAdapterError, match=r"trained on another base.*'v2' here.*Load it on 'v2'") as raised:
            check_recorded_base(recorded, bases[0], bases, ADAPTER)
        assert str(ADAPTER) in str(raised.value)


def test_another_name_for_the_same_weights_is_accepted(folders: Path, bases: list[BaseModel]):
    alias = known(folders / "copy-of-v1", "alias")
    assert check_recorded_base("alias", bases[0], [*bases, alias], ADAPTER) == ()


def test_a_checkpoint_that_only_lies_on_this_machine_is_compared(folders: Path, bases: list[BaseModel], tmp_path: Path):
    with pytest.raises(InvalidAdapterError, match="trained on another base"):
        check_recorded_base(str(folders / "v2"), bases[0], bases[:1], ADAPTER)
    changing = make_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(InvalidAdapterError):
        check_recorded_base(str(changing), bases[0], bases, ADAPTER)
    shutil.copy(folders / "v1" / "model.safetensors", changing)
    assert check_recorded_base(str(changing), bases[0], bases, ADAPTER) == ()


@pytest.mark.parametrize("recorded", ["/gone/model", "org/model", "some-name", "empty"])
def test_people_are_warned_of_a_base_that_cannot_be_compared(bases: list[BaseModel], tmp_path: Path, recorded: str):
    if recorded == "empty":
        recorded = str(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({}))
    [warning] = check_recorded_base(recorded, bases[0], bases, ADAPTER)
    assert repr(recorded) in warning
    assert "'v1'" in warning
