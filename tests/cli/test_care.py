"""`relora migrate`: the storage of a fleet stays in order."""

import json
from pathlib import Path

import pytest

from cluster.registry.tables import REVISION
from tests.cli.conftest import Run
from tests.cluster.test_migrations import check_history, write_old
from tests.worlds.registries import fresh_url


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
