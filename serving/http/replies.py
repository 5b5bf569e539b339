"""Turns answers into OpenAI's completions and chat completions, whole or as chunks of a stream."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, Protocol

from serving.engine.request import FinishReason, TokenEvent, TokenLogprob
from serving.gateway.gateway import Answer, Part
from serving.gateway.prompts import Prompter
from serving.http.bodies.generation import StreamOptions


@dataclass
class Choice:
    """One continuation, or a piece of one.

    `start` counts the characters of all tokens before it, for the text offsets in completions' logprobs.
    """

    start: int = 0
    text: str = ""
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, event: TokenEvent) -> None:
        """Append what an event brings."""
        self.text += event.text
        self.num_tokens += len(event.tokens)
        self.logprobs.extend(event.logprobs)
        self.finish_reason = event.finish_reason


class Shape(Protocol):
    """The fields in which completions and chat completions differ."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def whole(self, choice: Choice, answer: Answer) -> dict[str, Any]:
        """Return the fields of a finished choice, without those that all shapes share."""
        ...

    def opening(self) -> dict[str, Any] | None:
        """Return the fields of the chunk that opens each choice of a stream, if the shape has such a chunk."""
        ...

    def chunk(self, index: int, piece: Choice, answer: Answer) -> dict[str, Any] | None:
        """Return the fields of one piece of a choice in a stream, or None if there is nothing to send yet."""
        ...


class CompletionShape:
    """The fields of /v1/completions."""

    id_prefix: ClassVar[str] = "cmpl"
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def whole(self, choice: Choice, answer: Answer) -> dict[str, Any]:
        """See `Shape.whole`."""
        return {"text": choice.text, "logprobs": _completion_logprobs(choice, answer.prompter)}

    def opening(self) -> None:
        """Return None: completions start with their first text."""
        return

    def chunk(self, index: int, piece: Choice, answer: Answer) -> dict[str, Any] | None:
        """See `Shape.chunk`."""
        has_news = piece.text or piece.logprobs or piece.finish_reason is not None
        return self.whole(piece, answer) if has_news else None


class Reply:
    """Writes one answer, either whole or chunk by chunk, and counts its tokens.

    With `include_usage`, every chunk has `usage`: null, except for the token counts in the last one. With
    `continuous_usage_stats`, the others have the counts so far.
    """

    def __init__(self, id: str, answer: Answer, shape: Shape, options: StreamOptions):
        self._id = id
        self._answer = answer
        self._shape = shape
        self._options = options
        self._created = int(time.time())
        self._starts: dict[int, int] = {}
        self._num_completion_tokens = 0

    def whole(self) -> dict[str, Any]:
        """Return the response body of an answer that was asked for whole."""
        choices: dict[int, Choice] = defaultdict(Choice)
        for index, event in self._answer.head:
            choices[index].add(event)
        self._num_completion_tokens = sum(choice.num_tokens for choice in choices.values())
        return self._body(
            self._shape.whole_object,
            [
                _choice(index, self._shape.whole(choice, self._answer), choice.finish_reason)
                for index, choice in sorted(choices.items())
            ],
            usage=self.usage(),
        )

    def chunks(self, part: Part) -> Iterator[dict[str, Any]]:
        """Yield the chunks for one part of the answer."""
        index, event = part
        opening = self._shape.opening()
        if index not in self._starts and opening is not None:
            yield self._chunk([_choice(index, opening, None)])
        piece = Choice(start=self._starts.setdefault(index, 0))
        piece.add(event)
        self._num_completion_tokens += piece.num_tokens
        self._starts[index] += sum(len(self._answer.prompter.token_text(one.token)) for one in piece.logprobs)
        chunk = self._shape.chunk(index, piece, self._answer)
        if chunk is not None:
            yield self._chunk([_choice(index, chunk, piece.finish_reason)])

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks after the last part: with `include_usage` one with the token counts and no choices."""
        if self._options.include_usage:
            yield self._chunk([], usage=self.usage())

    def usage(self) -> dict[str, int]:
        """Return the token counts. A prompt counts once, whatever the number of its choices."""
        num_prompt, num_completion = self._answer.num_prompt_tokens, self._num_completion_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
        }

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        if not self._options.include_usage:
            return self._body(self._shape.chunk_object, choices)
        if usage is None and self._options.continuous_usage_stats:
            usage = self.usage()
        return self._body(self._shape.chunk_object, choices, usage=usage)

    def _body(self, object: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": object,
            "created": self._created,
            "model": self._answer.target.label,
            "system_fingerprint": self._answer.target.base,
            "choices": choices,
            **more,
        }


def sse(data: dict[str, Any] | str) -> bytes:
    """Return one server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def _choice(index: int, content: dict[str, Any], finish_reason: FinishReason | None) -> dict[str, Any]:
    """Return a choice. A shape may say otherwise why it ended."""
    return {"index": index, "finish_reason": finish_reason, **content}


def _completion_logprobs(choice: Choice, prompter: Prompter) -> dict[str, Any] | None:
    logprobs = choice.logprobs
    if not logprobs:
        return None
    tokens = [prompter.token_text(one.token) for one in logprobs]
    return {
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=choice.start)),
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [_by_text(one, prompter) for one in logprobs],
    }


def _by_text(one: TokenLogprob, prompter: Prompter) -> dict[str, float]:
    """Return logprobs by token text. If tokens have the same text (parts of a character), the likeliest one counts."""
    return {prompter.token_text(token): logprob for token, logprob in reversed(one.top)}


def chat_logprobs(logprobs: Sequence[TokenLogprob], prompter: Prompter) -> dict[str, Any] | None:
    """Return the logprobs of a chat's tokens, or None if they were not asked for."""
    if not logprobs:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = prompter.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]} for one in logprobs
    ]
    return {"content": content, "refusal": None}
