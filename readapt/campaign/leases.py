"""Which campaigns are alive: each counts its heartbeats in the registry and watches those of the others.

A campaign beats every `lease_s / 5` seconds. To another, it is dead after `lease_s` without a new beat. The watcher
counts from its own first look, on its own monotonic clock, so the machines' clocks need not agree. Process ids are not
used, because they mean nothing between containers.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

from cluster.errors import StorageError
from cluster.registry.registry import Registry


class LeaseWatch:
    """Watches which campaigns still beat."""

    def __init__(self, registry: Registry, lease_s: float):
        self._registry = registry
        self._lease_s = lease_s
        self._seen: dict[str, tuple[int, float]] = {}  # the number of beats, and when it last changed

    def is_dead(self, campaign: str) -> bool:
        """Return whether the campaign has been silent for a whole lease."""
        now_s = time.monotonic()
        num_beats = self._registry.beats().get(campaign, 0)
        if campaign not in self._seen or self._seen[campaign][0] != num_beats:
            self._seen[campaign] = num_beats, now_s
        _, changed_at_s = self._seen[campaign]
        if now_s - changed_at_s <= self._lease_s:
            return False
        self._registry.end_beats(campaign)
        self._seen[campaign] = 0, changed_at_s
        return True


@contextlib.contextmanager
def heartbeat(registry: Registry, campaign: str, every_s: float) -> Iterator[None]:
    """Beat during the block, from a thread: at once, then every `every_s` seconds."""
    is_over = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(StorageError):  # the database may miss one beat
                registry.beat(campaign)
            if is_over.wait(every_s):
                return

    thread = threading.Thread(target=beat, daemon=True, name="campaign-heartbeat")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        with contextlib.suppress(StorageError):
            registry.end_beats(campaign)
