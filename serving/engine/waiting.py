"""Who is next of those who wait: fair between adapters, kind to those that are resident, with a bound on waiting.

Requests of one adapter and one priority wait in one flow, in the order of arrival. Of the flows of the most urgent
priority (the lowest number) the one is next whose adapter has been given the fewest tokens (the virtual token counter
of arXiv 2401.00588, with adapters for clients); one whose adapter is in the arena may go before it as long as it is no
more than CLUSTERING_TOKENS ahead (adapter clustering, S-LoRA, arXiv 2311.03285, appendix). Neither wish keeps a flow
from waiting for ever: others may always be more urgent, or new. Hence the age bound:

    Let a flow have a request waiting, let A other flows wait at the moment when the flow began to wait or was last
    admitted, whichever was later, and let K = max_overtakes. Then its first request is admitted after at most K + A
    admissions of others, whatever comes meanwhile.

Proof. `_flows` is ordered by that moment, since a flow that comes or is admitted is moved to its end. So at most A
flows are before it, and nobody ever gets before it later. Once K admissions have passed, the flow is due, and so are
all before it. From then on `choose` returns the first flow of `_flows`, whose admission moves it behind ours or ends
it; after at most A such admissions ours is the first. Flows that end otherwise only shorten this. A request with p
before it in its flow is thus admitted after at most (p + 1) (K + A') + p others, A' the most flows that ever wait at
once. Those that run and are preempted come back before anyone who waits, and count as admitted once.
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cluster.errors import OverloadedError, TenantLimitError
from serving.engine.sequence import SequenceState

CLUSTERING_TOKENS = 1024
# How many flows are looked at for one that is resident: enough to find one, few enough to look at every time.
_CLUSTERING_FLOWS = 32
_LEAST_COUNTS = 256  # of tokens given, before any are forgotten

FlowKey = tuple[int, str | None]  # priority, adapter
Place = tuple[int, int, int, FlowKey]  # priority, tokens, a number of its own, flow


@dataclass(eq=False)
class _Flow:
    """The waiting requests of one adapter and priority; owned by WaitingQueue."""

    place: Place
    since: int  # admissions when it began to wait or was last admitted
    waiting: OrderedDict[SequenceState, None] = field(default_factory=OrderedDict)


class WaitingQueue:
    """The owner of the order of those who wait for their first step. `max_per_tenant` None is no limit."""

    def __init__(
        self, is_resident: Callable[[str], bool], *, max_waiting: int, max_per_tenant: int | None, max_overtakes: int
    ):
        self._is_resident = is_resident
        self._max_waiting = max_waiting
        self._max_per_tenant = max_per_tenant
        self._max_overtakes = max_overtakes
        self._flows: OrderedDict[FlowKey, _Flow] = OrderedDict()  # longest without an admission first
        self._places: list[Place] = []  # in fair order
        self._tokens: dict[FlowKey, int] = {}  # given to each flow; a newcomer counts as having had its floor
        self._floors: Counter[int] = Counter()  # by priority: flows of different ones do not compete
        self._max_counts = _LEAST_COUNTS
        self._num_admitted = 0
        self._num_flows = 0  # that ever came
        self._per_tenant: Counter[str] = Counter()
        self._deadlines: list[tuple[float, int, SequenceState]] = []  # may hold sequences that do not wait any more
        self._num_deadlines = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[SequenceState]:
        for flow in self._flows.values():
            yield from flow.waiting

    def check_room(self, tenant: str) -> None:
        """Raise OverloadedError if the queue is full, TenantLimitError if the tenant's share of it is."""
        if self._length >= self._max_waiting:
            raise OverloadedError(f"the queue is full: {self._length} requests are waiting")
        num_own = self._per_tenant[tenant] if self._max_per_tenant is not None else 0
        if self._max_per_tenant is not None and num_own >= self._max_per_tenant:
            raise TenantLimitError(f"{num_own} requests of this API key are waiting, no more are taken")

    def add(self, sequence: SequenceState) -> None:
        """Let a sequence wait."""
        key = _flow_of(sequence)
        if key not in self._flows:
            self._begin(key)
        self._flows[key].waiting[sequence] = None
        self._length += 1
        self._per_tenant[sequence.request.terms.tenant] += 1
        if sequence.deadline_at is not None:
            self._num_deadlines += 1
            heapq.heappush(self._deadlines, (sequence.deadline_at, self._num_deadlines, sequence))
            if len(self._deadlines) > 2 * self._length + 64:
                self._deadlines = [entry for entry in self._deadlines if self._does_wait(entry[2])]
                heapq.heapify(self._deadlines)

    def choose(self) -> SequenceState | None:
        """Who is next; it stays until `admit` or `remove`."""
        if not self._flows:
            return None
        oldest = next(iter(self._flows.values()))
        is_due = self._num_admitted - oldest.since >= self._max_overtakes
        return next(iter((oldest if is_due else self._preferred()).waiting))

    def upcoming(self, num_flows: int) -> list[str]:
        """The adapters of the first flows in fair order."""
        return [adapter for *_, (_, adapter) in self._places[:num_flows] if adapter is not None]

    def admit(self, sequence: SequenceState, num_tokens: int) -> None:
        """Let a sequence go to its first step, in which its flow is given so many tokens."""
        key = _flow_of(sequence)
        self._num_admitted += 1
        priority, num_least, *_ = self._places[0]
        self._floors[priority] = max(self._floors[priority], num_least)
        self._flows[key].since = self._num_admitted
        self._flows.move_to_end(key)
        self.charge(sequence, num_tokens)
        self.remove(sequence)

    def charge(self, sequence: SequenceState, num_tokens: int) -> None:
        """Count tokens that a sequence's flow has been given."""
        key = _flow_of(sequence)
        self._tokens[key] = self._num_given(key) + num_tokens
        flow = self._flows.get(key)
        if flow is not None:
            self._leave_place(flow)
            flow.place = (key[0], self._tokens[key], flow.place[2], key)
            insort(self._places, flow.place)

    def remove(self, sequence: SequenceState) -> None:
        """Let a sequence go."""
        key = _flow_of(sequence)
        flow = self._flows[key]
        del flow.waiting[sequence]
        self._length -= 1
        self._per_tenant[sequence.request.terms.tenant] -= 1
        if not self._per_tenant[sequence.request.terms.tenant]:
            del self._per_tenant[sequence.request.terms.tenant]
        if not flow.waiting:
            self._leave_place(flow)
            del self._flows[key]

    def overdue(self, now: float) -> Iterator[SequenceState]:
        """Those who wait although their deadline has passed; each is told once."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heapq.heappop(self._deadlines)
            if self._does_wait(sequence):
                yield sequence

    def check_integrity(self) -> None:
        """Assert that flows, places and counts agree."""
        assert sorted(flow.place for flow in self._flows.values()) == self._places, "a flow has no place"
        assert self._length == sum(self._per_tenant.values()) == sum(1 for _ in self), "the length drifted"
        assert all(flow.waiting for flow in self._flows.values()), "an empty flow waits"
        since = [flow.since for flow in self._flows.values()]
        assert since == sorted(since), "the flows are not in the order of their last admission"

    def _begin(self, key: FlowKey) -> None:
        self._num_flows += 1
        self._prune()
        place = (key[0], self._num_given(key), self._num_flows, key)
        flow = self._flows[key] = _Flow(place, since=self._num_admitted)
        insort(self._places, flow.place)

    def _preferred(self) -> _Flow:
        """The first flow in fair order, or a resident one that is not far ahead of it."""
        priority, tokens, _, first = self._places[0]
        for place in self._places[:_CLUSTERING_FLOWS]:
            if place[0] != priority or place[1] > tokens + CLUSTERING_TOKENS:
                break
            adapter = place[3][1]
            if adapter is None or self._is_resident(adapter):
                return self._flows[place[3]]
        return self._flows[first]

    def _leave_place(self, flow: _Flow) -> None:
        index = bisect_left(self._places, flow.place)
        assert self._places[index] is flow.place, "a flow is not at its place"
        del self._places[index]

    def _does_wait(self, sequence: SequenceState) -> bool:
        flow = self._flows.get(_flow_of(sequence))
        return flow is not None and sequence in flow.waiting

    def _num_given(self, key: FlowKey) -> int:
        return max(self._tokens.get(key, 0), self._floors[key[0]])

    def _prune(self) -> None:
        """Forget counts that say no more than the floor does, whenever there are twice as many as were left then."""
        if len(self._tokens) > self._max_counts:
            self._tokens = {key: num for key, num in self._tokens.items() if num > self._floors[key[0]]}
            self._max_counts = max(2 * len(self._tokens), _LEAST_COUNTS)


def _flow_of(sequence: SequenceState) -> FlowKey:
    return sequence.request.terms.priority, sequence.adapter_key
