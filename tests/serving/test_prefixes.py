"""Prefix caching: the same tokens with and without it, and never KV of other weights, salts or tokens."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.adapters.files import Adapter, load_adapter
from cluster.config.settings import ServingConfig
from serving.engine.engine import Engine
from serving.engine.request import AdapterRef, Request, SamplingParams, Terms
from serving.memory.eviction import EvictionQueue
from serving.memory.pages import PageAllocator
from serving.memory.prefixes import PrefixCache, PrefixKeys
from tests.worlds.serving import make_adapter, make_checkpoint

SIZE = 4  # tokens per page
PROMPT = tuple((5 * i + i * i) % 256 for i in range(30))
KIB = 1024


# The eviction order.


class IdleItems:
    """Idle items of some pages each, and a queue that evicts them."""

    def __init__(self, num_pages: int):
        self.allocator = PageAllocator(num_pages)
        self.queue = EvictionQueue(self.allocator)
        self.evicted: list[str] = []

    def add(self, name: str, num_pages: int, value: float) -> None:
        pages = self.allocator.allocate(num_pages)

        def evict(item: str) -> None:
            self.allocator.free(pages)
            self.evicted.append(item)

        self.queue.add(name, num_pages, value, evict)
        self.queue.check_integrity()

    def make_room(self, num_pages: int, keep: tuple[str, ...] = ()) -> list[str]:
        """Return what was evicted."""
        self.evicted = []
        assert self.queue.make_room(num_pages, keep)
        self.queue.check_integrity()
        return self.evicted


def test_least_useful_goes_first_then_the_oldest() -> None:
    items = IdleItems(6)
    for name, value in {"a": 2.0, "b": 1.0, "c": 1.0}.items():
        items.add(name, 2, value)
    assert items.make_room(3) == ["b", "c"]


def test_old_uses_lose_weight() -> None:
    items = IdleItems(4)
    items.add("old", 2, 5.0)
    for name in "abcdef":
        items.add(name, 2, 2.0)
        if items.make_room(2) == ["old"]:
            return
    raise AssertionError("old uses still count")


def test_evicting_a_kept_thing_later_does_not_lower_the_floor() -> None:
    items = IdleItems(6)
    for name, value in {"kept": 1.0, "useful": 9.0}.items():
        items.add(name, 2, value)
    assert items.make_room(4, keep=("kept",)) == ["useful"]
    items.add("earlier", 2, 0.0)
    assert items.make_room(4) == ["kept"]
    items.add("later", 2, 0.0)
    assert items.make_room(4) == ["earlier"]


def test_used_and_kept_things_are_not_evicted() -> None:
    items = IdleItems(6)
    for name in "abc":
        items.add(name, 2, 1.0)
    items.queue.discard("a")
    assert not items.queue.make_room(4, keep=("b",))
    assert items.evicted == []
    assert items.make_room(2, keep=("b",)) == ["c"]
    assert items.queue.has("b")


# The cache without an engine.


class Cache:
    def __init__(self, num_pages: int = 10):
        self.allocator = PageAllocator(num_pages)
        self.evictions = EvictionQueue(self.allocator)
        self.prefixes = PrefixCache(self.allocator, self.evictions, SIZE)

    def store(self, tokens: tuple[int, ...], keys: PrefixKeys) -> list[int]:
        """Return the full pages of a sequence, cached as after its prefill. The caller owns them."""
        names = keys.up_to(tokens, len(tokens) // SIZE)
        pages = self.prefixes.take(names)
        pages += self.allocator.allocate(len(names) - len(pages))
        return [self.prefixes.put(name, page, keys.owner) for name, page in zip(names, pages, strict=True)]

    def check(self, *held: list[int]) -> None:
        self.allocator.check_integrity([self.prefixes.owned_pages(), *held])
        self.prefixes.check_integrity()
        self.evictions.check_integrity()


def keys_of(owner: str | None = None, *salt: str) -> PrefixKeys:
    return PrefixKeys(owner, salt, SIZE)


def test_a_key_depends_on_adapter_salt_and_every_token_before() -> None:
    variants = [
        keys_of().up_to(PROMPT, 7),
        keys_of("a").up_to(PROMPT, 7),
        keys_of("a", "b").up_to(PROMPT, 7),
        keys_of("a\nb").up_to(PROMPT, 7),
        keys_of("None").up_to(PROMPT, 7),
        keys_of().up_to((7, *PROMPT[1:]), 7),
    ]
    everything = [key for keys in variants for key in keys]
    assert len(set(everything)) == len(everything) == 42
    later_change = keys_of().up_to((*PROMPT[:9], 0, *PROMPT[10:]), 7)
    assert [a == b for a, b in zip(later_change, variants[0], strict=True)] == [True, True] + [False] * 5


def test_keys_grow_with_the_sequence() -> None:
    keys, tokens = keys_of(), list(PROMPT[:9])
    first = keys.up_to(tokens, 2)
    tokens += PROMPT[9:]
    assert keys.up_to(tokens, 7) == keys_of().up_to(PROMPT, 7)
    assert keys.up_to(tokens, 2) == first


def test_two_sequences_with_the_same_tokens_share_one_page() -> None:
    cache = Cache()
    first = cache.store(PROMPT[:8], keys_of())
    own = cache.allocator.allocate(1)
    (name,) = keys_of().up_to(PROMPT, 1)
    assert cache.prefixes.put(name, own[0], None) == first[0]
    cache.check(first, first[:1])
    cache.prefixes.release(first)
    cache.prefixes.release(first[:1])
    cache.check()
    assert cache.prefixes.num_idle == 2


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    cache = Cache(num_pages=7)
    names = keys_of().up_to(PROMPT, 7)
    cache.prefixes.release(cache.store(PROMPT, keys_of()))
    for num_left in range(6, -1, -1):
        assert cache.evictions.make_room(7 - num_left)
        found = cache.prefixes.take(names)
        assert len(found) == num_left
        cache.prefixes.release(found)
        cache.check()


def test_used_prefixes_outlive_unused_ones() -> None:
    cache = Cache(num_pages=4)
    cache.prefixes.release(cache.store(PROMPT[:8], keys_of("used")))
    cache.prefixes.count(pages := cache.prefixes.take(keys_of("used").up_to(PROMPT, 2)), 8)
    cache.prefixes.release(pages)
    cache.prefixes.release(cache.store(PROMPT[:8], keys_of("unused")))
    assert cache.evictions.make_room(2)
    assert len(cache.prefixes.take(keys_of("used").up_to(PROMPT, 2))) == 2


def test_forgetting_an_adapter_frees_only_its_idle_pages() -> None:
    cache = Cache()
    kept = cache.store(PROMPT[:4], keys_of("gone"))
    cache.prefixes.release(cache.store(PROMPT[4:12], keys_of("gone")))
    cache.prefixes.release(cache.store(PROMPT[:8], keys_of("stays")))
    cache.prefixes.forget("gone")
    cache.check(kept)
    assert (cache.prefixes.num_idle, cache.allocator.num_free) == (2, 7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["store", "release", "room", "forget"]), st.integers(0, 9)), max_size=60))
def test_random_operations_keep_exact_counts(operations: list[tuple[str, int]]) -> None:
    cache, held = Cache(num_pages=12), []
    for operation, i in operations:
        if operation == "store" and cache.evictions.make_room(7):
            tokens = (i % 3, *PROMPT[1 : 4 * (i % 5) + 2])
            held.append(cache.store(tokens, keys_of(f"k{i % 2}")))
        elif operation == "release" and held:
            cache.prefixes.release(held.pop(i % len(held)))
        elif operation == "room":
            cache.evictions.make_room(i)
        elif operation == "forget":
            cache.prefixes.forget(f"k{i % 2}")
        cache.check(*held)
    for pages in held:
        cache.prefixes.release(pages)
    assert cache.evictions.make_room(12)
    assert cache.prefixes.owned_pages() == []


# The engine.


@dataclass(frozen=True)
class BaseWithAdapters:
    """A checkpoint and two adapters of it."""

    folder: Path
    adapters: dict[str, Adapter]

    def engine(self, *, memory_kib: int = 4096, **settings: object) -> Engine:
        config = ServingConfig(memory_bytes=memory_kib * KIB, page_tokens=SIZE, **settings)
        engine = Engine.open(self.folder, config)
        for name, adapter in self.adapters.items():
            engine.add_adapter(ref(name), adapter)
        return engine


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseWithAdapters:
    folder = tmp_path_factory.mktemp("base_with_adapters")
    checkpoint = make_checkpoint(folder / "base")
    names = ("first", "second")
    adapters = {
        name: load_adapter(make_adapter(folder / name, checkpoint, seed=i, scale=0.3)) for i, name in enumerate(names)
    }
    return BaseWithAdapters(checkpoint, adapters)


def ref(name: str, key: str | None = None) -> AdapterRef:
    return AdapterRef(key or f"hash-of-{name}", name, 1, "")


def ask(name: str | None = None, prompt: tuple[int, ...] = PROMPT, **terms: object) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    id = f"{name}-{hash((prompt, repr(terms)))}"
    return Request(id, prompt, sampling, ref(name) if name else None, terms=Terms(**terms))


def answers(engine: Engine, *requests: Request) -> list[list[int]]:
    """Return each request's tokens, and check the engine's integrity after every step."""
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            tokens[event.request_id] += event.tokens
        engine.check_integrity()
    return [tokens[request.id] for request in requests]


def hits(engine: Engine) -> float:
    return engine.stats()["prefix_hit_tokens"]


ALL = [None, "first", "second"]


@pytest.fixture(scope="module")
def expected(base: BaseWithAdapters) -> dict[str | None, list[int]]:
    """Each adapter's tokens without a prefix cache."""
    found = dict(zip(ALL, answers(base.engine(prefix_cache="off"), *map(ask, ALL)), strict=True))
    assert len({tuple(tokens) for tokens in found.values()}) == len(ALL)
    return found


@pytest.mark.parametrize("name", ALL)
def test_a_hit_changes_no_token(base: BaseWithAdapters, expected: dict, name: str | None) -> None:
    engine = base.engine()
    assert answers(engine, ask(name)) == [expected[name]]
    assert hits(engine) == 0
    for _ in range(2):
        assert answers(engine, ask(name)) == [expected[name]]
    assert hits(engine) == 2 * 28  # all full pages of 30 tokens


def test_a_prompt_of_whole_pages_still_computes_its_last_token(base: BaseWithAdapters) -> None:
    prompt = PROMPT[:28]
    (expected,) = answers(base.engine(prefix_cache="off"), ask("first", prompt))
    engine = base.engine()
    for _ in range(2):
        assert answers(engine, ask("first", prompt)) == [expected]
    assert hits(engine) == 24


def test_a_conversation_continues_from_its_cached_answer(base: BaseWithAdapters, expected: dict) -> None:
    engine = base.engine()
    answers(engine, ask("first"))
    longer = (*PROMPT, *expected["first"], 3, 1, 4)
    got = answers(engine, ask("first", longer))
    assert hits(engine) == 40  # the last token of the answer was never fed back
    assert got == answers(base.engine(prefix_cache="off"), ask("first", longer))


def test_concurrent_requests_share_cached_pages(base: BaseWithAdapters, expected: dict) -> None:
    engine = base.engine()
    requests = [replace(ask(name), id=f"{name}/{i}") for i in range(4) for name in ALL]
    for _ in range(2):
        assert answers(engine, *requests) == [expected[name] for _ in range(4) for name in ALL]
    assert hits(engine) == 12 * 28
    # Sequences that computed the same tokens side by side share the pages of prompt and answer.
    assert engine.stats()["pages_cached"] == 3 * 10


@pytest.mark.parametrize("max_batch_tokens", [5, 16])
def test_hits_change_no_token_with_chunked_prefill(
    base: BaseWithAdapters, expected: dict, max_batch_tokens: int
) -> None:
    engine = base.engine(max_batch_tokens=max_batch_tokens)
    for _ in range(3):
        assert answers(engine, *map(ask, ALL)) == [expected[name] for name in ALL]
    assert hits(engine) == 6 * 28


def test_hits_change_no_token_with_preemption_and_eviction(base: BaseWithAdapters, expected: dict) -> None:
    engine = base.engine(memory_kib=130)
    requests = [replace(ask(name, cache_salt=str(i)), id=f"{name}/{i}") for i in range(3) for name in ALL]
    for _ in range(3):
        assert answers(engine, *requests) == [expected[name] for _ in range(3) for name in ALL]
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert stats["prefix_hit_tokens"] > 0
    assert stats["evictions"] > 0


def test_kv_is_never_shared_between_different_weights(base: BaseWithAdapters, expected: dict) -> None:
    """New weights under the same name have another content hash; an alias has the same one."""
    engine = base.engine()
    answers(engine, ask("first"))
    assert answers(engine, ask("second"), ask()) == [expected["second"], expected[None]]
    assert hits(engine) == 0
    reloaded = ref("first", key="hash-of-new-weights")
    engine.add_adapter(reloaded, base.adapters["second"])
    assert answers(engine, replace(ask("first"), adapter=reloaded)) == [expected["second"]]
    assert hits(engine) == 0
    alias = replace(ref("alias"), key=ref("first").key)
    assert answers(engine, replace(ask("first"), adapter=alias)) == [expected["first"]]
    assert hits(engine) == 28


def test_salts_tenants_and_uncached_requests_share_nothing(base: BaseWithAdapters, expected: dict) -> None:
    engine = base.engine()
    uncached = {"can_cache": False}
    for terms in ({"cache_salt": "mine"}, uncached, {}, uncached, {"cache_salt": "yours"}):
        assert answers(engine, ask("first", **terms)) == [expected["first"]]
    assert hits(engine) == 0
    answers(engine, ask("first", tenant="anyone"), ask("first", cache_salt="mine"))
    assert hits(engine) == 2 * 28
    apart = base.engine(prefix_cache="tenant")
    for tenant in "ab":
        answers(apart, ask(tenant=tenant))
    assert hits(apart) == 0
    answers(apart, ask(tenant="a"))
    assert hits(apart) == 28


def test_without_a_cache_no_page_is_kept(base: BaseWithAdapters) -> None:
    engine = base.engine(prefix_cache="off")
    answers(engine, ask("first"), ask("first", tenant="x"))
    assert (engine.stats()["pages_cached"], engine.stats()["prefix_tokens"]) == (0, 0)


def test_removing_an_adapter_frees_its_prefixes_after_the_last_request(base: BaseWithAdapters, expected: dict) -> None:
    engine = base.engine()
    answers(engine, ask("second"), ask("first"))
    engine.submit(ask("first"))
    engine.step()
    engine.remove_adapter(ref("first").key)
    engine.check_integrity()
    assert engine.stats()["pages_cached"] < 20
    tokens = [token for _ in range(40) for event in engine.step() for token in event.tokens]
    assert tokens == expected["first"][1:]
    assert engine.stats()["pages_cached"] == 10
    engine.add_adapter(ref("first"), base.adapters["first"])
    before = hits(engine)
    assert answers(engine, ask("first")) == [expected["first"]]
    assert hits(engine) == before


def test_idle_prefixes_give_way_to_everything_else(base: BaseWithAdapters) -> None:
    engine = base.engine(memory_kib=150)
    for i in range(20):
        answers(engine, ask(prompt=(i, *PROMPT)))
    stats = engine.stats()
    assert stats["pages_free"] == stats["pages"]
    assert stats["preemptions"] == 0
