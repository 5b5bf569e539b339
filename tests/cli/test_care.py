"""`relora migrate`: the storage of a fleet stays in order."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import relora
from cluster.tables import REVISION
from tests.cluster.test_migrations import check_history, write_old
from tests.worlds.registries import fresh_url

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `relora ARGUMENTS` in this process; return exit code, standard output and standard error."""

    def runner(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["relora", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            relora.main()
        output, errors = capfd.readouterr()
        return int(exit_.value.code or 0), output, errors

    return runner


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_migrate_says_what_it_did(run: Run, tmp_path: Path, kind: str):
    with fresh_url(kind, tmp_path) as url:
        (tmp_path / "fleet.toml").write_text(f'name = "old"\nregistry = "{url}"')
        write_old(url, 1)
        if kind == "postgresql":
            code, output, errors = run("status", tmp_path / "fleet.toml")
            assert (code, output) == (1, "")
            assert "run `relora migrate` once with the fleet file" in errors
        said = f"the registry is now at revision {REVISION}; it was at 0001\n"
        assert run("migrate", tmp_path / "fleet.toml") == (0, said, "")
        assert run("migrate", tmp_path / "fleet.toml")[1] == f"the registry is up to date: revision {REVISION}\n"
        code, output, _ = run("migrate", tmp_path / "fleet.toml", "--json")
        assert json.loads(output) == {"before": REVISION, "after": REVISION}
        check_history(url)
