"""The command line as people meet it: what it offers, what it shows, and errors that are one line and exit code 1."""

from collections.abc import Callable
from pathlib import Path

import pytest

import relora
from cluster.config import load_fleet
from cluster.fleet import open_registry
from cluster.registry import Status
from tests.worlds import make_adapter, make_checkpoint

Run = Callable[..., tuple[int, str, str]]
NO_RAY = "would go on to start Ray"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `relora ARGUMENTS` in this process; gives its exit code, standard output and standard error."""

    def runner(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["relora", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            relora.main()
        output, errors = capfd.readouterr()
        return int(exit_.value.code or 0), output, errors

    return runner


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
    bases = "".join(f'[[bases]]\nname = "{name}"\npath = "{name}"\n' for name in ("v1", "v2", "gone"))
    adapter = '[[adapters]]\nname = "intent"\npath = "intent"\nbase = "v1"\ndata = "data"\n'
    path = folder / "fleet.toml"
    path.write_text(f'name = "tiny"\n{bases}{adapter}')
    return path


def test_help_lists_every_command(run: Run):
    code, output, _ = run("--help")
    assert code == 0
    for command in ("demo", "register", "serve", "upgrade", "status"):
        assert command in output


@pytest.mark.parametrize("command", ["demo", "register", "serve", "upgrade", "status"])
def test_every_command_has_help(run: Run, command: str):
    code, output, _ = run(command, "--help")
    assert code == 0
    assert f"Usage: relora {command}" in output


def test_an_empty_registry_is_an_empty_table(run: Run, tmp_path: Path):
    (tmp_path / "fleet.toml").write_text('name = "empty"')
    code, output, errors = run("status", tmp_path / "fleet.toml")
    assert code == 0
    assert "status" in output
    assert "@" not in output
    assert errors == ""


def test_register_then_status(run: Run, fleet_file: Path):
    code, output, _ = run("register", fleet_file)
    assert (code, output.strip()) == (0, "intent@1 is live on v1")
    assert run("register", fleet_file)[:2] == (0, ""), "nothing is new the second time"
    code, output, _ = run("status", fleet_file)
    assert code == 0
    assert [cell.strip() for cell in output.splitlines()[3].strip("│").split("│")[:3]] == ["intent@1", "v1", "live"]


def test_status_shows_quality_and_rung(run: Run, fleet_file: Path, tmp_path: Path):
    (tmp_path / "fleet.toml").write_text('name = "other"')
    registry = open_registry(load_fleet(tmp_path / "fleet.toml"))
    registry.add_base("v2", "v2", "print")
    registry.add_adapter("intent")
    registry.add_version("intent", "v2", Status.REJECTED, quality=71.25, details={"rung": "scratch"})
    registry.close()
    _, output, _ = run("status", tmp_path / "fleet.toml")
    assert all(word in output for word in ("intent@1", "rejected", "71.2", "scratch"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('name = "x"\n[readapt.search]\ntrials = 0', "readapt.search.trials: Input should be greater than 0"),
        ('name = "x"\nregistri = "y"', "registri: Unexpected keyword argument"),
        ('name = "x"\n[[adapters]]\nname = "a"\npath = "p"\nbase = "b"\ndata = "d"', "adapters[0].base: no base 'b'"),
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
        (["upgrade", "--to", "gone"], "no such checkpoint folder."),
        (["upgrade", "--to", "v2"], "No Ray cluster is at hand"),
        (["serve", "--detach"], "No Ray cluster is at hand"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(run: Run, fleet_file: Path, arguments: list[str], named: str):
    code, output, errors = run(arguments[0], fleet_file, *arguments[1:])
    assert (code, output) == (1, "")
    assert errors.startswith("error: ")
    assert named in errors
    assert len(errors.splitlines()) == 1
