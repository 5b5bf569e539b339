"""Turns answers into OpenAI's completions and chat completions, whole or as chunks of a stream."""

import json
import time
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from serving.engine.request import FinishReason
from serving.gateway.calls import Answer, Part
from serving.http.bodies.generation import StreamOptions
from serving.http.choice import Choice, choice_details, first_piece, prompt_details
from serving.http.logprobs import TokenReader, completion_logprobs


class Shape(Protocol):
    """The fields in which completions and chat completions differ."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    has_one_prompt: ClassVar[bool]  # what is said about the prompt is then a field of the answer, else of the choice

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
    has_one_prompt: ClassVar[bool] = False

    def whole(self, choice: Choice, answer: Answer) -> dict[str, Any]:
        """See `Shape.whole`."""
        logprobs = completion_logprobs(choice.logprobs, choice.start, answer.prompter)
        return {"text": choice.text, "logprobs": logprobs}

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
        self._readers: dict[int, TokenReader] = {}
        self._unsent: dict[int, tuple[list[int], dict[str, Any]]] = {}  # token ids and details of the prompt
        self._num_completion_tokens = 0

    def whole(self) -> dict[str, Any]:
        """Return the response body of an answer that was asked for whole."""
        choices: dict[int, Choice] = {}
        for index, event in self._answer.head:
            if index not in choices:
                choices[index] = first_piece(index, event, self._answer)
            choices[index].add(event, self._reader(index))
        self._num_completion_tokens = sum(len(choice.tokens) for choice in choices.values())
        entries = [self._whole_choice(index, choice) for index, choice in sorted(choices.items())]
        more = prompt_details(0, choices[0], self._answer) if self._shape.has_one_prompt else {}
        return self._body(self._shape.whole_object, entries, usage=self.usage(), **more)

    def chunks(self, part: Part) -> Iterator[dict[str, Any]]:
        """Yield the chunks for one part of the answer."""
        index, event = part
        is_first = index not in self._starts
        piece = first_piece(index, event, self._answer) if is_first else Choice(start=self._starts[index])
        piece.add(event, self._reader(index))
        if is_first:
            yield from self._open(index, piece)
        self._num_completion_tokens += len(event.tokens)
        self._starts[index] = piece.start + sum(len(one.text) for one in piece.logprobs)
        tokens, details = self._unsent[index]
        tokens += event.tokens
        chunk = self._shape.chunk(index, piece, self._answer)
        if chunk is not None:
            more = {**details, **choice_details(piece, tokens, self._answer)}
            self._unsent[index] = [], {}
            yield self._chunk([_choice(index, {**chunk, **more}, piece.finish_reason)])

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        more = choice_details(choice, choice.tokens, self._answer)
        if not self._shape.has_one_prompt:
            more |= prompt_details(index, choice, self._answer)
        return _choice(index, {**self._shape.whole(choice, self._answer), **more}, choice.finish_reason)

    def _open(self, index: int, piece: Choice) -> Iterator[dict[str, Any]]:
        """Begin a choice of a stream. The details of its prompt go into the first chunk."""
        details, opening = prompt_details(index, piece, self._answer), self._shape.opening()
        if opening is not None:
            yield self._chunk([_choice(index, opening, None)], **(details if self._shape.has_one_prompt else {}))
        self._unsent[index] = [], {} if self._shape.has_one_prompt else details

    def _reader(self, index: int) -> TokenReader:
        if index not in self._readers:
            self._readers[index] = TokenReader(self._answer.prompter, self._answer.call.sampling)
        return self._readers[index]

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

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None, **more: Any) -> dict[str, Any]:
        if not self._options.include_usage:
            return self._body(self._shape.chunk_object, choices, **more)
        if usage is None and self._options.continuous_usage_stats:
            usage = self.usage()
        return self._body(self._shape.chunk_object, choices, usage=usage, **more)

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
