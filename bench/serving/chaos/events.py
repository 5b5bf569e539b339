"""The events of a fault run: waves of requests, with everything that goes wrong between them.

All events are drawn from one seed. Their order is fixed, but their timing depends on the threads and differs from run
to run. No timing may lead to a wrong result.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.serving.chaos.truth import MAX_NEW_TOKENS
from bench.serving.chaos.world import MAX_RANK, Content, Disk, World
from cluster.config.settings import MIB, ServingConfig
from serving.engine.request import Terms

Reader = Literal["eager", "slow", "idle"]  # idle: after its first event it reads nothing until the wave is over
Twist = Literal["twin id", "empty", "too long", "unknown token", "no such adapter", "not loaded"]
TWISTS: tuple[Twist, ...] = ("twin id", "empty", "too long", "unknown token", "no such adapter", "not loaded")
HANG_S = 2.0  # longer than the engine of the wave "bad disk" waits for files


@dataclass(frozen=True)
class Ask:
    """One request. The client leaves after `leaves_after` events or `gives_up_s` seconds. `twist` makes it unusual."""

    model: str | None
    prompt: int
    num_tokens: int
    terms: Terms
    reader: Reader
    leaves_after: int | None
    gives_up_s: float | None
    twist: Twist | None
    num_logprobs: int | None


@dataclass(frozen=True)
class Load:
    """Load a content under a name, or reload a name that is known. Several contents race for the name."""

    name: str
    contents: tuple[Content, ...]


@dataclass(frozen=True)
class Unload:
    """Unload a name, even if requests run with it."""

    name: str


@dataclass(frozen=True)
class Hurt:
    """Damage an adapter's files in one of `Disk.HARMS`."""

    content: Content
    how: str


@dataclass(frozen=True)
class Mend:
    """Restore all damaged files."""


@dataclass(frozen=True)
class Delay:
    """Make the next fetch of an adapter take `seconds`, or find the disk full."""

    content: Content
    seconds: float = 0.0
    is_disk_full: bool = False


@dataclass(frozen=True)
class Flood:
    """Send the next requests all at once, without waiting for earlier ones."""

    num_requests: int


@dataclass(frozen=True)
class Crash:
    """Make the engine's next step fail; another engine takes over."""


@dataclass(frozen=True)
class Restart:
    """Stop the engine while requests run; another engine takes over."""


Event = Ask | Load | Unload | Hurt | Mend | Delay | Flood | Crash | Restart


@dataclass(frozen=True)
class Wave:
    """A part of the run with its own engine. `rates` are events per request, by kind.

    `trouble` is the share of requests whose client is slow, idle or leaves; `late` is the share with a deadline.
    Python switches threads every `switch_s`. With `keeps_packed` the machine has a disk tier.
    """

    name: str
    share: float
    rates: Mapping[str, float]
    serving: Mapping[str, Any] = field(default_factory=dict)
    num_names: int = 100
    num_clients: int = 256
    trouble: float = 0.06
    late: float = 0.01
    switch_s: float = 0.005
    keeps_packed: bool = False

    def config(self) -> ServingConfig:
        """Return the engine's configuration."""
        usual: dict[str, Any] = {
            "memory_bytes": 24 * MIB,
            "max_model_tokens": 160,
            "max_batch_tokens": 512,
            "max_sequences": 128,
            "max_queue": 1024,
            "max_rank": MAX_RANK,
            "max_overtakes": 64,
            "adapter_load_timeout_s": 60.0,
        }
        return ServingConfig(**(usual | dict(self.serving)))


_USUAL = {
    "load": 0.004,
    "alias": 0.001,
    "unload": 0.002,
    "hurt": 0.001,
    "mend": 0.001,
    "delay": 0.0005,
    "crash": 0.0002,
    "restart": 0.0001,
}
_CHURN = _USUAL | {"load": 0.03, "race": 0.01, "unload": 0.02, "alias": 0.01}
_BAD_DISK = _USUAL | {"hurt": 0.02, "mend": 0.006, "delay": 0.01, "hang": 0.0005, "load": 0.01}
_FLOODS = _USUAL | {"flood": 0.0007}
# A small page is full after four tokens, so memory runs out in the middle of answers. Part of the KV is swapped.
_SMALL_ARENA = {"memory_bytes": MIB, "page_tokens": 4, "max_batch_tokens": 96, "swap_bytes": MIB // 8}
WAVES = (
    Wave("usual", 0.24, _USUAL, keeps_packed=True),
    Wave("churn", 0.2, _CHURN, trouble=0.15, switch_s=2e-4),
    Wave("small arena", 0.16, _USUAL | {"load": 0.01}, _SMALL_ARENA, num_names=5, keeps_packed=True),
    Wave("small host cache", 0.12, _USUAL, {"host_cache_bytes": 3 * MIB}, num_clients=160),
    Wave("bad disk", 0.12, _BAD_DISK, {"adapter_load_timeout_s": 1.0}, keeps_packed=True),
    Wave("floods", 0.16, _FLOODS, {"max_queue": 500, "max_queue_per_tenant": 200, "max_overtakes": 8}, late=0.1),
)


def draw_events(world: World, wave: Wave, num_requests: int, seed: int) -> Iterator[Event]:
    """Draw a wave's events in their order."""
    rng = random.Random(f"{seed}/{wave.name}")
    deck = _Deck(world, wave.num_names, rng)
    yield from deck.names_first()
    for _ in range(num_requests):
        yield from (deck.draw(kind) for kind, rate in wave.rates.items() if rng.random() < rate)
        yield deck.ask(wave)


def faults_of(event: Event) -> list[str]:
    """Return the names of the faults of an event, as the records call them."""
    match event:
        case Ask():
            odd = {"deadline": event.terms.first_token_deadline_s is not None, f"{event.reader} reader": True}
            odd |= {"client leaves": event.leaves_after is not None, "client gives up": event.gives_up_s is not None}
            odd |= {f"request: {event.twist}": event.twist is not None, "eager reader": False}
            return [name for name, is_so in odd.items() if is_so]
        case Load():
            fates = [f"load of {content.fate} files" for content in event.contents]
            return [*fates, *(["racing loads"] if len(fates) > 1 else [])]
        case Hurt():
            return [f"files: {event.how}"]
        case Delay():
            return ["disk full" if event.is_disk_full else "store hangs" if event.seconds >= HANG_S else "slow store"]
        case _:
            return [type(event).__name__.lower()]


class _Deck:
    """Draws events. A few adapters get most of the requests."""

    def __init__(self, world: World, num_names: int, rng: random.Random):
        self._rng = rng
        self._num_prompts = len(world.prompts)
        self._sound, self._poison, self._bad = world.by_fate("sound"), world.by_fate("poison"), world.by_fate("bad")
        self._names = [f"adapter-{number}" for number in range(min(num_names, len(self._sound)))]
        self._gone: list[str] = []
        self._draws: dict[str, Callable[[], Event]] = {
            "load": lambda: Load(self._wanted(), (self._content(),)),
            "alias": lambda: Load(self._name(), (rng.choice(self._sound[:3]),)),
            "race": lambda: Load(self._wanted(), (self._content(), self._content(), self._content())),
            "unload": self._unload,
            "hurt": lambda: Hurt(rng.choice(self._sound), rng.choice(Disk.HARMS)),
            "mend": Mend,
            "delay": lambda: Delay(rng.choice(self._sound), rng.uniform(0, 0.2), rng.random() < 0.3),
            "hang": lambda: Delay(rng.choice(self._sound), HANG_S),
            "flood": lambda: Flood(rng.randint(300, 900)),
            "crash": Crash,
            "restart": Restart,
        }

    def names_first(self) -> Iterator[Event]:
        """Load a content under each name, so that all are known. Two names may get the same content: an alias."""
        for name in self._names:
            yield Load(name, (self._rng.choice(self._sound),))

    def draw(self, kind: str) -> Event:
        """Draw one event of a kind."""
        return self._draws[kind]()

    def ask(self, wave: Wave) -> Ask:
        """Draw one request."""
        rng = self._rng
        reader, leaves_after, gives_up_s = self._client() if rng.random() < wave.trouble else ("eager", None, None)
        return Ask(
            None if rng.random() < 0.12 else self._name(),
            rng.randrange(self._num_prompts),
            rng.randint(3, MAX_NEW_TOKENS) if rng.random() < 0.5 else rng.randint(3, 6),
            self._terms(wave),
            reader,
            leaves_after,
            gives_up_s,
            rng.choice(TWISTS) if rng.random() < 0.01 else None,
            rng.choice((0, 2)) if rng.random() < 0.03 else None,
        )

    def _client(self) -> tuple[Reader, int | None, float | None]:
        kind = self._rng.random()
        if kind < 0.3:
            return "slow", None, None
        if kind < 0.35:
            return "idle", None, None
        if kind < 0.7:
            return "eager", self._rng.randint(1, 4), None
        return "eager", None, self._rng.choice((0.0, 0.002, 0.02, 0.2))

    def _terms(self, wave: Wave) -> Terms:
        rng = self._rng
        return Terms(
            priority=rng.choices((0, 1, -1), (90, 5, 5))[0],
            tenant=f"tenant-{int(8 * rng.random() ** 2)}",
            first_token_deadline_s=rng.choice((0.001, 0.05, 0.5)) if rng.random() < wave.late else None,
            cache_salt=rng.choice(("a", "b")) if rng.random() < 0.1 else "",
            can_cache=rng.random() >= 0.1,
        )

    def _name(self) -> str:
        return self._names[int(len(self._names) * self._rng.random() ** 2.5)]

    def _wanted(self) -> str:
        """Draw a name to load, usually one that was unloaded."""
        if self._gone and self._rng.random() < 0.8:
            return self._gone.pop(0)
        return self._name()

    def _unload(self) -> Unload:
        self._gone.append(self._name())
        return Unload(self._gone[-1])

    def _content(self) -> Content:
        kind = self._rng.random()
        choices: Sequence[Content] = self._poison if kind < 0.04 else self._bad if kind < 0.1 else self._sound
        return self._rng.choice(choices)
