"""The command line: its commands, their output, and errors of one line with exit code 1."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import relora
from cluster.config.fleet_file import load_fleet
from cluster.config.settings import Fleet
from cluster.errors import OverloadedError
from cluster.fleet import open_registry
from cluster.registry.registry import Status, Version
from readapt.campaign.jobs import AdapterJob, JobFailure, JobUpdates
from readapt.training.data import Row, Task
from serving.errors import BackendFailedError
from tests.cli.conftest import Run
from tests.worlds.readapt import write_task
from tests.worlds.serving import make_adapter, make_checkpoint

NO_RAY = "no Ray cluster is running here"
COMMANDS = sorted(typer.main.get_command(relora.app).commands)  # type: ignore[attr-defined] (it is a group)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which no Ray cluster runs."""

    def refuse(*arguments: object, **settings: object) -> None:
        raise ConnectionError(NO_RAY)

    monkeypatch.setattr("cluster.on_ray.connect", refuse)


@pytest.fixture(scope="module")
def fleet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases v1 and v2, adapter "intent" of v1, and a base "gone" whose folder does not exist."""
    folder = tmp_path_factory.mktemp("fleet")
    v1 = make_checkpoint(folder / "v1")
    make_checkpoint(folder / "v2", seed=1)
    make_adapter(folder / "intent", v1, rank=2, alpha=4)
    rows = [Row(f"{number}?", "yes") for number in range(8)]
    write_task(folder / "data", Task(rows, rows, rows))
    bases = "".join(f'[[bases]]\nname = "{name}"\npath = "{name}"\n' for name in ("v1", "v2", "gone"))
    adapter = '[[adapters]]\nname = "intent"\npath = "intent"\nbase = "v1"\ndata = "data"\n'
    path = folder / "fleet.toml"
    path.write_text(f'name = "tiny"\n{bases}{adapter}')
    return path


def test_help_lists_every_command(run: Run):
    code, output, _ = run("--help")
    assert code == 0
    assert len(COMMANDS) > 5
    for command in COMMANDS:
        assert f" {command} " in output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str):
    code, output, _ = run(command, "--help")
    assert code == 0
    assert f"Usage: relora {command}" in output


def test_before_anything_is_registered_status_says_so_and_makes_no_file(run: Run, tmp_path: Path):
    file = tmp_path / "fleet.toml"
    file.write_text('name = "empty"')
    said = f"nothing is registered yet: run `relora register {file}` first\n"
    assert run("status", file) == (0, said, "")
    assert list(tmp_path.iterdir()) == [file]
    open_registry(load_fleet(file)).close()
    assert run("status", file) == (0, said, ""), "also if the registry exists and is empty"


def test_register_then_status(run: Run, fleet_file: Path):
    code, output, _ = run("register", fleet_file)
    assert (code, output.strip()) == (0, "intent@1 is live on v1")
    assert run("register", fleet_file)[:2] == (0, "intent@1 is already live on v1\n")
    code, output, _ = run("status", fleet_file)
    assert code == 0
    assert [cell.strip() for cell in output.splitlines()[3].strip("│").split("│")[:3]] == ["intent@1", "v1", "live"]


def test_status_shows_names_as_they_are(run: Run, tmp_path: Path):
    (tmp_path / "fleet.toml").write_text('name = "other"')
    registry = open_registry(load_fleet(tmp_path / "fleet.toml"))
    registry.add_base("Qwen/Qwen2.5-0.5B", "v2", "print")
    registry.add_adapter("v1:fire:acme/bot")
    registry.add_version("v1:fire:acme/bot", "Qwen/Qwen2.5-0.5B", Status.FAILED, details={"error": "none"})
    _, output, _ = run("status", tmp_path / "fleet.toml")
    cells = [cell.strip() for cell in output.splitlines()[3].strip("│").split("│")]
    assert cells[:2] == ["v1:fire:acme/bot@1", "Qwen/Qwen2.5-0.5B"]
    assert output.splitlines()[-1] == "v1:fire:acme/bot@1: failed: none"


def test_status_shows_quality_and_rung(run: Run, fleet_file: Path, tmp_path: Path):
    (tmp_path / "fleet.toml").write_text('name = "other"')
    registry = open_registry(load_fleet(tmp_path / "fleet.toml"))
    registry.add_base("v2", "v2", "print")
    registry.add_adapter("intent")
    reasons = {"rejected": "it reached 71.2 points", "error": "data[0]/valid.jsonl:3: " + 40 * "is not valid "}
    registry.add_version("intent", "v2", Status.REJECTED, quality=71.25, details={"rung": "scratch", **reasons})
    registry.add_version("intent", "v2", Status.FAILED, details=reasons)
    registry.add_version("intent", "v2", Status.ROLLED_BACK, details={"rolled_back": "canary: replica died"})
    registry.add_version("intent", "v2", Status.LIVE, details=reasons)
    registry.close()
    _, output, _ = run("status", tmp_path / "fleet.toml")
    assert all(word in output for word in ("intent@1", "rejected", "71.2", "scratch"))
    assert output.splitlines()[-3:] == [
        "intent@1: rejected: it reached 71.2 points",
        f"intent@2: failed: {reasons['error']}",
        "intent@3: rolled_back: canary: replica died",
    ]


@pytest.mark.parametrize(
    ("valid", "named"), [(None, "data: no such folder"), ('{"prompt": "a"}', "data/valid.jsonl:1: field 'completion'")]
)
def test_register_also_checks_the_rows(run: Run, fleet_file: Path, tmp_path: Path, valid: str | None, named: str):
    folder = Path(shutil.copytree(fleet_file.parent, tmp_path / "fleet"))
    (folder / "registry.db").unlink(missing_ok=True)
    if valid is None:
        (folder / "data").rename(folder / "elsewhere")
    else:
        (folder / "data" / "valid.jsonl").write_text(valid)
    code, output, errors = run("register", folder / "fleet.toml")
    assert (code, output) == (1, "")
    assert named in errors
    assert not (folder / "registry.db").exists()


def test_register_reports_replaced_files(run: Run, fleet_file: Path, tmp_path: Path):
    folder = Path(shutil.copytree(fleet_file.parent, tmp_path / "fleet"))
    run("register", folder / "fleet.toml")
    shutil.rmtree(folder / "intent")
    make_adapter(folder / "intent", folder / "v1", rank=2, alpha=4, seed=9)
    code, output, errors = run("register", folder / "fleet.toml")
    assert (code, output) == (1, "")
    assert "are not those that intent@1 is registered with" in errors


class Idle:
    """Replaces `RayExecutor`: starts one job and never finishes it, or fails every job at once."""

    is_endless = True

    def __init__(self, fleet: Fleet):
        self.num_polls = 0

    def run(self, jobs: Iterator[AdapterJob]) -> JobUpdates:
        for job in jobs:
            while self.is_endless:
                time.sleep(0.05)
                self.num_polls += 1
                assert self.num_polls < 400, "it was not stopped"
                yield None
            yield job, JobFailure("it was to fail")


@pytest.fixture
def upgradable(fleet_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate fleet file, and a fake running cluster."""
    folder = Path(shutil.copytree(fleet_file.parent, tmp_path / "fleet"))
    (folder / "registry.db").unlink(missing_ok=True)
    for name in ("cluster.on_ray.connect", "serving.on_ray.check_gateway"):
        monkeypatch.setattr(name, lambda *arguments, **settings: None)
    monkeypatch.setattr("readapt.on_ray.RayExecutor", Idle)
    return folder / "fleet.toml"


def test_an_engine_that_cannot_be_started_ends_the_upgrade_at_once(
    run: Run, upgradable: Path, monkeypatch: pytest.MonkeyPatch
):
    registry = open_registry(load_fleet(upgradable))

    def fail(fleet: Fleet, base: str) -> None:
        while not registry.versions(base="v2", statuses=[Status.ADAPTING]):
            time.sleep(0.01)
        raise BackendFailedError("Ray Serve could not start the engine of v2: no room")

    monkeypatch.setattr("serving.on_ray.deploy_base", fail)
    code, output, errors = run("upgrade", upgradable, "--to", "v2")
    assert code == 1
    assert " stopping the campaign: Ray Serve could not start the engine of v2: no room\n" in output
    assert errors == "error: Ray Serve could not start the engine of v2: no room\n"
    (version,) = registry.versions(base="v2")
    assert version.status is Status.PLANNED, "the next upgrade can take it"
    assert registry.routes()["intent"].live.number == 1
    registry.close()


def test_an_upgrade_ends_even_if_a_base_without_an_engine_has_a_candidate(
    run: Run, upgradable: Path, monkeypatch: pytest.MonkeyPatch
):
    probed: list[str] = []

    def probe(fleet: Fleet, version: Version) -> None:
        probed.append(version.label)
        assert len(probed) < 4, "it probes forever"
        raise OverloadedError("no engine yet")

    monkeypatch.setattr("serving.on_ray.deploy_base", lambda fleet, base: None)
    monkeypatch.setattr("serving.on_ray.probe", probe)
    monkeypatch.setattr(Idle, "is_endless", False)
    run("register", upgradable)
    registry = open_registry(load_fleet(upgradable))
    candidate = registry.add_version("intent", "v1", Status.CANDIDATE, parent_id=1)
    code, output, _ = run("upgrade", upgradable, "--to", "v2")
    assert code == 1
    assert "done: 1 failed" in output
    assert probed == []
    assert registry.version(candidate.id).status is Status.CANDIDATE
    registry.close()


def test_an_upgrade_without_rollout_says_how_its_versions_ended(
    run: Run, upgradable: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Idle, "is_endless", False)
    code, output, _ = run("upgrade", upgradable, "--to", "v2", "--no-rollout")
    assert code == 1
    assert "done: 1 failed" in output


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('name = "x"\n[readapt.search]\ntrials = 0', "readapt.search.trials: Input should be greater than 0"),
        ('name = "x"\nregistri = "y"', "registri: There is no such key. Did you mean 'registry'?"),
        ('name = "x', "fleet.toml: not valid TOML"),
    ],
)
def test_a_config_error_is_one_line_that_names_the_key(run: Run, tmp_path: Path, text: str, named: str):
    (tmp_path / "fleet.toml").write_text(text)
    code, output, errors = run("status", tmp_path / "fleet.toml")
    assert (code, output) == (1, "")
    assert errors.startswith("error: fleet.toml: ")
    assert named in errors
    assert len(errors.splitlines()) == 1


def test_a_missing_fleet_file_is_a_usage_error(run: Run, tmp_path: Path):
    code, _, errors = run("status", tmp_path / "none.toml")
    assert code == 2
    assert "does not exist" in errors


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["upgrade", "--to", "v9"], "No base model 'v9' in fleet 'tiny'; it has: v1, v2, gone."),
        (["serve", "--base", "v9"], "No base model 'v9' in fleet 'tiny'; it has: v1, v2, gone."),
        (["upgrade", "--to", "gone"], "no such folder on this machine"),
        (["upgrade", "--to", "v2"], "No Ray cluster is running"),
        (["serve", "--detach"], "No Ray cluster is running"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(run: Run, fleet_file: Path, arguments: list[str], named: str):
    code, output, errors = run(arguments[0], fleet_file, *arguments[1:])
    assert (code, output) == (1, "")
    assert errors.startswith("error: ")
    assert named in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.usefixtures("no_ray")
def test_serve_takes_a_fleet_file_or_a_model(run: Run, fleet_file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = fleet_file.parent / "v1"
    for arguments in ([], [fleet_file, "--model", model]):
        code, _, errors = run("serve", *arguments)
        assert code == 2
        assert "either the path of a fleet file or --model" in " ".join(errors.replace("│", "").split())
    code, output, errors = run("serve", "--model", model, "--detach")
    assert (code, errors.startswith("error: No Ray cluster is running")) == (1, True)
    assert output == f"the fleet file is {tmp_path}/.relora/v1/fleet.toml: change its settings there\n"


@pytest.mark.usefixtures("no_ray")
def test_serve_without_any_base_says_what_to_add(run: Run, tmp_path: Path):
    (tmp_path / "fleet.toml").write_text('name = "empty"')
    code, _, errors = run("serve", tmp_path / "fleet.toml")
    assert (code, errors) == (
        1,
        "error: Fleet 'empty' has no base model. Add a [[bases]] table with `name` and `path`.\n",
    )


@pytest.mark.parametrize(("package", "extra"), [("openai", "demo"), ("matplotlib", "plots")])
def test_a_missing_optional_package_is_one_line_that_names_its_extra(
    run: Run, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
):
    def run_demo(*arguments: object, **settings: object) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("demo.run.run_demo", run_demo)
    code, output, errors = run("demo")
    assert (code, output) == (1, "")
    assert errors == (
        f"error: The package {package!r} is not installed. Install it with: pip install 'relora[{extra}]'\n"
    )


def test_a_module_of_ours_that_is_missing_is_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch):
    def run_demo(*arguments: object, **settings: object) -> None:
        raise ModuleNotFoundError("No module named 'demo.gone'", name="demo.gone")

    monkeypatch.setattr("demo.run.run_demo", run_demo)
    with pytest.raises(ModuleNotFoundError):
        run("demo")


@pytest.mark.parametrize(
    ("command", "target", "code", "words"),
    [
        (["upgrade", "--to", "v2"], "upgrade.upgrade_fleet", 130, "interrupted; run it again: it resumes from the reg"),
        (["upgrade", "--to", "v2", "--no-rollout"], "upgrade.make_candidates", 130, "it resumes from the registry"),
        (["rollout"], "upgrade.roll_out", 130, "each version continues from its status"),
        (["serve", "--detach"], "serving.on_ray.deploy", 0, "stopped\n"),
    ],
)
def test_ctrl_c_ends_a_command_and_says_how_to_go_on(
    run: Run,
    upgradable: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    target: str,
    code: int,
    words: str,
):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(target, interrupt)
    found, output, errors = run(command[0], upgradable, *command[1:])
    assert found == code
    assert words in output
    assert "Traceback" not in errors


def test_an_upgrade_counts_its_adapters_in_dated_lines(run: Run, upgradable: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Idle, "is_endless", False)
    _, output, _ = run("upgrade", upgradable, "--to", "v2", "--no-rollout")
    assert re.search(r"^\d\d:\d\d:\d\d adapter 1 of 1: intent@2 failed$", output, re.MULTILINE)


@pytest.mark.usefixtures("no_ray")
def test_a_dry_run_prints_the_plan_and_carries_nothing_over(run: Run, fleet_file: Path, tmp_path: Path):
    folder = Path(shutil.copytree(fleet_file.parent, tmp_path / "dry"))
    (folder / "registry.db").unlink(missing_ok=True)
    file = folder / "fleet.toml"
    code, output, _ = run("upgrade", file, "--to", "v2", "--dry-run", "--json")
    assert code == 0
    (step,) = json.loads(output)["steps"]
    assert (step["version"], step["traffic"], step["note"]) == ("intent@1", 1.0, None)
    assert step["rung"] in ("copy", "transplant", "train", "scratch")
    assert step["expected_s"] > 0
    run("pause", file, "intent")
    code, output, _ = run("upgrade", file, "--to", "v2", "--dry-run")
    assert (code, "paused: `relora resume` first" in output) == (0, True)
    assert output.endswith("0 adapters, about 0 s with 1 workers; nothing was carried over\n")
    registry = open_registry(load_fleet(file))
    assert [version.label for version in registry.versions()] == ["intent@1"]
    registry.close()
