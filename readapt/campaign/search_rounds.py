"""The searches of many adapters at once, dealt out in rounds: a few candidates of one adapter, scored together.

Knows nothing of Ray. The caller asks for rounds, has them scored, and reports their losses.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.config.readapt import SearchConfig
from cluster.errors import TrainingError
from readapt.fusion.objective import SearchResult
from readapt.fusion.points import Point
from readapt.fusion.search import BayesianSearch


@dataclass(frozen=True)
class Round:
    """Candidates of one adapter to score. `search` is None in a round without any, which only loads the base."""

    version_id: int
    points: list[Point]
    search: BayesianSearch | None = None


class SearchRounds:
    """Runs one `BayesianSearch` per adapter. `report` gets each result, or the words of its failure.

    At most `config.concurrency` rounds run at once. Adapters are served in the order in which they were added. An
    adapter with a running round waits behind those without one, because its next round should know the running one's
    losses. All methods may be called from any thread.
    """

    def __init__(self, config: SearchConfig, report: Callable[[int, SearchResult | str], None]):
        self._config = config
        self._report = report
        self._lock = threading.Lock()
        self._searches: dict[int, BayesianSearch] = {}
        self._running: dict[str, Round] = {}
        self._num_to_warm_up = config.concurrency
        self._first_version_id: int | None = None
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether no more searches will come."""
        return self._is_closed

    def warm_up(self, version_id: int) -> None:
        """Announce an adapter that may need a search. The first one's empty rounds make the actors load the base."""
        with self._lock:
            if self._first_version_id is None:
                self._first_version_id = version_id

    def add(self, version_id: int, groups: tuple[str, ...] = ()) -> None:
        """Start the adapter's search, over these groups of its modules."""
        with self._lock:
            self._searches[version_id] = BayesianSearch(self._config, groups)

    def drop(self, version_id: int) -> None:
        """Stop the adapter's search, if it still runs."""
        with self._lock:
            self._searches.pop(version_id, None)

    def close(self) -> None:
        """Say that no more searches will come."""
        with self._lock:
            self._is_closed = True

    def begin(self, round_id: str) -> Round | None:
        """Return the next round, to be known as `round_id`, or None if there is none at present or after `close`."""
        with self._lock:
            has_room = not self._is_closed and len(self._running) < self._config.concurrency
            found = self._next_round() if has_room else None
            if found is not None:
                self._running[round_id] = found
            return found

    def end(self, round_id: str, losses: Sequence[float] | None) -> None:
        """Record a round's losses, or None if it could not be scored."""
        with self._lock:
            ended = self._running.pop(round_id)
            if ended.search is None:
                return
            ended.search.tell(ended.points, losses)
            if ended.search.is_over:
                self._searches.pop(ended.version_id, None)
                self._report(ended.version_id, _result(ended.search))

    def _next_round(self) -> Round | None:
        if self._num_to_warm_up and self._first_version_id is not None:
            self._num_to_warm_up -= 1
            return Round(self._first_version_id, [])
        ready = [version_id for version_id, search in self._searches.items() if search.can_ask]
        if not ready:
            return None
        busy = {running.version_id for running in self._running.values()}
        version_id = next((ready_id for ready_id in ready if ready_id not in busy), ready[0])
        search = self._searches[version_id]
        return Round(version_id, search.ask(), search)


def _result(search: BayesianSearch) -> SearchResult | str:
    try:
        return search.result()
    except TrainingError as error:
        return str(error)
