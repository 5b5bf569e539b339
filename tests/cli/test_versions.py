"""Commands that look at versions and steer them, on a real registry and a real blob store."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cluster.adapters.files import load_adapter
from cluster.config.fleet_file import load_fleet
from cluster.fleet import open_blobs, open_registry
from cluster.registry.registry import Registry, Status
from tests.cli.conftest import Run
from tests.worlds.serving import make_adapter, make_checkpoint

TEXT = """name = "tiny"
[[bases]]
name = "v1"
path = "v1"
[[bases]]
name = "v2"
path = "v2"
[[adapters]]
name = "intent"
path = "intent"
base = "v1"
data = "data"
"""
ATTEMPTS = [
    {"rung": "copy", "quality": 71.0, "seconds": 0.5, "curve": [], "error": None},
    {"rung": "short", "quality": 97.0, "seconds": 3.25, "curve": [], "error": None},
]


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """A fleet file whose adapter "intent" is live on v1, with real files, and a candidate on v2 of twice the rank."""
    v1 = make_checkpoint(tmp_path / "v1")
    (tmp_path / "data").mkdir()
    (tmp_path / "fleet.toml").write_text(TEXT)
    loaded = load_fleet(tmp_path / "fleet.toml")
    registry, blobs = open_registry(loaded), open_blobs(loaded)
    for base in ("v1", "v2"):
        registry.add_base(base, str(tmp_path / base), base)
    registry.add_adapter("intent", data="data", traffic=3.0)
    keys = [blobs.put_folder(make_adapter(tmp_path / f"a{rank}", v1, rank=rank, alpha=4)) for rank in (2, 4)]
    registry.add_version("intent", "v1", Status.LIVE, keys[0], keys[0])
    details = {"rung": "short", "reference_quality": 98.0, "copy_quality": 71.0, "attempts": ATTEMPTS}
    registry.add_version("intent", "v2", Status.CANDIDATE, keys[1], keys[1], 1, 97.0, details)
    registry.close()
    return tmp_path / "fleet.toml"


@pytest.fixture
def registry(fleet: Path) -> Iterator[Registry]:
    registry = open_registry(load_fleet(fleet))
    yield registry
    registry.close()


def test_list_says_what_is_live_and_what_is_on_its_way(run: Run, fleet: Path, registry: Registry):
    registry.pause("intent")
    code, output, _ = run("list", fleet, "--json")
    assert code == 0
    (row,) = json.loads(output)
    assert (row["adapter"], row["live"]["version"], row["live"]["base"]) == ("intent", "intent@1", "v1")
    assert (row["on_its_way"], row["traffic"], row["is_paused"]) == (["intent@2 candidate"], 3.0, True)
    code, output, _ = run("list", fleet)
    assert code == 0
    assert all(word in output for word in ("intent@1", "intent@2 candidate, paused"))


def test_show_tells_lineage_gate_rungs_files_rank_and_bytes(run: Run, fleet: Path):
    code, output, _ = run("show", fleet, "intent@2")
    assert code == 0
    assert "lineage: intent@2 (v2) <- intent@1 (v1)" in output
    assert "gate: quality 97.0, reference 98.0, rung short; the copy reached 71.0" in output
    assert "size: rank 4, " in output
    assert [line.split(":")[0] for line in output.splitlines() if line.startswith("file ")] == [
        "file adapter_config.json",
        "file adapter_model.safetensors",
    ]
    assert any("short" in line and "97.0" in line and "3.2" in line for line in output.splitlines())
    shown = json.loads(run("show", fleet, "intent@2", "--json")[1])
    assert (shown["lineage"], shown["rank"], shown["attempts"]) == (["intent@2", "intent@1"], 4, ATTEMPTS)
    assert shown["num_bytes"] == sum(shown["files"].values())


def test_show_of_a_name_lists_its_versions_with_their_sizes(run: Run, fleet: Path):
    shown = json.loads(run("show", fleet, "intent", "--json")[1])
    assert [(v["version"], v["rank"]) for v in shown["versions"]] == [("intent@1", 2), ("intent@2", 4)]
    assert shown["versions"][1]["num_bytes"] > shown["versions"][0]["num_bytes"] > 1000
    assert "intent@2" in run("show", fleet, "intent")[1]


@pytest.mark.parametrize("command", ["show", "export", "promote", "retry", "rollback", "pause", "resume"])
def test_an_unknown_adapter_is_one_line(run: Run, fleet: Path, command: str, tmp_path: Path):
    more = ["--out", tmp_path / "out"] if command == "export" else []
    code, output, errors = run(command, fleet, "absent", *more)
    assert (code, output) == (1, "")
    assert errors.endswith("error: There is no adapter 'absent'.\n")


@torch.no_grad()
def test_peft_loads_an_export(run: Run, fleet: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert run("export", fleet, "intent@2", "--out", out)[:2] == (0, f"intent@2, for v2, is in {out}\n")
    ids = torch.arange(1, 9)[None]
    base = AutoModelForCausalLM.from_pretrained(fleet.parent / "v1")
    bare = base(ids).logits
    adapted = PeftModel.from_pretrained(base, out)(ids).logits
    original = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(fleet.parent / "v1"), fleet.parent / "a4")
    assert torch.equal(adapted, original(ids).logits)
    assert not torch.allclose(adapted, bare)
    code, _, errors = run("export", fleet, "intent", "--out", out)
    assert code == 1
    assert "exists already" in errors


def test_export_without_a_number_takes_the_live_version(run: Run, fleet: Path, tmp_path: Path):
    assert run("export", fleet, "intent", "--out", tmp_path / "out")[0] == 0
    assert load_adapter(tmp_path / "out").max_rank == 2


def test_rollback_promote_and_retry_move_one_adapter(run: Run, fleet: Path, registry: Registry):
    assert run("rollback", fleet, "intent")[:2] == (0, "intent@2: rolled_back on v2\n")
    code, output, _ = run("retry", fleet, "intent@2")
    assert (code, output) == (0, "intent@2: candidate on v2\n`relora rollout` takes it up\n")
    registry.move(2, Status.CANDIDATE, Status.READY)
    registry.move(2, Status.READY, Status.CANARY)
    assert run("promote", fleet, "intent")[:2] == (0, "intent@2: live on v2\n")
    assert run("rollback", fleet, "intent")[1] == "intent@1: live on v1\nintent@2: retired on v2\n"
    assert json.loads(run("promote", fleet, "intent@2", "--json")[1]) == [
        {"version": "intent@2", "base": "v2", "status": "live"}
    ]


def test_pause_and_resume(run: Run, fleet: Path, registry: Registry):
    assert run("pause", fleet, "intent")[:2] == (0, "intent is paused\n")
    assert registry.paused() == {"intent"}
    assert "intent: paused; `relora resume" in run("status", fleet)[1]
    assert json.loads(run("resume", fleet, "intent", "--json")[1]) == {"adapter": "intent", "is_paused": False}


def test_an_unregistered_adapter_is_gone_and_gc_deletes_its_files(run: Run, fleet: Path, registry: Registry):
    (fleet.parent / "blobs" / "notes.txt").write_text("not ours")
    assert json.loads(run("gc", fleet, "--older-than-h", 0, "--json")[1])["files"] == []
    code, output, _ = run("unregister", fleet, "intent", "--yes")
    assert code == 0
    assert "intent is removed, with 2 versions\n" in output
    assert "still lists it" in output
    assert run("gc", fleet)[1] == "0 files, 0.00 MB\n", "they are too young"
    code, output, _ = run("gc", fleet, "--older-than-h", 0, "--dry-run", "--json")
    assert len(json.loads(output)["files"]) == 2
    assert len(list((fleet.parent / "blobs").glob("*.tar"))) == 2
    assert "2 files" in run("gc", fleet, "--older-than-h", 0)[1]
    assert [file.name for file in (fleet.parent / "blobs").iterdir()] == ["notes.txt"]


def test_gc_keeps_what_only_an_event_or_a_detail_names(run: Run, fleet: Path, registry: Registry, tmp_path: Path):
    blobs = open_blobs(load_fleet(fleet))
    keys = []
    for name in ("state", "evolution", "lost"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        keys.append(blobs.put_folder(tmp_path / name))
    (fleet.parent / "blobs" / f".{keys[0]}.{'0' * 32}.part").write_text("half")
    registry.add_version("intent", "v1", Status.REJECTED, details={"state_key": keys[0]})
    registry.log("evolution", key=keys[1])
    files = json.loads(run("gc", fleet, "--older-than-h", 0, "--json")[1])["files"]
    assert sorted(files) == sorted([f"{keys[2]}.tar", f".{keys[0]}.{'0' * 32}.part"])
    assert [blobs.exists(key) for key in keys] == [True, True, False]


def test_unregister_asks_first(fleet: Path, registry: Registry):
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "relora.py", "unregister", str(fleet), "intent"]
    done = subprocess.run(command, input="n\n", capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "Remove intent and 2 versions?" in done.stdout
    assert len(registry.versions()) == 2


def test_doctor_finds_what_is_missing(run: Run, fleet: Path, monkeypatch: pytest.MonkeyPatch):
    def no_ray(*arguments: object, **settings: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("cluster.on_ray.connect", no_ray)
    code, output, _ = run("doctor", fleet, "--json")
    found = {check["check"]: check for check in json.loads(output)}
    assert code == 1, "base v2 has no folder"
    assert (found["base v1"]["level"], found["base v2"]["level"]) == ("ok", "bad")
    assert "v2" in found["base v2"]["text"]
    assert "torch" in found["versions"]["text"]
    assert found["Ray cluster"]["level"] == "note"
    assert found["registry"]["text"] == "1 adapters, 2 versions"
    assert found["adapter intent"]["level"] == "note", "its folder is missing, its files are stored"
    make_checkpoint(fleet.parent / "v2", seed=1)
    code, output, _ = run("doctor", fleet)
    assert code == 0
    assert "base v2" in output
