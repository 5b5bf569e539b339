"""An engine under watch: its integrity is checked every few steps, and the bound on waiting at every admission."""

from collections import OrderedDict
from typing import Any

from serving.adapters.residency import Residency
from serving.engine.engine import Engine
from serving.engine.request import TokenEvent
from serving.engine.sequence import SequenceState
from serving.engine.waiting import FlowKey, WaitingQueue

CHECK_EVERY_STEPS = 10


class InjectedError(Exception):
    """The error of a step that was told to fail."""


class BoundWatch:
    """Counts arrivals and admissions on its own, and checks them against the bound of `serving.engine.waiting`.

    A request with p requests before it in its flow may see at most (p + 1) (K + A) + p admissions of others. K is
    `max_overtakes`, and A the most other flows that wait at once meanwhile. `longest_share` is the largest share of
    its bound that a request has waited.
    """

    def __init__(self, max_overtakes: int):
        self._max_overtakes = max_overtakes
        self._flows: dict[FlowKey, OrderedDict[SequenceState, None]] = {}
        self._arrivals: dict[SequenceState, tuple[int, int]] = {}  # admissions before it, and requests of its flow
        self._most_flows = [0]  # after each number of admissions: the most flows waiting at once
        self.num_admitted = 0
        self.num_violations = 0
        self.longest_share = 0.0

    def came(self, flow: FlowKey, sequence: SequenceState) -> None:
        """Record a sequence that starts waiting."""
        waiting = self._flows.setdefault(flow, OrderedDict())
        self._arrivals[sequence] = (self.num_admitted, len(waiting))
        waiting[sequence] = None
        self._most_flows[-1] = max(self._most_flows[-1], len(self._flows))

    def left(self, flow: FlowKey, sequence: SequenceState) -> None:
        """Record a sequence that stops waiting."""
        del self._arrivals[sequence]
        del self._flows[flow][sequence]
        if not self._flows[flow]:
            del self._flows[flow]

    def check(self, sequence: SequenceState) -> None:
        """Check a sequence about to be admitted against its bound."""
        came_at, num_before = self._arrivals[sequence]
        num_waited = self.num_admitted - came_at
        most_others = max(self._most_flows[came_at:]) - 1
        bound = (num_before + 1) * (self._max_overtakes + most_others) + num_before
        self.num_violations += num_waited > bound
        self.longest_share = max(self.longest_share, num_waited / bound)

    def count_admission(self) -> None:
        """Count an admission, after `left`."""
        self.num_admitted += 1
        self._most_flows.append(len(self._flows))


class WatchedQueue(WaitingQueue):
    """A waiting queue that reports everything to a watch."""

    watch: BoundWatch

    def add(self, sequence: SequenceState) -> None:
        """See `WaitingQueue.add`."""
        super().add(sequence)
        self.watch.came(_flow_of(sequence), sequence)

    def admit(self, sequence: SequenceState, num_tokens: int) -> None:
        """See `WaitingQueue.admit`, which removes it."""
        self.watch.check(sequence)
        super().admit(sequence, num_tokens)
        self.watch.count_admission()

    def remove(self, sequence: SequenceState) -> None:
        """See `WaitingQueue.remove`."""
        super().remove(sequence)
        self.watch.left(_flow_of(sequence), sequence)


class WatchedEngine(Engine):
    """An engine that checks its integrity every few steps, and fails a step when told to."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.watch = BoundWatch(self.config.max_overtakes)
        self.num_checks = 0
        self.num_steps = 0
        self.should_fail = False
        queue = self._scheduler._waiting
        queue.__class__ = WatchedQueue  # in place, so that the scheduler need not know of the watch
        assert isinstance(queue, WatchedQueue)
        queue.watch = self.watch

    def step(self) -> list[TokenEvent]:
        """See `Engine.step`."""
        if self.should_fail:
            raise InjectedError("this step was told to fail")
        events = super().step()
        self.num_steps += 1
        if self.num_steps % CHECK_EVERY_STEPS == 0:
            self.check_integrity()
        return events

    def check_integrity(self) -> None:
        """See `Engine.check_integrity`."""
        super().check_integrity()
        self.num_checks += 1

    def residencies(self) -> list[Residency]:
        """See `Engine.residencies`. Checks integrity first, so that other threads can ask for it through the loop."""
        self.check_integrity()
        return super().residencies()


def _flow_of(sequence: SequenceState) -> FlowKey:
    return sequence.request.terms.priority, sequence.adapter_key
