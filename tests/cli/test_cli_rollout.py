"""`relora rollout` makes candidates live without an upgrade."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import relora
from cluster.config.fleet_file import load_fleet
from cluster.config.settings import Fleet
from cluster.errors import InvalidAdapterError, NotFoundError
from cluster.fleet import open_registry
from cluster.registry.registry import Registry, Status, Version

Run = Callable[..., tuple[int, str, str]]
TEXT = 'name = "tiny"\n[rollout]\ncanary_s = 0.0\npoll_s = 0.01\n'


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `relora rollout` on the fleet in this process; return exit code, standard output and standard error."""

    def runner(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["relora", "rollout", str(tmp_path / "fleet.toml"), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            relora.main()
        output, errors = capfd.readouterr()
        return int(exit_.value.code or 0), output, errors

    return runner


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """Two adapters that are live on v1, and a second base v2."""
    (tmp_path / "fleet.toml").write_text(TEXT)
    registry = open_registry(load_fleet(tmp_path / "fleet.toml"))
    for base in ("v1", "v2"):
        registry.add_base(base, base, "print")
    for adapter in ("intent", "topic"):
        registry.add_adapter(adapter)
        registry.add_version(adapter, "v1", Status.LIVE, blob_key="key", content_hash="key")
    yield registry
    registry.close()


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A fake running cluster with an engine for v1; returns the bases for which an engine was started."""
    started: list[str] = []

    def probe(fleet: Fleet, version: Version) -> None:
        if "broken" in version.details:
            raise InvalidAdapterError("its answers are different")

    for name in ("cluster.on_ray.connect", "serving.on_ray.check_gateway"):
        monkeypatch.setattr(name, lambda *arguments, **settings: None)
    monkeypatch.setattr("serving.on_ray.has_engine", lambda base: base == "v1")
    monkeypatch.setattr("serving.on_ray.deploy_base", lambda fleet, base: started.append(base))
    monkeypatch.setattr("serving.on_ray.probe", probe)
    return started


def candidate(registry: Registry, adapter: str, base: str, **details: bool) -> Version:
    status, parent = Status.CANDIDATE, registry.find(adapter, 1)
    return registry.add_version(adapter, base, status, "key", "key", parent_id=parent.id, details=details)


def test_candidates_go_live_and_missing_engines_are_started(run: Run, registry: Registry, deployed: list[str]):
    first, second = candidate(registry, "intent", "v1"), candidate(registry, "intent", "v1")
    other = candidate(registry, "topic", "v2")
    code, output, _ = run()
    assert code == 0
    assert f"{first.label}: live" in output
    assert "done: 2 live, 1 retired" in output
    routes = registry.routes()
    assert (routes["intent"].live.id, routes["topic"].live.id) == (second.id, other.id)
    assert deployed == ["v2"]


def test_only_the_given_base_is_rolled_out(run: Run, registry: Registry, deployed: list[str]):
    left, moved = candidate(registry, "topic", "v2"), candidate(registry, "intent", "v1")
    assert run("--base", "v1")[0] == 0
    assert [registry.version(v.id).status for v in (left, moved)] == [Status.CANDIDATE, Status.LIVE]
    assert deployed == []


@pytest.mark.usefixtures("deployed")
def test_a_failed_version_is_rolled_back_and_the_command_exits_with_1(run: Run, registry: Registry):
    broken = candidate(registry, "intent", "v1", broken=True)
    code, output, _ = run()
    assert code == 1
    assert f"{broken.label}: rolled_back" in output
    assert registry.routes()["intent"].live.number == 1


@pytest.mark.usefixtures("deployed")
def test_without_candidates_there_is_nothing_to_do(run: Run, registry: Registry):
    assert run()[:2] == (0, "done: nothing was left to do\n")


@pytest.mark.usefixtures("registry", "deployed")
def test_without_a_gateway_nothing_is_probed(run: Run, monkeypatch: pytest.MonkeyPatch):
    def refuse(fleet: Fleet) -> None:
        raise NotFoundError("No gateway runs on this Ray cluster")

    monkeypatch.setattr("serving.on_ray.check_gateway", refuse)
    code, _, errors = run()
    assert code == 1
    assert "No gateway runs" in errors
