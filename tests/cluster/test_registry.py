import multiprocessing
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from cluster.config.settings import AdapterSpec, BaseSpec, Fleet
from cluster.errors import ConflictError, InvalidRequestError, NotFoundError, ReloraError, StorageError
from cluster.fleet import open_blobs, register_adapters
from cluster.registry import tables as registry_tables
from cluster.registry.records import TRANSITIONS
from cluster.registry.registry import Registry, Status, Version
from tests.worlds.registries import fresh_url
from tests.worlds.serving import make_adapter, make_checkpoint

S = Status


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with fresh_url(request.param, tmp_path) as url:
        yield url


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    registry = Registry(url)
    populate(registry)
    yield registry
    registry.close()


def populate(registry: Registry) -> None:
    registry.add_base("v1", "models/v1", "f1")
    registry.add_base("v2", "models/v2", "f2")
    registry.add_adapter("intent", data="tasks/intent", traffic=3.0)


def walk(registry: Registry, version: Version, *statuses: Status) -> Version:
    for status in statuses:
        version = registry.move(version.id, version.status, status)
    return version


TO_CANARY = (S.ADAPTING, S.CANDIDATE, S.READY, S.CANARY)


# Base models and adapters


def test_a_base_is_identified_by_its_weights(registry: Registry):
    first = registry.base("v1")
    assert (first.path, first.fingerprint) == ("models/v1", "f1")
    assert registry.add_base("v1", "models/v1", "f1") == first
    assert [base.name for base in registry.bases()] == ["v1", "v2"]
    with pytest.raises(ConflictError, match=r"'v1'.*other weights"):
        registry.add_base("v1", "models/v1", "f9")
    with pytest.raises(NotFoundError, match="'v3'"):
        registry.base("v3")


def test_a_base_that_was_moved_gets_its_new_path(registry: Registry):
    registry.add_base("w1", "/old/place", "aa")
    assert registry.add_base("w1", "/new/place", "aa").path == "/new/place"
    assert registry.base("w1").path == "/new/place"
    with pytest.raises(ConflictError, match="other weights"):
        registry.add_base("w1", "/third/place", "bb")
    assert registry.base("w1").path == "/new/place"


def test_two_processes_can_register_a_fleet_at_once(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = BaseSpec(name="w1", path=make_checkpoint(tmp_path / "w1"))
    spec = AdapterSpec(name="fresh", path=make_adapter(tmp_path / "a", base.path), base="w1", data=tmp_path)
    fleet = Fleet(name="f", folder=tmp_path, blobs=str(tmp_path / "blobs"), bases=(base,), adapters=(spec,))
    (first,) = register_adapters(fleet, registry, open_blobs(fleet))
    assert register_adapters(fleet, registry, open_blobs(fleet)) == []
    monkeypatch.setattr(
        registry, "versions", lambda **conditions: []
    )  # as if the other process had not yet added its version
    assert register_adapters(fleet, registry, open_blobs(fleet)) == []
    monkeypatch.undo()
    assert registry.versions(adapter="fresh") == [first]


def test_an_adapter_is_added_once_and_kept_up_to_date(registry: Registry):
    assert registry.adapter("intent").traffic == 3.0
    updated = registry.add_adapter("intent", data="other", metric="chrf", traffic=5.0)
    assert registry.adapter("intent") == updated
    assert registry.adapters() == [updated]
    assert len(registry.events(kind="adapter_added")) == 1
    with pytest.raises(NotFoundError, match="'absent'"):
        registry.adapter("absent")


def test_bad_names_are_refused(registry: Registry):
    with pytest.raises(InvalidRequestError):
        registry.add_base("../v1", "x", "f")
    with pytest.raises(InvalidRequestError):
        registry.add_adapter("a@1")


# Versions


def test_versions_are_numbered_per_adapter(registry: Registry):
    registry.add_adapter("other")
    first = registry.add_version("intent", "v1", S.LIVE, blob_key="b", content_hash="h", quality=0.9)
    second = registry.add_version("intent", "v2", S.PLANNED, parent_id=first.id, details={"rung": "copy"})
    elsewhere = registry.add_version("other", "v1", S.LIVE)
    assert [v.label for v in (first, second, elsewhere)] == ["intent@1", "intent@2", "other@1"]
    assert registry.version(second.id) == second == registry.find("intent", 2)
    assert (second.parent_id, second.details, second.status) == (first.id, {"rung": "copy"}, S.PLANNED)
    assert registry.versions() == [first, second, elsewhere]
    assert registry.versions(adapter="intent") == [first, second]
    assert registry.versions(base="v1", statuses=(S.LIVE,)) == [first, elsewhere]
    assert registry.versions(statuses=()) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.add_version("absent", "v1", S.PLANNED),
        lambda r: r.add_version("intent", "absent", S.PLANNED),
        lambda r: r.add_version("intent", "v1", S.PLANNED, parent_id=99),
        lambda r: r.version(99),
        lambda r: r.find("intent", 99),
        lambda r: r.move(99, S.PLANNED, S.ADAPTING),
        lambda r: r.promote(99),
        lambda r: r.log("note", version_id=99),
    ],
)
def test_unknown_entries_raise_not_found_and_change_nothing(registry: Registry, call: Callable[[Registry], object]):
    before = registry.events()
    with pytest.raises(NotFoundError):
        call(registry)
    assert registry.events() == before
    assert registry.versions() == []


def test_a_move_sets_the_given_values_and_merges_details(registry: Registry):
    version = registry.add_version("intent", "v2", S.PLANNED, details={"a": 1, "b": 1})
    registry.move(version.id, S.PLANNED, S.ADAPTING)
    moved = registry.move(
        version.id, S.ADAPTING, S.CANDIDATE, blob_key="b", content_hash="h", quality=0.5, details={"b": 2, "c": [3]}
    )
    assert moved == registry.version(version.id)
    assert (moved.blob_key, moved.content_hash, moved.quality) == ("b", "h", 0.5)
    assert moved.details == {"a": 1, "b": 2, "c": [3]}
    kept = registry.move(version.id, S.CANDIDATE, S.READY)
    assert (kept.blob_key, kept.content_hash, kept.quality, kept.details) == ("b", "h", 0.5, moved.details)
    assert kept.updated_at >= moved.updated_at >= version.created_at == kept.created_at


def test_a_lost_swap_changes_nothing(registry: Registry):
    version = registry.add_version("intent", "v2", S.PLANNED)
    adapting = registry.move(version.id, S.PLANNED, S.ADAPTING)
    before = registry.events()
    with pytest.raises(ConflictError, match="intent@1 is adapting, not planned"):
        registry.move(version.id, S.PLANNED, S.ADAPTING, details={"x": 1})
    with pytest.raises(ConflictError, match="cannot go from adapting to live"):
        registry.move(version.id, S.ADAPTING, S.LIVE)
    assert registry.version(version.id) == adapting
    assert registry.events() == before


def test_promotion_retires_the_previous_version(registry: Registry):
    old = registry.add_version("intent", "v1", S.LIVE)
    new = walk(registry, registry.add_version("intent", "v2", S.PLANNED), *TO_CANARY)
    with pytest.raises(ConflictError, match="intent@1 is live"):
        registry.move(new.id, S.CANARY, S.LIVE)
    with pytest.raises(ConflictError, match="intent@1 is live"):
        registry.add_version("intent", "v2", S.LIVE)
    promoted = registry.promote(new.id)
    assert (promoted.status, registry.version(old.id).status) == (S.LIVE, S.RETIRED)
    with pytest.raises(ConflictError, match="is live"):
        registry.promote(new.id)
    assert registry.promote(old.id).status is S.LIVE
    assert registry.version(new.id).status is S.RETIRED


def test_routes_name_the_live_version_and_its_canary(registry: Registry):
    registry.add_adapter("fresh")
    walk(registry, registry.add_version("fresh", "v2", S.PLANNED), *TO_CANARY)
    live = registry.add_version("intent", "v1", S.LIVE)
    assert registry.routes()["intent"].live == live
    assert registry.routes()["intent"].canary is None
    canary = walk(registry, registry.add_version("intent", "v2", S.PLANNED), *TO_CANARY)
    assert set(registry.routes()) == {"intent"}
    assert registry.routes()["intent"].canary == canary
    registry.promote(canary.id)
    assert registry.routes()["intent"].live.id == canary.id
    assert registry.routes()["intent"].canary is None


def test_events_are_ordered_and_can_be_filtered(registry: Registry):
    version = registry.add_version("intent", "v1", S.LIVE)
    registry.log("canary_failure", version_id=version.id, reason="timeout", status=504)
    registry.log("note", adapter="intent")
    failure = registry.events(kind="canary_failure", version_id=version.id)[0]
    assert (failure.adapter, failure.details) == ("intent", {"reason": "timeout", "status": 504})
    later = registry.events(after_id=failure.id)
    assert [(event.kind, event.version_id) for event in later] == [("note", None)]
    ids = [event.id for event in registry.events()]
    assert ids == sorted(set(ids))


# Sequences of moves


def replay(registry: Registry) -> dict[int, Status]:
    statuses: dict[int, Status] = {}
    for event in registry.events():
        if event.kind == "added":
            statuses[event.version_id] = Status(event.details["status"])
        elif event.kind == "moved":
            assert statuses[event.version_id] == event.details["source"]
            statuses[event.version_id] = Status(event.details["target"])
    return statuses


def test_every_status_has_its_transitions_and_each_can_be_reached():
    assert set(TRANSITIONS) == set(Status)
    reached, frontier = set(), {S.PLANNED}
    while frontier:
        reached |= frontier
        frontier = {target for status in frontier for target in TRANSITIONS[status]} - reached
    assert reached == set(Status)


MOVES = st.tuples(st.integers(0, 3), st.sampled_from([None, *Status]), st.sampled_from([*Status, "promote"]))


@settings(deadline=None, max_examples=60)
@given(firsts=st.lists(st.sampled_from(list(Status)), min_size=1, max_size=4), moves=st.lists(MOVES, max_size=30))
def test_no_sequence_of_moves_breaks_the_rules(
    tmp_path_factory: pytest.TempPathFactory, firsts: list[Status], moves: list[tuple]
):
    registry = Registry(f"sqlite:///{tmp_path_factory.mktemp('moves')}/registry.db")
    populate(registry)
    expected: dict[int, Status] = {}
    for first in firsts:
        try:
            expected[registry.add_version("intent", "v1", first).id] = first
        except ConflictError:
            assert first is S.LIVE
            assert S.LIVE in expected.values()
    for index, source, target in moves:
        id = list(expected)[index % len(expected)]
        before = expected[id]
        source = source or before
        try:
            moved = registry.promote(id) if target == "promote" else registry.move(id, source, target)
        except ConflictError:
            if target == "promote":
                assert before not in (S.CANARY, S.RETIRED)
            else:
                is_second_live = target is S.LIVE and S.LIVE in expected.values()
                assert source != before or target not in TRANSITIONS[source] or is_second_live
        else:
            if target == "promote":
                expected = {k: S.RETIRED if status is S.LIVE else status for k, status in expected.items()}
            assert moved.status in TRANSITIONS[before]
            expected[id] = moved.status
        statuses = {version.id: version.status for version in registry.versions()}
        assert statuses == expected
        assert list(statuses.values()).count(S.LIVE) <= 1
    assert replay(registry) == expected
    registry.close()


# Concurrency


def claim(url: str, version_ids: list[int], worker: int) -> list[int]:
    registry, won = Registry(url), []
    for id in version_ids:
        try:
            registry.move(id, S.PLANNED, S.ADAPTING, details={"worker": worker})
            won.append(id)
        except ConflictError:
            pass
    registry.close()
    return won


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_one_of_many_claimants_wins_a_version(registry: Registry, url: str, kind: str):
    ids = [registry.add_version("intent", "v2", S.PLANNED).id for _ in range(25)]
    context = multiprocessing.get_context("spawn")
    pool = ThreadPoolExecutor(4) if kind == "threads" else ProcessPoolExecutor(4, mp_context=context)
    with pool:
        wins = [task.result() for task in [pool.submit(claim, url, ids, worker) for worker in range(4)]]
    assert sorted(id for won in wins for id in won) == ids
    for worker, won in enumerate(wins):
        assert all(registry.version(id).details == {"worker": worker} for id in won)
    assert replay(registry) == dict.fromkeys(ids, S.ADAPTING)


def test_threads_can_share_one_registry(registry: Registry):
    ids = [registry.add_version("intent", "v2", S.PLANNED).id for _ in range(20)]

    def work(id: int) -> str:
        registry.move(id, S.PLANNED, S.ADAPTING)
        registry.log("note", version_id=id)
        return registry.version(id).status

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, ids)) == {S.ADAPTING}
    assert len(registry.events(kind="note")) == 20


def write_for_ever(url: str) -> None:
    registry = Registry(url)
    while True:
        version = walk(registry, registry.add_version("intent", "v2", S.PLANNED), *TO_CANARY)
        registry.promote(version.id)


def test_a_killed_writer_leaves_only_complete_changes(registry: Registry, url: str):
    for _ in range(3):
        before = len(registry.events())
        writer = multiprocessing.get_context("spawn").Process(target=write_for_ever, args=(url,))
        writer.start()
        while len(registry.events()) < before + 20:
            assert writer.is_alive()
            time.sleep(0.01)
        writer.kill()
        writer.join()
        assert replay(registry) == {version.id: version.status for version in registry.versions()}
    registry.log("note")  # a dead process holds no lock


def write_much(url: str, worker: int) -> None:
    registry = Registry(url)
    for _ in range(10):
        version = registry.add_version("intent", "v2", S.PLANNED)
        registry.log("note", version_id=version.id, worker=worker)
        walk(registry, version, *TO_CANARY)
        registry.promote(version.id)
    registry.close()


def test_writers_wait_for_each_other_and_lose_nothing(registry: Registry, url: str):
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        for task in [pool.submit(write_much, url, worker) for worker in range(3)]:
            task.result()
    versions = registry.versions()
    assert [version.number for version in versions] == list(range(1, 31))
    assert [version.status for version in versions].count(S.LIVE) == 1
    assert len(registry.events(kind="note")) == 30
    assert replay(registry) == {version.id: version.status for version in versions}


def open_and_close(url: str) -> bool:
    Registry(url).close()
    return True


def test_many_processes_can_create_the_same_registry(url: str):
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert all(task.result() for task in [pool.submit(open_and_close, url) for _ in range(8)])


def test_a_new_registry_is_opened_while_another_process_writes_its_first_page(tmp_path: Path):
    path = tmp_path / "registry.db"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")  # SQLite refuses a change to the write-ahead log at once while this is held
        with ThreadPoolExecutor(1) as pool:
            opening = pool.submit(Registry, f"sqlite:///{path}")
            time.sleep(0.3)
            assert not opening.done()
            other.execute("COMMIT")
            opening.result().close()


# The database


def test_a_reopened_registry_has_its_content(registry: Registry, url: str):
    version = registry.add_version("intent", "v1", S.LIVE, details={"golden": [{"prompt": "ä", "completion": "\n"}]})
    again = Registry(url)
    assert again.version(version.id) == version
    assert again.events() == registry.events()
    again.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite:////no/such/folder/registry.db", "unable to open"),
        ("nonsense://x", "nonsense"),
        ("no url", "cannot be opened"),
    ],
)
def test_an_unreachable_registry_is_reported(url: str, words: str):
    with pytest.raises(StorageError, match=words):
        Registry(url)


def test_a_file_that_is_not_a_database_is_reported(tmp_path: Path):
    (tmp_path / "registry.db").write_bytes(b"something else entirely" * 100)
    with pytest.raises(StorageError, match="not a database"):
        Registry(f"sqlite:///{tmp_path}/registry.db")


def test_a_registry_that_fails_during_use_is_reported(tmp_path: Path):
    registry = Registry(f"sqlite:///{tmp_path}/registry.db")
    populate(registry)
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        connection.execute("DROP TABLE events")
    connection.close()
    for call in (registry.events, lambda: registry.log("note"), lambda: registry.add_version("intent", "v1", S.LIVE)):
        with pytest.raises(StorageError, match="events"):
            call()
    assert registry.versions() == []  # a version is never added without its event
    registry.close()


def test_a_password_never_shows_in_an_error():
    with pytest.raises(ReloraError) as raised:
        Registry("postgresql+absent://user:hunter2@127.0.0.1/db")
    assert "hunter2" not in str(raised.value)


def test_the_schema_is_valid_for_postgresql_too():
    dialect = postgresql.dialect()
    ddl = [str(CreateTable(table).compile(dialect=dialect)) for table in registry_tables.metadata.sorted_tables]
    indexes = [index for table in registry_tables.metadata.tables.values() for index in table.indexes]
    ddl += [str(CreateIndex(index).compile(dialect=dialect)) for index in indexes]
    assert any("SERIAL" in statement for statement in ddl)
    assert any("one_live_per_adapter" in s and "WHERE status = 'live'" in s for s in ddl)
