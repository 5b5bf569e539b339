"""Which campaigns are alive: signs of life in the registry, and the watch over those of others.

Each campaign gives one every `lease_s / 5` seconds, and is taken for dead when another has watched for `lease_s` and
seen none. Counting from the watcher's first look, on its own monotonic clock, needs no agreement of clocks between
machines and no process ids, which mean nothing between containers.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

from cluster.errors import StorageError
from cluster.registry import Registry


class LeaseWatch:
    """Knows which campaigns still give signs of life, as seen since this watch began."""

    def __init__(self, registry: Registry, lease_s: float):
        self._registry = registry
        self._lease_s = lease_s
        self._seen: dict[str, tuple[int, float]] = {}  # the number of beats, and when it was new

    def is_dead(self, campaign: str) -> bool:
        """Whether it has been silent for a whole lease."""
        now_s = time.monotonic()
        num_beats = self._registry.beats().get(campaign, 0)
        if campaign not in self._seen or self._seen[campaign][0] != num_beats:
            self._seen[campaign] = num_beats, now_s
        _, new_at_s = self._seen[campaign]
        if now_s - new_at_s <= self._lease_s:
            return False
        self._registry.end_beats(campaign)
        self._seen[campaign] = 0, new_at_s
        return True


@contextlib.contextmanager
def heartbeat(registry: Registry, campaign: str, every_s: float) -> Iterator[None]:
    """Gives a sign of life from a thread, at once and then every `every_s`, and takes leave at the end."""
    is_over = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(StorageError):  # a database that is away for one beat is not the end
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
