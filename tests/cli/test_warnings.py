"""The command line says what it could not check about an adapter's base, and refuses an adapter of another one."""

import json
from pathlib import Path

import pytest

from cluster.config.fleet_file import load_fleet
from cluster.fleet import open_registry
from tests.cli.conftest import Run
from tests.worlds.serving import make_adapter, make_checkpoint

TEXT = """name = "tiny"
[[bases]]
name = "v1"
path = "v1"
[[adapters]]
name = "intent"
path = "intent"
base = "v1"
data = "data"
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    make_adapter(tmp_path / "intent", make_checkpoint(tmp_path / "v1"))
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        row = json.dumps({"prompt": "a", "completion": "b"})
        (tmp_path / "data" / f"{split}.jsonl").write_text(f"{row}\n" * 4)
    (tmp_path / "fleet.toml").write_text(TEXT)
    return tmp_path / "fleet.toml"


def name_base(fleet: Path, base: str) -> None:
    file = fleet.parent / "intent" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))


def test_register_and_status_warn_of_a_base_that_cannot_be_compared(fleet: Path, run: Run):
    name_base(fleet, "org/unknown")
    code, output, _ = run("register", fleet)
    assert code == 0
    assert "intent@1: warning: adapter_config.json names the base 'org/unknown'" in output
    assert "intent@1: warning: adapter_config.json names the base 'org/unknown'" in run("status", fleet)[1]
    [version] = json.loads(run("status", fleet, "--json")[1])
    assert "'org/unknown'" in version["warnings"][0]


def test_no_warning_for_the_base_itself(fleet: Path, run: Run):
    code, output, _ = run("register", fleet)
    assert code == 0
    assert "warning" not in output + run("status", fleet)[1]


def test_register_refuses_an_adapter_of_another_base_and_registers_nothing(fleet: Path, run: Run):
    name_base(fleet, str(make_checkpoint(fleet.parent / "other", seed=3)))
    code, _, errors = run("register", fleet)
    assert code == 1
    assert "it was trained on another base" in errors
    assert open_registry(load_fleet(fleet)).adapters() == []
