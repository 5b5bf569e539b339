"""The scheduler: which sequences run, wait or are preempted, and that all memory is freed."""

import random

import pytest

from cluster.errors import InvalidRequestError, NotFoundError, OverloadedError, TenantLimitError
from serving.engine.sequence import SequenceState
from serving.engine.waiting import CLUSTERING_TOKENS
from tests.worlds.scheduler import Chunk, TinyScheduler, chunks_of, is_full, packed_adapter


def num_output(sequence: SequenceState) -> int:
    return len(sequence.tokens) - len(sequence.request.prompt_tokens)


def spans(chunks: list[Chunk]) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request.id, chunk.start, chunk.end) for chunk in chunks]


def test_prefill_then_decode() -> None:
    tiny = TinyScheduler()
    tiny.submit(5, 3)
    assert [spans(tiny.step()) for _ in range(4)] == [[("0", 0, 5)], [("0", 5, 6)], [("0", 6, 7)], []]


def test_new_sequences_join_a_running_batch() -> None:
    tiny = TinyScheduler()
    tiny.submit(5, 9)
    tiny.step()
    tiny.submit(3, 9)
    assert spans(tiny.step()) == [("0", 5, 6), ("1", 0, 3)]
    assert spans(tiny.step()) == [("0", 6, 7), ("1", 3, 4)]


def test_decodes_go_first_and_the_budget_cuts_prefills() -> None:
    tiny = TinyScheduler(max_batch_tokens=4)
    tiny.submit(2, 9)
    tiny.step()
    long = tiny.submit(8, 2)
    assert [spans(tiny.step()) for _ in range(2)] == [[("0", 2, 3), ("1", 0, 3)], [("0", 3, 4), ("1", 3, 6)]]
    assert not num_output(long)
    assert spans(tiny.step()) == [("0", 4, 5), ("1", 6, 8)]
    assert num_output(long) == 1


def test_one_step_admits_as_many_sequences_as_the_budget_allows() -> None:
    tiny = TinyScheduler(max_batch_tokens=10)
    for _ in range(3):
        tiny.submit(4, 5)
    assert spans(tiny.step()) == [("0", 0, 4), ("1", 0, 4), ("2", 0, 2)]


def test_max_sequences_limits_the_running_sequences() -> None:
    tiny = TinyScheduler(max_sequences=2)
    for _ in range(3):
        tiny.submit(1, 3)
    assert len(tiny.step()) == 2
    assert (tiny.scheduler.num_running, tiny.scheduler.num_waiting) == (2, 1)


def test_no_sequence_is_admitted_without_budget_for_its_first_chunk() -> None:
    tiny = TinyScheduler(max_batch_tokens=4, max_sequences=8)
    tiny.submit(3, 3)
    tiny.submit(8, 3)
    tiny.submit(8, 3)
    tiny.step()
    assert (tiny.scheduler.num_running, tiny.scheduler.num_waiting) == (2, 1)
    tiny.step()
    assert tiny.scheduler.num_running == 2


def test_every_running_sequence_gets_a_token_each_step() -> None:
    tiny = TinyScheduler(max_batch_tokens=3)
    for _ in range(6):
        tiny.submit(1, 4)
    while tiny.scheduler.num_waiting:
        assert len(tiny.step()) == 3


def test_same_adapters_are_adjacent_and_the_base_comes_last() -> None:
    tiny = TinyScheduler()
    for key in "ab":
        tiny.adapters.add(key, packed_adapter(1))
    for key in ("b", None, "a", "b", None, "a"):
        tiny.submit(2, 3, key)
    for _ in range(2):
        assert [chunk.sequence.adapter_key for chunk in tiny.step()] == ["b", "b", "a", "a", None, None]


@pytest.mark.parametrize("num_prompt", [3, 200])
def test_contexts_may_have_many_pages(num_prompt: int) -> None:
    tiny = TinyScheduler(max_batch_tokens=1000)
    sequence, short = tiny.submit(num_prompt, 390 - num_prompt), tiny.submit(2, 4)
    tiny.drain()
    assert (len(sequence.tokens), len(short.tokens)) == (390, 6)


def test_a_scheduler_output_without_some_of_its_sequences() -> None:
    tiny = TinyScheduler()
    tiny.adapters.add("a", packed_adapter(1))
    base, other, mine = tiny.submit(3, 3), tiny.submit(2, 3), tiny.submit(4, 3, "a")
    plan = tiny.scheduler.schedule()
    tiny.scheduler.finish(other)
    rest = plan.without({other})
    assert spans(chunks_of(rest)) == [("2", 0, 4), ("0", 0, 3)]
    assert rest.sampling == [mine, base]
    tiny.scheduler.commit(rest, [7, 8])
    tiny.scheduler.check_integrity()
    assert (mine.tokens[-1], base.tokens[-1]) == (7, 8)


def test_a_full_queue_refuses_requests_and_serves_the_rest() -> None:
    tiny = TinyScheduler(max_queue=2)
    tiny.adapters.add("a", packed_adapter(1))
    tiny.submit(1, 1, "a")
    tiny.submit(1)
    with pytest.raises(OverloadedError) as refusal:
        tiny.submit(1, 1, "a")
    assert refusal.value.retry_after_s > 0
    tiny.drain()


@pytest.mark.parametrize(
    ("num_prompt", "num_new", "fits"), [(20, 1, True), (21, 1, False), (1, 20, True), (1, 21, False)]
)
def test_a_request_that_can_never_fit_is_refused_with_numbers(num_prompt: int, num_new: int, fits: bool) -> None:
    tiny = TinyScheduler(num_pages=8)
    tiny.adapters.add("a", packed_adapter(3))
    if fits:
        tiny.submit(num_prompt, num_new, "a")
        tiny.drain()
    else:
        with pytest.raises(InvalidRequestError, match=r"6 pages .* 3 for its adapter, the engine has 8"):
            tiny.submit(num_prompt, num_new, "a")
    assert tiny.adapters.num_holds == 0


def test_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(NotFoundError):
        TinyScheduler().submit(1, 1, "a")


def test_the_youngest_is_preempted_and_resumes() -> None:
    tiny = TinyScheduler(num_pages=4)
    old, young = tiny.submit(7, 8), tiny.submit(7, 8)
    tiny.step()
    tiny.step()
    assert spans(tiny.step()) == [("0", 8, 9)]
    assert (tiny.num_preemptions(young), young.row) == (1, None)
    assert len(young.tokens) == 9
    tiny.drain()
    assert old.tokens == young.tokens == [*range(15)]
    assert (tiny.num_preemptions(old), tiny.scheduler.num_preemptions) == (0, tiny.num_preemptions(young))


def test_preempted_sequences_run_before_new_ones() -> None:
    tiny = TinyScheduler(num_pages=4)
    old, young = tiny.submit(7, 8), tiny.submit(7, 8)
    tiny.step()
    late = tiny.submit(1, 1)
    while not tiny.num_preemptions(young):
        tiny.step()
    assert not num_output(late)
    while not is_full(old):
        tiny.step()
    assert [chunk.sequence for chunk in tiny.step()] == [young, late]


def test_preemption_releases_the_adapter() -> None:
    tiny = TinyScheduler(num_pages=6)
    for key in "ab":
        tiny.adapters.add(key, packed_adapter(1))
    old, young = tiny.submit(7, 14, "a"), tiny.submit(7, 8, "b")
    while not tiny.num_preemptions(young):
        tiny.step()
    assert young.resident is None
    assert old.resident is not None
    while not young.resident:
        tiny.step()
    tiny.drain()


def test_an_idle_adapter_is_evicted_for_kv() -> None:
    tiny = TinyScheduler(num_pages=5)
    tiny.adapters.add("a", packed_adapter(2))
    tiny.submit(1, 1, "a")
    tiny.drain()
    assert tiny.adapters.num_resident == 1
    tiny.submit(1, 19)
    tiny.drain()
    assert (tiny.adapters.num_resident, tiny.adapters.num_evictions, tiny.scheduler.num_preemptions) == (0, 1, 0)


def test_a_sequences_idle_adapter_is_not_evicted_for_its_kv() -> None:
    tiny = TinyScheduler(num_pages=5)
    tiny.adapters.add("a", packed_adapter(2))
    tiny.submit(1, 1, "a")
    tiny.drain()
    tiny.submit(12, 1, "a")
    tiny.drain()
    assert tiny.adapters.num_evictions == 0


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_abort_frees_everything(num_steps: int) -> None:
    tiny = TinyScheduler(max_batch_tokens=4)
    tiny.adapters.add("a", packed_adapter(2))
    sequence = tiny.submit(6, 9, "a")
    for _ in range(num_steps):
        tiny.step()
    tiny.scheduler.finish(sequence)
    tiny.scheduler.check_integrity()
    tiny.adapters.remove("a")
    assert tiny.allocator.num_free == tiny.allocator.num_pages


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_frees_all_memory(seed: int, is_cached: bool) -> None:
    draw = random.Random(seed)
    tiny = TinyScheduler(
        num_pages=draw.randint(8, 20),
        is_cached=is_cached,
        max_batch_tokens=draw.choice([2, 5, 16]),
        max_sequences=draw.choice([2, 8]),
    )
    for key, num_pages in zip("abcd", (1, 2, 3, 4), strict=True):
        tiny.adapters.add(key, packed_adapter(num_pages))
    alive: list[SequenceState] = []
    for _ in range(150):
        if draw.random() < 0.4:
            adapter, priority = draw.choice(["a", "b", "c", "d", None]), draw.choice([0, 0, 1])
            alive.append(tiny.submit(draw.randint(1, 8), draw.randint(1, 8), adapter, priority=priority))
        if draw.random() < 0.05 and alive and not is_full(victim := draw.choice(alive)):
            tiny.scheduler.finish(victim)
            alive.remove(victim)
        tiny.step()
    tiny.drain()
    for sequence in alive:
        assert sequence.tokens == [*range(sequence.limit_tokens)]
    for key in "abcd":
        tiny.adapters.remove(key)
    assert tiny.num_free == tiny.allocator.num_pages
    assert (tiny.prefixes.num_hit_tokens > 0) == is_cached


# Which sequence is next.


def test_urgent_sequences_run_first_and_are_preempted_last() -> None:
    tiny = TinyScheduler(num_pages=4, max_sequences=2)
    late, soon = tiny.submit(7, 8, priority=1), tiny.submit(7, 8, priority=0)
    assert [chunk.sequence for chunk in tiny.step()] == [soon, late]
    while not tiny.num_preemptions(late):
        tiny.step()
    tiny.drain()
    assert tiny.num_preemptions(soon) == 0


def test_resident_adapters_go_first_unless_they_were_given_much_more() -> None:
    tiny = TinyScheduler(num_pages=2, max_sequences=1)  # room for one adapter and one sequence
    for key in "ab":
        tiny.adapters.add(key, packed_adapter(1))
    tiny.submit(1, 1, "a")
    tiny.drain()
    order = [tiny.submit(2, 1, key) for key in "baa"]
    served = [chunk.sequence for _ in order for chunk in tiny.step()]
    assert served == [order[1], order[2], order[0]]
    tiny.submit(1, 1, "a")
    tiny.drain()
    tiny.scheduler._waiting.charge(order[1], CLUSTERING_TOKENS + 1)
    order = [tiny.submit(2, 1, key) for key in "ab"]
    assert [chunk.sequence for _ in order for chunk in tiny.step()] == order[::-1], (
        "the resident adapter is too far ahead"
    )


def test_the_next_adapters_are_prefetched_while_the_batch_is_full() -> None:
    tiny = TinyScheduler(num_pages=12, max_sequences=1)
    for key in "abc":
        tiny.adapters.add(key, packed_adapter(3))
    tiny.submit(4, 6)
    for key in "abc":
        tiny.submit(4, 2, key)
    for num_resident in (1, 2, 3, 3):
        tiny.step()
        assert tiny.adapters.num_resident == num_resident
    assert tiny.adapters.num_evictions == 0
    tiny.drain()


def test_prefetching_does_not_evict_prefetched_adapters() -> None:
    tiny = TinyScheduler(num_pages=10, max_sequences=1)
    for key in "abc":
        tiny.adapters.add(key, packed_adapter(3))
    tiny.submit(4, 20)
    for key in "abc":
        tiny.submit(4, 2, key)
    for _ in range(10):
        tiny.step()
    assert (tiny.adapters.num_resident, tiny.adapters.num_evictions) == (2, 0)
    tiny.drain()


def test_a_new_adapter_does_not_wait_behind_anothers_backlog() -> None:
    tiny = TinyScheduler(max_sequences=1, max_overtakes=100)
    tiny.adapters.add("a", packed_adapter(1))
    for _ in range(60):
        tiny.submit(50, 1)
    tiny.step()
    mine = tiny.submit(50, 1, "a")
    assert mine in [tiny.step()[0].sequence for _ in range(3)]


def test_a_tenant_cannot_fill_the_queue() -> None:
    tiny = TinyScheduler(max_queue=4, max_queue_per_tenant=2)
    for _ in range(2):
        tiny.submit(1, 1, tenant="a")
    with pytest.raises(TenantLimitError):
        tiny.submit(1, 1, tenant="a")
    tiny.submit(1, 1, tenant="b")
    tiny.drain()
    tiny.submit(1, 1, tenant="a")
    tiny.drain()


def test_only_waiting_sequences_are_overdue() -> None:
    tiny = TinyScheduler(max_sequences=1)
    running, waiting, patient = (tiny.submit(2, 5, deadline_at=at) for at in (10.0, 11.0, 20.0))
    tiny.step()
    assert tiny.scheduler.overdue(9.0) == []
    assert tiny.scheduler.overdue(12.0) == [waiting]
    tiny.scheduler.finish(waiting)
    assert tiny.scheduler.overdue(13.0) == []
    tiny.drain()
    assert tiny.scheduler.overdue(30.0) == []
    assert (is_full(running), is_full(patient)) == (True, True)
