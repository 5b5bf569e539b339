"""Progress as dated lines, the same in a terminal and in a log: what happened, when, how much is left."""

import time
from collections.abc import Callable

Say = Callable[[str], None]


def dated(write: Say, clock: Callable[[], float] = time.time) -> Say:
    """Return a function that writes a line with the time of day before it."""
    return lambda line: write(f"{time.strftime('%H:%M:%S', time.localtime(clock()))} {line}")


class Counted:
    """Counts pieces of work that take similar times, and says how long the rest will take.

    `update` says a line when `every_s` seconds have passed since the last one. Work that is done sooner says nothing.
    """

    def __init__(self, what: str, say: Say, every_s: float = 0.0, clock: Callable[[], float] = time.monotonic):
        self._what, self._say, self._every_s, self._clock = what, say, every_s, clock
        self._began_s = self._said_s = clock()

    def update(self, num_done: int, total: int, text: str = "") -> None:
        """Report that `num_done` of `total` are done; `text` says which was the last."""
        now_s = self._clock()
        if now_s - (self._said_s if num_done < total else self._began_s) < self._every_s:
            return
        self._said_s = now_s
        self._say(f"{self._what} {num_done} of {total}{self._left(now_s, num_done, total)}{text and f': {text}'}")

    def _left(self, now_s: float, num_done: int, total: int) -> str:
        if not 0 < num_done < total:
            return ""
        return f" (about {duration((now_s - self._began_s) / num_done * (total - num_done))} left)"


def duration(seconds: float) -> str:
    """Return a duration for a person to read."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
