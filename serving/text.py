"""From tokens to the text that may be shown: incremental detokenisation and stop strings, of one sequence.

What is shown never has to be taken back. Held back is an unfinished character, and text that may yet become a stop
string. All shown pieces together are `tokenizer.decode(tokens, skip_special_tokens=True)` up to the first stop string,
wherever the borders between tokens fall.
"""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Detokenizer:
    """The text of one sequence, as it grows. `is_stopped` turns True when a stop string is complete.

    The first stop string is the one that is complete first (of those complete at once, the one that starts first); it
    is not shown, nor what follows it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        assert all(stop), "an empty stop string"
        self.is_stopped = False
        self._decoder = _Decoder(tokenizer)
        self._stop = stop
        self._held = ""  # decided, but may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Take one more token and return what may be shown now; nothing once a stop string is complete."""
        if self.is_stopped:
            return ""
        decided, undecided = self._decoder.push(token)
        text = self._held + decided
        cut = self._find_stop(text + undecided)
        if cut is not None:
            self.is_stopped = True
            return (text + undecided)[:cut]
        num_shown = len(text) - self._num_held(text)
        self._held = text[num_shown:]
        return text[:num_shown]

    def finish(self) -> str:
        """The rest, when no more tokens come: what was held back for nothing."""
        return "" if self.is_stopped else self._held + self._decoder.undecided

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


class _Decoder:
    """Decodes a window of the last tokens again with each new one: a token's text depends on those before it.

    The window begins with tokens whose text is known to be complete, so spaces come out as in the whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.undecided = ""
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._window: list[int] = []
        self._num_complete = 0  # tokens of the window whose text is complete
        self._num_decided = 0  # characters of the window's text that have been handed out

    def push(self, token: int) -> tuple[str, str]:
        """The text that is decided by this token, and the text so far that later tokens may still change."""
        if token in self._special:
            return "", self.undecided
        self._window.append(token)
        text = self._decode()
        end = max(self._num_decided, len(text) - self._num_undecided(token, text))
        decided, self.undecided = text[self._num_decided : end], text[end:]
        self._num_decided = end
        if not self.undecided and decided:
            self._slide()
        return decided, self.undecided

    def _num_undecided(self, token: int, text: str) -> int:
        # One invalid byte spoils a whole run of byte tokens (byte fallback), so a run is decided at its end.
        if _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or ""):
            return len(text)
        return 1 if text.endswith(_UNFINISHED) else 0

    def _slide(self) -> None:
        self._window = self._window[self._num_complete :]
        self._num_complete = len(self._window)
        self._num_decided = len(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
