"""Counts the outcomes of a fault run, and checks tokens against the expected ones and errors against their causes."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.serving.chaos.events import Ask, Twist
from bench.serving.chaos.world import World
from cluster.errors import (
    InvalidAdapterError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    StorageError,
)
from serving.engine.request import AdapterRef

_REFUSED: Collection[Twist] = ("empty", "too long", "unknown token")
_NOT_THERE: Collection[Twist] = ("no such adapter", "not loaded")
_KINDS: dict[str, type[Exception]] = {
    "overloaded": OverloadedError,
    "invalid request": InvalidRequestError,
    "adapter not found": NotFoundError,
    "adapter unusable": InvalidAdapterError,
    "storage": StorageError,
}
_MAX_SHOWN = 20


@dataclass(frozen=True)
class Mismatch:
    """An answer whose tokens differ from the expected ones."""

    key: str | None
    prompt: int
    tokens: tuple[int, ...]


@dataclass
class Tally:
    """The counts of a run. `unexplained` counts errors that nothing explains, and everything else that is wrong."""

    world: World
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    mismatches: list[Mismatch] = field(default_factory=list)
    unexplained: Counter[str] = field(default_factory=Counter)
    doubtful: set[str] = field(default_factory=set)  # adapters whose files were ever damaged or slow
    is_impatient: bool = False  # whether loads may time out while they wait for other loads
    is_crowded: bool = False  # whether adapters may leave the host before their request gets them
    num_tokens: int = 0
    num_resumed: int = 0

    def check(self, ask: Ask, key: str | None, tokens: Sequence[int], is_whole: bool) -> None:
        """Check the tokens of an answer, which may have ended early."""
        self.num_tokens += len(tokens)
        rows = self.world.expected.get(key)
        right = rows[ask.prompt][: ask.num_tokens] if rows is not None else ()
        if is_whole and len(tokens) != ask.num_tokens:
            self.unexplained[f"{len(tokens)} tokens, not {ask.num_tokens}"] += 1
        elif tuple(tokens) != right[: len(tokens)]:
            self.mismatches.append(Mismatch(key, ask.prompt, tuple(tokens)))

    def record_error(self, ask: Ask, ref: AdapterRef | None, error: Exception) -> None:
        """Record a request that ended with an error, and whether anything explains the error."""
        kind = next((kind for kind, cls in _KINDS.items() if isinstance(error, cls)), type(error).__name__)
        self.outcomes[kind] += 1
        if not self._is_explained(kind, ask, ref):
            what = f"{kind}: {error!r}"
            self.unexplained[what if what in self.unexplained or len(self.unexplained) < _MAX_SHOWN else "more"] += 1

    def verdict(self) -> dict[str, Any]:
        """Return the counts of the mismatches by kind. All tokens of one count as wrong, unless it is a tie."""
        counts: Counter[str] = Counter()
        num_wrong = 0
        for mismatch in self.mismatches:
            if mismatch.key in self.world.expected and self.world.is_tie(
                mismatch.key, mismatch.prompt, mismatch.tokens
            ):
                counts["ties"] += 1
                continue
            others = self._adapters_saying(mismatch)
            counts["of_another_adapter" if others else "of_no_adapter"] += 1
            num_wrong += len(mismatch.tokens)
        return {
            "wrong_adapter_tokens": num_wrong,
            "ties": counts["ties"],
            "wrong_answers_of_another_adapter": counts["of_another_adapter"],
            "wrong_answers_of_no_adapter": counts["of_no_adapter"],
            "wrong_examples": [self._shown(mismatch) for mismatch in self.mismatches[:10]],
        }

    def _is_explained(self, kind: str, ask: Ask, ref: AdapterRef | None) -> bool:
        is_doubtful = ref is not None and ref.key in self.doubtful
        is_sound = ref is None or any(c.key == ref.key and c.fate == "sound" for c in self.world.contents)
        return {
            "overloaded": True,
            "invalid request": ask.twist in _REFUSED,
            "adapter not found": ask.twist in _NOT_THERE or is_doubtful or (ref is not None and self.is_crowded),
            "adapter unusable": not is_sound or is_doubtful,
            "storage": is_doubtful or (ref is not None and self.is_impatient),
        }.get(kind, False)

    def _adapters_saying(self, mismatch: Mismatch) -> list[str | None]:
        size = len(mismatch.tokens)
        rows = self.world.expected.items()
        return [key for key, row in rows if key != mismatch.key and row[mismatch.prompt][:size] == mismatch.tokens]

    def _shown(self, mismatch: Mismatch) -> dict[str, Any]:
        names = {content.key: content.name for content in self.world.contents}
        rows = self.world.expected.get(mismatch.key)
        return {
            "adapter": "base" if mismatch.key is None else names[mismatch.key],
            "prompt": mismatch.prompt,
            "tokens": mismatch.tokens,
            "right": rows[mismatch.prompt] if rows is not None else None,
            "said_by": ["base" if key is None else names[key] for key in self._adapters_saying(mismatch)],
        }
