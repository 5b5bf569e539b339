"""Log-probabilities in the formats of OpenAI and vLLM. The reported tokens, joined, are the text of the answer."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from serving.engine.detokenizer import Detokenizer
from serving.engine.request import SamplingParams, TokenEvent, TokenLogprob
from serving.gateway.prompts import Prompter


class ShownToken(NamedTuple):
    """A token with what it adds to the text: nothing if it is hidden, or if its character is not complete yet.

    `scored` is None for the first token of a prompt, which nothing predicts.
    """

    token: int
    text: str
    bytes: bytes
    scored: TokenLogprob | None

    @property
    def logprob(self) -> float | None:
        """The token's log-probability."""
        return None if self.scored is None else self.scored.logprob


class TokenReader:
    """Reads the tokens of one text in order, and says what each adds to it."""

    def __init__(self, prompter: Prompter, sampling: SamplingParams):
        vocabulary = prompter.vocabulary
        self._prompter = prompter
        self._vocabulary = vocabulary if sampling.skip_special_tokens else vocabulary.with_special
        self._detokenizer = Detokenizer(self._vocabulary)
        self._is_first = True

    def read_event(self, event: TokenEvent) -> list[ShownToken]:
        """Return the tokens of an event that has log-probabilities. An end token that is not shown adds nothing."""
        scored = event.logprobs
        is_last = event.finish_reason is not None
        hidden = scored[-1:] if event.has_end_token else ()
        shown = self.read([one.token for one in scored[: len(scored) - len(hidden)]], scored, is_last=is_last)
        rest = "" if shown else self._detokenizer.finish()  # an unfinished character before the hidden token
        return shown + [ShownToken(one.token, rest, b"", one) for one in hidden]

    def read(self, tokens: Sequence[int], scored: Sequence[TokenLogprob | None], *, is_last: bool) -> list[ShownToken]:
        """Return the next tokens. The last of all also has the text of an unfinished character."""
        texts = [self._detokenizer.push(token) for token in tokens]
        if is_last and texts:
            texts[-1] += self._detokenizer.finish()
        return [
            ShownToken(token, text, self._bytes(token, text), one)
            for token, text, one in zip(tokens, texts, scored, strict=False)
        ]

    def _bytes(self, token: int, text: str) -> bytes:
        """Return the token's bytes. Many tokenizers drop the space before a text."""
        content = b"" if token in self._vocabulary.special else self._prompter.token_bytes(token)
        is_first, self._is_first = self._is_first, False
        return content[1:] if is_first and content == b" " + text.encode() else content


def completion_logprobs(shown: Sequence[ShownToken], start: int, prompter: Prompter) -> dict[str, Any] | None:
    """Return the logprobs of a completion, or None if they were not asked for. `start` is the first text offset."""
    if not shown:
        return None
    return {
        "text_offset": list(accumulate((len(one.text) for one in shown[:-1]), initial=start)),
        "tokens": [one.text for one in shown],
        "token_logprobs": [one.logprob for one in shown],
        "top_logprobs": [_by_text(one, prompter) for one in shown],
    }


def chat_logprobs(shown: Sequence[ShownToken], prompter: Prompter) -> dict[str, Any] | None:
    """Return the logprobs of a chat, or None if they were not asked for."""
    content = []
    for one in shown:
        assert one.scored is not None, "every generated token has a log-probability"
        entry = {"token": one.text, "logprob": one.logprob, "bytes": list(one.bytes)}
        content.append({**entry, "top_logprobs": [_alternative(*pair, one, prompter) for pair in one.scored.top]})
    return {"content": content, "refusal": None} if content else None


def prompt_logprobs(
    tokens: Sequence[int], scored: Sequence[TokenLogprob], num_top: int, prompter: Prompter
) -> list[dict[str, Any] | None]:
    """Return vLLM's `prompt_logprobs`: for each token but the first its own entry, and those of the likeliest."""
    entries: list[dict[str, Any] | None] = [None]
    for one in scored:
        found = {token: (logprob, rank) for rank, (token, logprob) in enumerate(one.top[:num_top], start=1)}
        found.setdefault(one.token, (one.logprob, one.rank))
        entries.append(
            {
                str(token): {"logprob": logprob, "rank": rank, "decoded_token": prompter.token_label(token)}
                for token, (logprob, rank) in found.items()
            }
        )
    assert len(entries) == len(tokens), "a token of the prompt has no log-probability"
    return entries


def _alternative(token: int, logprob: float, shown: ShownToken, prompter: Prompter) -> dict[str, Any]:
    if token == shown.token:
        return {"token": shown.text, "logprob": logprob, "bytes": list(shown.bytes)}
    return {"token": prompter.token_label(token), "logprob": logprob, "bytes": list(prompter.token_bytes(token))}


def _by_text(shown: ShownToken, prompter: Prompter) -> dict[str, float] | None:
    """Return the likeliest tokens and the chosen one by text. Tokens of equal text are told apart by their ids."""
    if shown.scored is None:
        return None
    top = dict(shown.scored.top) | {shown.token: shown.scored.logprob}
    labels = {shown.text: shown.token}
    for token in top:
        if token != shown.token:
            label = prompter.token_label(token)
            labels[f"token_id:{token}" if label in labels else label] = token
    texts = {token: label for label, token in labels.items()}
    return {texts[token]: logprob for token, logprob in top.items()}
