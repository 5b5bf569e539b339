"""The waiting queue keeps the bound that its docstring proves, under random operations."""

import random
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.request import AdapterRef, Request, SamplingParams, Terms
from serving.engine.sequence import SequenceState
from serving.engine.waiting import FlowKey, WaitingQueue
from tests.worlds.serving import make_sequence


class QueueModel:
    """A waiting queue, with each flow's overtakes counted as in the bound of `serving.engine.waiting`."""

    def __init__(self, max_overtakes: int):
        self.resident: set[str] = set()
        self.max_overtakes = max_overtakes
        self.queue = WaitingQueue(
            self.resident.__contains__, max_waiting=10**6, max_per_tenant=None, max_overtakes=max_overtakes
        )
        self.waiting: dict[FlowKey, deque[SequenceState]] = {}
        self.overtakes: dict[FlowKey, int] = {}
        self.allowed: dict[FlowKey, int] = {}

    def restart(self, key: FlowKey) -> None:
        self.overtakes[key], self.allowed[key] = 0, self.max_overtakes + len(self.waiting.keys() - {key})

    def add(self, key: FlowKey) -> None:
        priority, adapter = key
        ref = AdapterRef(adapter, adapter, 1, "") if adapter else None
        sequence = make_sequence(Request("", (1,), SamplingParams(), ref, terms=Terms(priority)), 2)
        if key not in self.waiting:
            self.waiting[key] = deque()
            self.restart(key)
        self.waiting[key].append(sequence)
        self.queue.add(sequence)

    def pop(self, key: FlowKey, sequence: SequenceState) -> None:
        self.waiting[key].remove(sequence)
        if not self.waiting[key]:
            del self.waiting[key], self.overtakes[key], self.allowed[key]

    def admit(self, num_tokens: int) -> None:
        chosen = self.queue.choose()
        assert (chosen is None) == (not self.waiting)
        if chosen is None:
            return
        key = (chosen.request.terms.priority, chosen.adapter_key)
        assert chosen is self.waiting[key][0], "the chosen request is not the first of its flow"
        self.queue.admit(chosen, num_tokens)
        for other in self.waiting.keys() - {key}:
            self.overtakes[other] += 1
            assert self.overtakes[other] <= self.allowed[other], f"{other} waits too long"
        self.pop(key, chosen)
        if key in self.waiting:
            self.restart(key)


FLOWS = [(priority, adapter) for priority in (0, 1) for adapter in (None, "a", "b", "c", "d")]


@st.composite
def histories(draw: st.DrawFn) -> list[tuple]:
    """Draw operations. A few hot flows get most requests, as many as are admitted, so that others could starve."""
    hot = draw(st.lists(st.sampled_from(FLOWS), min_size=1, max_size=3))
    usual = st.tuples(st.just("add"), st.sampled_from(hot)), st.tuples(st.just("admit"), st.sampled_from([1, 50, 5000]))
    rare = (
        st.tuples(st.just("add"), st.sampled_from(FLOWS)),
        st.tuples(st.just("remove"), st.sampled_from(FLOWS)),
        st.tuples(st.just("reside"), st.sampled_from("abcd")),
    )
    return draw(st.lists(st.one_of(*usual, *usual, *usual, *rare), min_size=20, max_size=150))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3), histories())
def test_no_flow_waits_longer_than_the_bound(max_overtakes: int, operations: list[tuple]) -> None:
    model = QueueModel(max_overtakes)
    for operation, what in operations:
        if operation == "add":
            model.add(what)
        elif operation == "admit":
            model.admit(what)
        elif operation == "remove" and what in model.waiting:
            sequence = model.waiting[what][-1]
            model.queue.remove(sequence)
            model.pop(what, sequence)
        elif operation == "reside":
            model.resident ^= {what}
        model.queue.check_integrity()
    assert len(model.queue) == sum(map(len, model.waiting.values()))


def test_a_stream_of_urgent_requests_does_not_starve_the_rest() -> None:
    model = QueueModel(max_overtakes=8)
    model.add((5, "cold"))
    for number in range(30):
        model.add((0, f"new-{number}"))
        model.resident.add(f"new-{number}")
        model.admit(1)
    assert (5, "cold") not in model.waiting


def test_urgent_requests_do_not_change_the_counts_of_others() -> None:
    model = QueueModel(max_overtakes=100)
    for key, num_tokens in (((0, "much"), 9000), ((0, "little"), 10), ((-1, "urgent"), 10**6), ((-1, "urgent"), 1)):
        model.add(key)
        model.admit(num_tokens)
    for key in ((0, "much"), (0, "little"), (-1, "urgent")):
        model.add(key)
    order = []
    while (chosen := model.queue.choose()) is not None:
        order.append(chosen.adapter_key)
        model.admit(1)
    assert order == ["urgent", "little", "much"]


def test_removed_sequences_are_not_kept_for_a_far_deadline() -> None:
    model = QueueModel(max_overtakes=4)
    request = Request("", (1,), SamplingParams())
    for _ in range(1000):
        model.queue.add(sequence := make_sequence(request, 2, deadline_at=1e9))
        model.queue.remove(sequence)
    assert len(model.queue._deadlines) < 100
    model.queue.add(late := make_sequence(request, 2, deadline_at=1e9))
    assert list(model.queue.overdue(2e9)) == [late]


def test_ten_thousand_waiting_sequences_cost_little() -> None:
    model = QueueModel(max_overtakes=64)
    draw = random.Random(0)
    for number in range(10_000):
        model.queue.add(make_sequence(Request("", (1,), SamplingParams(), AdapterRef(f"{number % 997}", "", 1, "")), 2))
    for sequence in draw.sample(list(model.queue), 2_000):
        model.queue.remove(sequence)
    while (sequence := model.queue.choose()) is not None:
        model.queue.admit(sequence, draw.randint(1, 500))
    assert len(model.queue) == 0
