"""Choose which waiting request runs next: fair between adapters, resident ones preferred, with a bound on waiting.

Requests of one adapter and one priority wait in one flow, in the order of arrival. Flows of the most urgent priority
(the lowest number) go first, except under the last of these rules:

- Fairness: the flow is next whose adapter has been given the fewest tokens (virtual token counter, arXiv 2401.00588,
  with adapters as clients).
- Clustering: a flow whose adapter is in the arena may go before it, if it has been given at most CLUSTERING_TOKENS
  more (adapter clustering, S-LoRA, arXiv 2311.03285, appendix).
- Age: new or more urgent flows may keep coming, so the rules so far bound no waiting time. A flow is due when
  `max_overtakes` requests were admitted since it began to wait or was last admitted, whichever is later. The oldest
  due flow goes before all others, whatever their priority.

The bound. Let a flow have a request waiting. Let A be the number of other flows that wait at the moment when it began
to wait or was last admitted, whichever is later. Let K = max_overtakes. Then its first request is admitted after at
most K + A admissions of others, whatever comes meanwhile.

Proof. `_flows` is ordered by that moment, since a flow that comes or is admitted moves to the end. So at most A flows
are before ours, and no flow gets before it later. After K admissions our flow is due, and so are all flows before it.
From then on `choose` returns the first flow of `_flows`. Its admission moves it behind ours, or ends it. After at most
A such admissions ours is first. Flows that end in another way only shorten this.

A request with p requests before it in its flow is thus admitted after at most (p + 1) (K + A') + p others, where A' is
the largest number of flows that wait at once. Preempted sequences run before waiting ones, and count as admitted once.
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cluster.errors import OverloadedError, TenantLimitError
from serving.engine.sequence import SequenceState

CLUSTERING_TOKENS = 1024
_CLUSTERING_FLOWS = 32  # flows to search for a resident adapter: enough to find one, few enough to search every time
_MIN_COUNTS = 256  # token counts to keep before any are forgotten

FlowKey = tuple[int, str | None]  # priority, adapter
Place = tuple[int, int, int, FlowKey]  # priority, tokens given, a unique number, flow


@dataclass(eq=False)
class _Flow:
    """The waiting requests of one adapter and priority; owned by WaitingQueue."""

    place: Place
    since: int  # the number of admissions when it began to wait or was last admitted
    waiting: OrderedDict[SequenceState, None] = field(default_factory=OrderedDict)


class WaitingQueue:
    """Owns the order of the sequences that wait for their first step. `max_per_tenant` None means no limit."""

    def __init__(
        self, is_resident: Callable[[str], bool], *, max_waiting: int, max_per_tenant: int | None, max_overtakes: int
    ):
        self._is_resident = is_resident
        self._max_waiting = max_waiting
        self._max_per_tenant = max_per_tenant
        self._max_overtakes = max_overtakes
        self._flows: OrderedDict[FlowKey, _Flow] = OrderedDict()  # the one with the oldest admission first
        self._places: list[Place] = []  # in fair order
        self._tokens: dict[FlowKey, int] = {}  # given to each flow; a new flow starts at its floor
        self._floors: Counter[int] = Counter()  # of token counts, by priority: only flows of one priority compete
        self._max_counts = _MIN_COUNTS
        self._num_admitted = 0
        self._num_flows = 0  # ever
        self._per_tenant: Counter[str] = Counter()
        self._deadlines: list[tuple[float, int, SequenceState]] = []  # some may have left since
        self._num_deadlines = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[SequenceState]:
        for flow in self._flows.values():
            yield from flow.waiting

    def check_room(self, tenant: str) -> None:
        """Raise OverloadedError if the queue is full, TenantLimitError if the tenant has used up its share of it."""
        if self._length >= self._max_waiting:
            raise OverloadedError(f"the queue is full: {self._length} requests are waiting")
        num_own = self._per_tenant[tenant] if self._max_per_tenant is not None else 0
        if self._max_per_tenant is not None and num_own >= self._max_per_tenant:
            raise TenantLimitError(
                f"{num_own} requests of this API key are waiting already: retry when one has started"
            )

    def add(self, sequence: SequenceState) -> None:
        """Add a sequence to the end of its flow."""
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
        """Return the sequence that is next. It stays in the queue until `admit` or `remove`."""
        if not self._flows:
            return None
        oldest = next(iter(self._flows.values()))
        is_due = self._num_admitted - oldest.since >= self._max_overtakes
        return next(iter((oldest if is_due else self._preferred()).waiting))

    def upcoming(self, num_flows: int) -> list[str]:
        """Return the adapters of the first flows in fair order."""
        return [adapter for *_, (_, adapter) in self._places[:num_flows] if adapter is not None]

    def admit(self, sequence: SequenceState, num_tokens: int) -> None:
        """Remove a sequence that starts to run. Its first step gives its flow `num_tokens` tokens."""
        key = _flow_of(sequence)
        self._num_admitted += 1
        priority, num_least, *_ = self._places[0]
        self._floors[priority] = max(self._floors[priority], num_least)
        self._flows[key].since = self._num_admitted
        self._flows.move_to_end(key)
        self.charge(sequence, num_tokens)
        self.remove(sequence)

    def charge(self, sequence: SequenceState, num_tokens: int) -> None:
        """Add to the number of tokens that a sequence's flow has been given."""
        key = _flow_of(sequence)
        self._tokens[key] = self._num_given(key) + num_tokens
        flow = self._flows.get(key)
        if flow is not None:
            self._leave_place(flow)
            flow.place = (key[0], self._tokens[key], flow.place[2], key)
            insort(self._places, flow.place)

    def remove(self, sequence: SequenceState) -> None:
        """Remove a sequence from the queue."""
        key = _flow_of(sequence)
        tenant = sequence.request.terms.tenant
        flow = self._flows[key]
        del flow.waiting[sequence]
        self._length -= 1
        self._per_tenant[tenant] -= 1
        if not self._per_tenant[tenant]:
            del self._per_tenant[tenant]
        if not flow.waiting:
            self._leave_place(flow)
            del self._flows[key]

    def overdue(self, now: float) -> Iterator[SequenceState]:
        """Yield each waiting sequence once after its deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heapq.heappop(self._deadlines)
            if self._does_wait(sequence):
                yield sequence

    def check_integrity(self) -> None:
        """Assert that flows, places and counts agree."""
        assert sorted(flow.place for flow in self._flows.values()) == self._places, "a flow and its place differ"
        assert self._length == sum(self._per_tenant.values()) == sum(1 for _ in self), "the length is wrong"
        assert all(flow.waiting for flow in self._flows.values()), "a flow is empty"
        since = [flow.since for flow in self._flows.values()]
        assert since == sorted(since), "the flows are not in the order of their last admission"

    def _begin(self, key: FlowKey) -> None:
        self._num_flows += 1
        self._prune()
        place = (key[0], self._num_given(key), self._num_flows, key)
        flow = self._flows[key] = _Flow(place, since=self._num_admitted)
        insort(self._places, flow.place)

    def _preferred(self) -> _Flow:
        """Return the first flow in fair order, or one with a resident adapter that is not far ahead of it."""
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
        assert self._places[index] is flow.place, "a flow's place is lost"
        del self._places[index]

    def _does_wait(self, sequence: SequenceState) -> bool:
        flow = self._flows.get(_flow_of(sequence))
        return flow is not None and sequence in flow.waiting

    def _num_given(self, key: FlowKey) -> int:
        return max(self._tokens.get(key, 0), self._floors[key[0]])

    def _prune(self) -> None:
        """Forget counts at or below the floor. Runs when there are twice as many counts as the last time left."""
        if len(self._tokens) > self._max_counts:
            self._tokens = {key: num for key, num in self._tokens.items() if num > self._floors[key[0]]}
            self._max_counts = max(2 * len(self._tokens), _MIN_COUNTS)


def _flow_of(sequence: SequenceState) -> FlowKey:
    return sequence.request.terms.priority, sequence.adapter_key
