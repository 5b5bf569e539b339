"""The load queue: an adapter that keeps failing is not retried for a while; one success clears its failures."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from cluster.errors import InvalidAdapterError, OverloadedError, ReloraError, StorageError
from serving.engine.adapter_loader import LoadQueue


@dataclass
class Store:
    """A store with one adapter that can fail, a load queue in front of it, and a clock that tests set."""

    now: float = 0.0
    error: ReloraError | None = None
    num_tries: int = 0
    queue: LoadQueue = field(init=False)

    def __post_init__(self) -> None:
        self.queue = LoadQueue(1, clock=lambda: self.now)

    def ask(self) -> ReloraError | None:
        """Ask for the adapter and return the error, if any."""
        load: Future[None] = self.queue.ask("key", self._work)
        error = load.exception(timeout=20)
        assert error is None or isinstance(error, ReloraError)
        return error

    def _work(self) -> None:
        self.num_tries += 1
        if self.error is not None:
            raise self.error


def test_pauses_double_while_loads_keep_failing() -> None:
    store = Store(error=InvalidAdapterError("no such luck"))
    tried_at = []
    while store.now < 200:
        num_tries = store.num_tries
        assert str(store.ask()) == "no such luck"
        if store.num_tries > num_tries:
            tried_at.append(store.now)
        store.now += 0.5
    pauses = [later - earlier for earlier, later in pairwise(tried_at)]
    assert pauses[2:9] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert set(pauses[9:]) == {32.0}


def test_first_failures_cost_no_pause_and_a_success_clears_them() -> None:
    store = Store()
    for _ in range(5):
        for error in (ReloraError("once"), ReloraError("twice"), None):
            store.error = error
            assert str(store.ask()) == str(error)
    assert store.num_tries == 15


def test_a_full_host_does_not_count_against_the_adapter() -> None:
    store = Store(error=OverloadedError("full"))
    for _ in range(5):
        assert isinstance(store.ask(), OverloadedError)
    assert store.num_tries == 5


def test_a_load_that_never_started_does_not_count_against_the_adapter() -> None:
    store, is_open = Store(), threading.Event()
    hanging = store.queue.ask("hanging", lambda: assert_set(is_open))
    for _ in range(5):
        queued = store.queue.ask("key", store._work)
        store.queue.give_up("key", queued, 1.0)
        assert isinstance(queued.exception(timeout=20), StorageError)
    is_open.set()
    assert hanging.exception(timeout=20) is None
    assert store.ask() is None
    assert store.num_tries == 1


def assert_set(event: threading.Event) -> None:
    assert event.wait(20)


def test_oldest_failures_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engine.adapter_loader._MAX_FAILING_KEYS", 3)
    store = Store(error=ReloraError("down"))
    for number in range(9):
        assert store.queue.ask(f"{number}", store._work).exception(timeout=20)
    assert list(store.queue._failures) == ["6", "7", "8"]
