"""Turn the tokens of one sequence into text as they come, and find stop strings.

Text that was shown is never taken back. An unfinished character is held back, and so is text that may still become a
stop string. The shown pieces add up to `tokenizer.decode(tokens, skip_special_tokens=True)` up to the first stop
string, wherever the borders between tokens fall. The one exception is a run of more than MAX_WINDOW byte-fallback
tokens: it is decided piece by piece, because the work for a token must not grow with the text. With
`Vocabulary.with_special` special tokens are text too.
"""

import copy
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache

from transformers import PreTrainedTokenizerBase

MAX_WINDOW = 64
_NUM_KEPT = 8  # tokens of context: enough to decode the next ones, since a character has at most 4 bytes
_NUM_PAIRS = 1 << 16  # about 10 MB
_UNFINISHED = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Vocabulary:
    """What detokenisation needs to know about a tokenizer, computed once for all sequences.

    `special` are the tokens that are not shown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._special_ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = frozenset(self._special_ids.values())
        self.byte_tokens = frozenset(i for token, i in tokenizer.get_vocab().items() if _BYTE_TOKEN.fullmatch(token))
        self._tokenizer = tokenizer
        self._skips_special = True
        # The fast tokenizers' own decode takes a third of the time of transformers' method around it.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._num_characters: dict[int, int] = {}
        self.following = lru_cache(_NUM_PAIRS)(self._following)

    @cached_property
    def with_special(self) -> "Vocabulary":
        """The same vocabulary, with special tokens shown."""
        shown = copy.copy(self)  # reading the tokenizer again would hold up the engine for a large vocabulary
        shown.special = frozenset()
        shown._skips_special = False
        shown._num_characters = {}
        shown.following = lru_cache(_NUM_PAIRS)(shown._following)
        return shown

    def special_ids(self, texts: Sequence[str]) -> frozenset[int]:
        """Return the ids of those texts that are one special token, with or without spaces and line ends around it."""
        found = (self._special_ids.get(text, self._special_ids.get(text.strip())) for text in texts)
        return frozenset(id for id in found if id is not None)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of the tokens that are shown, without any clean-up of spaces."""
        skips_special = self._skips_special
        if self._backend is not None:
            return self._backend.decode(tokens, skip_special_tokens=skips_special)
        return self._tokenizer.decode(tokens, skip_special_tokens=skips_special, clean_up_tokenization_spaces=False)

    def num_characters(self, tokens: list[int]) -> int:
        """Return the length of the tokens' text."""
        if len(tokens) != 1:
            return len(self.decode(tokens))
        if tokens[0] not in self._num_characters:
            self._num_characters[tokens[0]] = len(self.decode(tokens))
        return self._num_characters[tokens[0]]

    def _following(self, previous: int, token: int) -> str | None:
        """Return the text that a token adds after a complete token, or None if later tokens may still change it.

        `following` caches it for the commonest pairs: decoding takes longer than all other work for a token.
        """
        if token in self.special or token in self.byte_tokens:
            return None
        text, num_decided = self.decode([previous, token]), self.num_characters([previous])
        return text[num_decided:] if len(text) > num_decided and text[-1] != _UNFINISHED else None


class _Decoder:
    """Decodes a window of the last tokens with each new one, because a token's text depends on those before it.

    `undecided` is the text that later tokens may still change.

    The window begins with tokens whose text is complete, so that spaces come out as in the whole text. Nearly always
    that is a single token. It is then kept in `_complete`, and the window is built from it only if it has to grow.
    """

    # Every step reads this for every sequence: slots keep it close together in the CPU's cache.
    __slots__ = ("_complete", "_num_complete", "_num_decided", "_vocabulary", "_window", "undecided")

    def __init__(self, vocabulary: Vocabulary):
        self.undecided = ""
        self._vocabulary = vocabulary
        self._window: list[int] = []
        self._num_complete = 0  # tokens of the window whose text is complete
        self._num_decided = 0  # characters of the window's text that have been handed out
        self._complete: int | None = None

    def decide(self, token: int) -> str:
        """Take a token and return the text that it decides."""
        if self._complete is not None:
            decided = self._vocabulary.following(self._complete, token)
            if decided is not None:
                self._complete = token
                return decided
        return "" if token in self._vocabulary.special else self._grow(token)

    def _grow(self, token: int) -> str:
        if self._complete is not None:
            self._set_window([self._complete])
            self._complete = None
        self._window.append(token)
        text = self._vocabulary.decode(self._window)
        end = max(self._num_decided, len(text) - self._num_undecided(token, text))
        decided, self.undecided = text[self._num_decided : end], text[end:]
        self._num_decided = end
        if decided and not self.undecided:
            self._slide()
        elif len(self._window) > (MAX_WINDOW + 4 if token in self._vocabulary.byte_tokens else 2 * _NUM_KEPT):
            self._cut()
        return decided

    def _num_undecided(self, token: int, text: str) -> int:
        is_unfinished = text.endswith(_UNFINISHED)
        # One invalid byte makes a whole run of byte tokens invalid (byte fallback), so a run is decided at its end. A
        # long run is decided where it is valid, or as invalid if four more bytes have not made it valid.
        if token in self._vocabulary.byte_tokens:
            is_long = len(self._window) > (MAX_WINDOW + 4 if is_unfinished else MAX_WINDOW)
            if not is_long:
                return len(text)
        return 1 if is_unfinished else 0

    def _slide(self) -> None:
        """Drop the tokens that were complete before. All others are complete now."""
        self._set_window(self._window[self._num_complete :])
        self._complete = self._window[0] if len(self._window) == 1 else None

    def _set_window(self, window: list[int]) -> None:
        """Set the window to tokens that are all complete."""
        self._window = window
        self._num_complete = len(window)
        self._num_decided = self._vocabulary.num_characters(window)

    def _cut(self) -> None:
        """Drop the beginning of a window whose text is never complete."""
        self._window = self._window[-_NUM_KEPT:]
        self._num_complete = 0
        self._num_decided = self._vocabulary.num_characters(self._window) - len(self.undecided)


class Detokenizer(_Decoder):
    """The growing text of one sequence. `stopped_by` is the stop string that has ended it.

    The stop string that is complete first counts; of several complete at once, the one that starts first. The text
    after it is not shown, and neither is the stop string unless `includes_stop`. A stop string that is complete
    within the first `min_tokens` tokens does not count.
    """

    __slots__ = ("_held", "_includes_stop", "_num_early", "_num_exempt", "_stop", "stopped_by")

    def __init__(
        self, vocabulary: Vocabulary, stop: Sequence[str] = (), *, includes_stop: bool = False, min_tokens: int = 0
    ):
        assert all(stop), "a stop string is empty"
        super().__init__(vocabulary)
        self.stopped_by: str | None = None
        self._stop = stop
        self._includes_stop = includes_stop
        self._num_early = min_tokens  # tokens to come whose stop strings do not count
        self._num_exempt = 0  # characters of `_held` where no stop string that counts can end
        self._held = ""  # decided text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Take a token and return the text to show now. Returns nothing after a stop string."""
        if not self._stop:
            return self.decide(token)
        if self.stopped_by is not None:
            return ""
        text = self._held + self.decide(token)
        whole = text + self.undecided
        if self._num_early > 0:
            self._num_early -= 1
            self._num_exempt = len(whole)
        found = self._find_stop(whole)
        if found is not None:
            start, end = found
            self.stopped_by = whole[start:end]
            return whole[: end if self._includes_stop else start]
        num_shown = len(text) - self._num_held(text)
        self._held = text[num_shown:]
        self._num_exempt = max(0, self._num_exempt - num_shown)
        return text[:num_shown]

    def finish(self) -> str:
        """Return the text that was held back, when no more tokens come."""
        return "" if self.stopped_by is not None else self._held + self.undecided

    def _find_stop(self, text: str) -> tuple[int, int] | None:
        """Return the start and the end of the stop string that is complete first, if there is one."""
        starts = [(text.find(stop, max(0, self._num_exempt - len(stop) + 1)), stop) for stop in self._stop]
        ends = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if not ends:
            return None
        end, start = min(ends)
        return start, end

    def _num_held(self, text: str) -> int:
        """Return the length of the longest suffix of the text that is a prefix of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
