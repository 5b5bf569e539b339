"""Answers in OpenAI's shapes: whole, or as chunks of a stream; for completions and for chat."""

import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, Protocol

from serving.engine.request import FinishReason, TokenEvent, TokenLogprob
from serving.gateway.gateway import Answer
from serving.gateway.prompts import Prompter


@dataclass
class Choice:
    """One continuation, or a piece of it. Grown by the one request that it belongs to.

    `start` is the number of characters of the tokens before it, for the offsets of completions' logprobs.
    """

    start: int = 0
    text: str = ""
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, events: Iterable[TokenEvent]) -> None:
        """Appends what the events bring."""
        for event in events:
            self.text += event.text
            self.num_tokens += len(event.tokens)
            self.logprobs.extend(event.logprobs)
            self.finish_reason = event.finish_reason


class Shape(Protocol):
    """What distinguishes completions from chat."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def whole(self, choice: Choice, prompter: Prompter) -> dict[str, Any]:
        """A finished choice, but for what all shapes share."""
        ...

    def opening(self) -> dict[str, Any] | None:
        """The chunk that opens each choice of a stream, if the shape has one."""
        ...

    def chunk(self, news: Choice, prompter: Prompter) -> dict[str, Any]:
        """A piece of a choice in a stream."""
        ...


class CompletionShape:
    """The shape of /v1/completions."""

    id_prefix: ClassVar[str] = "cmpl"
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def whole(self, choice: Choice, prompter: Prompter) -> dict[str, Any]:
        """See `Shape.whole`."""
        return {"text": choice.text, "logprobs": _completion_logprobs(choice, prompter)}

    def opening(self) -> None:
        """Completions open with their first text."""
        return

    def chunk(self, news: Choice, prompter: Prompter) -> dict[str, Any]:
        """See `Shape.chunk`."""
        return self.whole(news, prompter)


class ChatShape:
    """The shape of /v1/chat/completions."""

    id_prefix: ClassVar[str] = "chatcmpl"
    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def whole(self, choice: Choice, prompter: Prompter) -> dict[str, Any]:
        """See `Shape.whole`."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": _chat_logprobs(choice.logprobs, prompter)}

    def opening(self) -> dict[str, Any]:
        """Chat opens with the role."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def chunk(self, news: Choice, prompter: Prompter) -> dict[str, Any]:
        """See `Shape.chunk`."""
        delta = {"content": news.text} if news.text else {}
        return {"delta": delta, "logprobs": _chat_logprobs(news.logprobs, prompter)}


class Reply:
    """One answer on its way out. Owns the count of what has been sent."""

    def __init__(self, id: str, answer: Answer, shape: Shape):
        self._id = id
        self._answer = answer
        self._shape = shape
        self._created = int(time.time())
        self._starts: dict[int, int] = defaultdict(int)
        self.num_completion_tokens = 0

    async def whole(self) -> dict[str, Any]:
        """The response body of an answer that is not streamed."""
        choices: dict[int, Choice] = defaultdict(Choice)
        async for index, events in self._answer.parts:
            choices[index].add(events)
        self.num_completion_tokens = sum(choice.num_tokens for choice in choices.values())
        return self._body(
            self._shape.whole_object,
            [
                {"index": index, **self._shape.whole(choice, self._answer.prompter), "finish_reason": _reason(choice)}
                for index, choice in sorted(choices.items())
            ],
            usage=self.usage(),
        )

    async def chunks(self, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream. With `include_usage` each has `usage`, null but in the last, which has no choices."""
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        opened: set[int] = set()
        async for index, events in self._answer.parts:
            for choice in self._pieces(index, events, is_first=index not in opened):
                yield self._body(self._shape.chunk_object, [{"index": index, **choice}], **usage)
            opened.add(index)
        if include_usage:
            yield self._body(self._shape.chunk_object, [], usage=self.usage())

    def usage(self) -> dict[str, int]:
        """The token counts; a prompt counts once, however many choices continue it."""
        num_prompt, num_completion = self._answer.num_prompt_tokens, self.num_completion_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
        }

    def _pieces(self, index: int, events: Sequence[TokenEvent], is_first: bool) -> Iterable[dict[str, Any]]:
        opening = self._shape.opening()
        if is_first and opening is not None:
            yield {**opening, "finish_reason": None}
        news = Choice(start=self._starts[index])
        news.add(events)
        self.num_completion_tokens += news.num_tokens
        self._starts[index] += sum(len(self._answer.prompter.token_text(one.token)) for one in news.logprobs)
        if news.text or news.logprobs or news.finish_reason is not None:
            yield {**self._shape.chunk(news, self._answer.prompter), "finish_reason": _reason(news)}

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
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def _reason(choice: Choice) -> str | None:
    return choice.finish_reason.value if choice.finish_reason else None


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
    """Of tokens that read alike (parts of a character) the likeliest counts; `top` is ordered, so it is set last."""
    return {prompter.token_text(token): logprob for token, logprob in reversed(one.top)}


def _chat_logprobs(logprobs: Sequence[TokenLogprob], prompter: Prompter) -> dict[str, Any] | None:
    if not logprobs:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = prompter.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]} for one in logprobs
    ]
    return {"content": content, "refusal": None}
