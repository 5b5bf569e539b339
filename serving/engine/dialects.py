"""The dialects that one engine knows: its base's, and those of adapters that bring their own text files."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cluster.adapters.dialect import Dialect, adapter_dialect
from cluster.errors import NotFoundError
from serving.engine.detokenizer import Vocabulary
from serving.engine.matcher import GrammarCompiler
from serving.engine.request import AdapterRef

MAX_DIALECTS = 64  # each may hold a large vocabulary; one that is dropped is loaded again when a request needs it


class Reading(NamedTuple):
    """How to read a sequence's tokens: as text, where the answer ends, and in which grammar."""

    vocabulary: Vocabulary
    end_ids: frozenset[int]
    grammars: GrammarCompiler


class Dialects:
    """Dialects by the blob of their text files; "" is the base's. Safe from any thread."""

    def __init__(self, base: Dialect):
        self._base = base
        self._base_reading = _reading(base)
        self._lock = threading.Lock()
        self._readings: OrderedDict[str, Reading] = OrderedDict()

    def has(self, key: str) -> bool:
        """Whether requests may name the dialect."""
        return not key or key in self._readings

    def load(self, key: str, fetch: Callable[[], Path]) -> None:
        """Load a dialect. `fetch` returns the folder of its text files, and its errors are raised.

        Raises InvalidAdapterError if the files do not fit the base.
        """
        dialect = adapter_dialect(fetch(), self._base)
        if dialect.shares_vocabulary(self._base):  # its tables may be large, and take seconds to build
            reading = self._base_reading._replace(end_ids=dialect.end_ids)
        else:
            reading = _reading(dialect)
        with self._lock:
            self._readings[key] = reading
            if len(self._readings) > MAX_DIALECTS:
                self._readings.popitem(last=False)

    def of(self, adapter: AdapterRef | None) -> Reading:
        """Return how to read an adapter's answers. Raises NotFoundError if its dialect is not loaded."""
        if adapter is None or not adapter.dialect:
            return self._base_reading
        with self._lock:
            if adapter.dialect not in self._readings:
                raise NotFoundError(f"the text files of adapter {adapter.label} are not loaded")
            self._readings.move_to_end(adapter.dialect)
            return self._readings[adapter.dialect]


def _reading(dialect: Dialect) -> Reading:
    return Reading(Vocabulary(dialect.tokenizer), dialect.end_ids, GrammarCompiler(dialect.tokenizer))
