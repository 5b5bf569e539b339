"""From tokens to the text that may be shown: incremental detokenisation and stop strings, of one sequence.

What is shown never has to be taken back. Held back is an unfinished character, and text that may yet become a stop
string. All shown pieces together are `tokenizer.decode(tokens, skip_special_tokens=True)` up to the first stop string,
wherever the borders between tokens fall; only a run of more than MAX_WINDOW byte-fallback tokens is decided piecewise,
because a token's work must not grow with the text.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

MAX_WINDOW = 64
_KEPT = 8  # tokens of context that are enough to decode what follows: a character has at most 4 bytes
_NUM_PAIRS = 1 << 16  # some 10 MB
_UNFINISHED = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Vocabulary:
    """What detokenisation needs to know of a tokenizer, found out once for all sequences."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.special = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.byte_tokens = frozenset(i for token, i in tokenizer.get_vocab().items() if _BYTE_TOKEN.fullmatch(token))
        self._tokenizer = tokenizer
        # The fast tokenizers' own decode is three times as fast as the method around it.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._num_characters: dict[int, int] = {}
        self.following = lru_cache(_NUM_PAIRS)(self._following)

    def decode(self, tokens: list[int]) -> str:
        """The tokens' text without special tokens, nothing tidied up."""
        if self._backend is not None:
            return self._backend.decode(tokens, skip_special_tokens=True)
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def num_characters(self, tokens: list[int]) -> int:
        """The length of the tokens' text."""
        if len(tokens) != 1:
            return len(self.decode(tokens))
        if tokens[0] not in self._num_characters:
            self._num_characters[tokens[0]] = len(self.decode(tokens))
        return self._num_characters[tokens[0]]

    def _following(self, previous: int, token: int) -> str | None:
        """What a token adds to the text of a complete one before it; None where later tokens may still change that.

        `following` remembers the commonest pairs, since decoding takes longer than all else that is done for a token.
        """
        if token in self.special or token in self.byte_tokens:
            return None
        text, num_decided = self.decode([previous, token]), self.num_characters([previous])
        return text[num_decided:] if len(text) > num_decided and text[-1] != _UNFINISHED else None


class _Decoder:
    """Decodes a window of the last tokens again with each new one: a token's text depends on those before it.

    `undecided` is the text so far that later tokens may still change.

    The window begins with tokens whose text is known to be complete, so spaces come out as in the whole. Nearly always
    it is one complete token: then that is `_complete`, and the window is made of it only where it has to grow.
    """

    # Touched for every sequence at every step: what lies in one piece is in the cache sooner.
    __slots__ = ("_complete", "_num_complete", "_num_decided", "_vocabulary", "_window", "undecided")

    def __init__(self, vocabulary: Vocabulary):
        self.undecided = ""
        self._vocabulary = vocabulary
        self._window: list[int] = []
        self._num_complete = 0  # tokens of the window whose text is complete
        self._num_decided = 0  # characters of the window's text that have been handed out
        self._complete: int | None = None

    def decide(self, token: int) -> str:
        """The text that is decided by this token."""
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
        elif len(self._window) > (MAX_WINDOW + 4 if token in self._vocabulary.byte_tokens else 2 * _KEPT):
            self._cut()
        return decided

    def _num_undecided(self, token: int, text: str) -> int:
        is_unfinished = text.endswith(_UNFINISHED)
        # One invalid byte spoils a whole run of byte tokens (byte fallback), so a run is decided at its end; a long one
        # where it is valid, or as invalid when four more bytes have not made it valid.
        if token in self._vocabulary.byte_tokens:
            is_long = len(self._window) > (MAX_WINDOW + 4 if is_unfinished else MAX_WINDOW)
            if not is_long:
                return len(text)
        return 1 if is_unfinished else 0

    def _slide(self) -> None:
        """Go on from the tokens that were not complete before: now all of them are."""
        self._set_window(self._window[self._num_complete :])
        self._complete = self._window[0] if len(self._window) == 1 else None

    def _set_window(self, window: list[int]) -> None:
        """Keep some tokens, all of them complete."""
        self._window = window
        self._num_complete = len(window)
        self._num_decided = self._vocabulary.num_characters(window)

    def _cut(self) -> None:
        """Drop the beginning of a window that does not come to an end by itself."""
        self._window = self._window[-_KEPT:]
        self._num_complete = 0
        self._num_decided = self._vocabulary.num_characters(self._window) - len(self.undecided)


class Detokenizer(_Decoder):
    """The text of one sequence, as it grows. `is_stopped` turns True when a stop string is complete.

    The first stop string is the one that is complete first (of those complete at once, the one that starts first); it
    is not shown, nor what follows it.
    """

    __slots__ = ("_held", "_stop", "is_stopped")

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = ()):
        assert all(stop), "an empty stop string"
        super().__init__(vocabulary)
        self.is_stopped = False
        self._stop = stop
        self._held = ""  # decided, but may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Take one more token and return what may be shown now; nothing once a stop string is complete."""
        if not self._stop:
            return self.decide(token)
        if self.is_stopped:
            return ""
        text = self._held + self.decide(token)
        whole = text + self.undecided
        cut = self._find_stop(whole)
        if cut is not None:
            self.is_stopped = True
            return whole[:cut]
        num_shown = len(text) - self._num_held(text)
        self._held = text[num_shown:]
        return text[:num_shown]

    def finish(self) -> str:
        """The rest, when no more tokens come: what was held back for nothing."""
        return "" if self.is_stopped else self._held + self.undecided

    def _find_stop(self, text: str) -> int | None:
        """Where the stop string begins that is complete first, if any is."""
        starts = [(text.find(stop), stop) for stop in self._stop]
        ends = [(start + len(stop), start) for start, stop in starts if start >= 0]
        return min(ends)[1] if ends else None

    def _num_held(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
