"""The engines of a fault run: when one dies or is stopped, the next one takes over."""

from collections import Counter

from bench.serving.chaos.events import Wave
from bench.serving.chaos.tally import Tally
from bench.serving.chaos.watch import WatchedEngine
from bench.serving.chaos.world import World
from serving.engine.loop import EngineLoop

_SHOWN = (
    "steps",
    "preemptions",
    "evictions",
    "overdue",
    "tokens_generated",
    "prefix_hit_tokens",
    "swap_pages_out",
    "swap_pages_in",
)


class Engines:
    """The current engine, replaced when it has died or stopped. `totals` sums up the engines that have ended."""

    def __init__(self, world: World, wave: Wave, tally: Tally):
        self._base = world.base
        self._packed_dir = world.folder / "packed" if wave.keeps_packed else None
        self._config = wave.config()
        self._tally = tally
        self.totals: Counter[str] = Counter()
        self.longest_share = 0.0  # the largest share of its bound that a request waited
        self._open()

    def current(self) -> EngineLoop:
        """Return a loop that takes requests."""
        if not self._loop.is_healthy:
            self._end()
            self._open()
        return self._loop

    def crash(self) -> None:
        """Make the next step fail."""
        self._may_end = self._engine.should_fail = True

    def stop(self) -> None:
        """Stop the current engine; running requests end with ABORT."""
        if self._loop.is_healthy:
            self._may_end = True
            self._loop.stop()

    def close(self) -> None:
        """Stop the last engine."""
        self.stop()
        self._end()

    def _open(self) -> None:
        engine = WatchedEngine.open(self._base, self._config)
        assert isinstance(engine, WatchedEngine)
        self._engine, self._may_end = engine, False
        self._loop = EngineLoop(engine, packed_dir=self._packed_dir)
        self._loop.start()

    def _end(self) -> None:
        if not self._may_end:
            self._tally.unexplained["an engine died that was not told to"] += 1
        watch, stats = self._engine.watch, self._engine.stats()
        self.totals.update({key: int(stats[key]) for key in _SHOWN})
        self.totals.update(
            engines=1,
            integrity_checks=self._engine.num_checks,
            admissions=watch.num_admitted,
            max_wait_bound_violations=watch.num_violations,
        )
        self.longest_share = max(self.longest_share, watch.longest_share)
