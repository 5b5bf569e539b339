"""Compiles grammars, and follows each constrained sequence through its grammar.

llguidance does the work. Its table of a tokenizer takes a second or more, and a large grammar some milliseconds. So a
`GrammarCompiler` builds the table once, keeps the grammars that were used last, and is called off the engine's thread.
"""

import threading
from collections import OrderedDict
from collections.abc import Set
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from cluster.errors import InvalidRequestError
from serving.engine.grammar import Grammar

MAX_COMPILED = 256
# Two, so that a large grammar or a new tokenizer does not hold up all others.
_THREADS = ThreadPoolExecutor(2, "grammar")
_MAX_MESSAGE = 600  # characters of the library's message that the client gets
_END = "<|end of the grammar|>"
# A lexer state takes 1-2 kB, and all sequences of one grammar share its states.
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


class TokenTable:
    """A tokenizer as llguidance needs it.

    The table has one token more than the tokenizer: the library allows it where the grammar may stop. Which tokens end
    a sequence differs between requests of one tokenizer (adapters, `stop_token_ids`, `ignore_eos`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InvalidRequestError("This model has no fast tokenizer, which structured output needs.")
        own = Tokenizer.from_str(backend.to_str())
        own.no_padding()
        own.no_truncation()
        own.add_special_tokens([_END])
        end = own.token_to_id(_END)
        assert end is not None, "the token was just added"
        self.end = end
        self.num_words = end // 32 + 1
        try:
            self.tokenizer = LLTokenizer(own.to_str(), n_vocab=end + 1, eos_token=end)
        except ValueError as error:
            raise InvalidRequestError(f"This model's tokenizer does not support structured output: {error}") from error


class Matcher:
    """Where one sequence is in its grammar. `end_ids` are the tokens that end the sequence."""

    def __init__(self, state: LLMatcher, table: TokenTable, grammar: Grammar, end_ids: Set[int]):
        self.state = state
        self.table = table
        self.end_ids = end_ids
        self._grammar = grammar

    @property
    def is_complete(self) -> bool:
        """Whether the answer matches the grammar and nothing can follow."""
        return self.state.is_stopped()

    def take(self, token: int) -> None:
        """Follow a token of the answer. After a token that the grammar does not allow there is an `error`."""
        self.state.consume_token(token)

    @property
    def error(self) -> InvalidRequestError | None:
        """Why no token can follow: the grammar is invalid, too complex for the library's limits, or was left."""
        if not self.state.is_error():
            return None
        return InvalidRequestError(f"{self._grammar.origin}: {self.state.get_error().strip()[:_MAX_MESSAGE]}")


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the last MAX_COMPILED. Any thread may call it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._new_table = partial(TokenTable, tokenizer)
        self._table: TokenTable | None = None
        self._building = threading.Lock()
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()  # the one used last at the end
        self._lock = threading.Lock()

    def start(self, grammar: Grammar, end_ids: Set[int]) -> Future[Matcher]:
        """Call `matcher` in the background."""
        return _THREADS.submit(self.matcher, grammar, end_ids)

    def matcher(self, grammar: Grammar, end_ids: Set[int] = frozenset()) -> Matcher:
        """Return a matcher at the start of a grammar. Raises InvalidRequestError that says what is wrong with it."""
        with self._building:
            table = self._table = self._table or self._new_table()
        with self._lock:
            compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = _compile(grammar, table)
        with self._lock:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return Matcher(compiled.deep_copy(), table, grammar, end_ids)


def _compile(grammar: Grammar, table: TokenTable) -> LLMatcher:
    compiled = LLMatcher(table.tokenizer, grammar.lark(), log_level=0, limits=_LIMITS)
    if not compiled.is_error():
        compiled.compute_bitmask()  # the first mask builds most of the lexer, which copies share
    error = Matcher(compiled, table, grammar, frozenset()).error
    if error is not None:
        raise error
    return compiled
