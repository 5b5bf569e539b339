"""One choice of an answer, and what it has beside its text: the echoed prompt, token ids, the prompt's scores."""

from dataclasses import dataclass, field, replace
from typing import Any

from serving.engine.request import FinishReason, TokenEvent, TokenLogprob
from serving.gateway.calls import Answer
from serving.http.logprobs import ShownToken, TokenReader, prompt_logprobs


@dataclass
class Choice:
    """One continuation, or a piece of one.

    `start` counts the characters of all tokens before it, for the text offsets in completions' logprobs. The first
    piece has `prompt_logprobs`, if they were asked for.
    """

    start: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[ShownToken] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, event: TokenEvent, reader: TokenReader) -> None:
        """Append what an event brings."""
        self.text += event.text
        self.tokens += event.tokens
        if event.logprobs:
            self.logprobs += reader.read_event(event)
        self.prompt_logprobs += event.prompt_logprobs
        self.finish_reason = event.finish_reason
        self.stop_reason = event.stop_reason


def first_piece(index: int, event: TokenEvent, answer: Answer) -> Choice:
    """Return the beginning of a choice, before its first event is added: nothing, or the echoed prompt."""
    call = answer.call
    if not call.echo:
        return Choice()
    number = index // call.num_choices
    prompt, tokens = call.prompts[number], answer.prompts[number]
    sampling = call.sampling
    if isinstance(prompt, str) and call.truncate_prompt_tokens is None:
        text, sampling = prompt, replace(sampling, skip_special_tokens=False)
    else:
        text = answer.prompter.decode(tokens, skip_special_tokens=sampling.skip_special_tokens)
    if sampling.num_logprobs is None:
        return Choice(text=text)
    scored = [None, *(replace(one, top=one.top[: sampling.num_logprobs]) for one in event.prompt_logprobs)]
    shown = TokenReader(answer.prompter, sampling).read(tokens, scored, is_last=True)
    if shown[0].text and "".join(one.text for one in shown[1:]) == text:  # a beginning-of-sequence token
        shown[0] = shown[0]._replace(text="", bytes=b"")
    return Choice(text=text, logprobs=shown)


def choice_details(choice: Choice, tokens: list[int], answer: Answer) -> dict[str, Any]:
    """Return the fields of a choice, or of a chunk of it, that have nothing to do with its shape."""
    details: dict[str, Any] = {} if choice.finish_reason is None else {"stop_reason": choice.stop_reason}
    return {**details, "token_ids": tokens} if answer.call.return_token_ids else details


def prompt_details(index: int, choice: Choice, answer: Answer) -> dict[str, Any]:
    """Return what was asked for about the prompt of a choice whose first event has come."""
    call, details = answer.call, dict[str, Any]()
    tokens = answer.prompts[index // call.num_choices]
    if call.return_token_ids:
        details["prompt_token_ids"] = list(tokens)
    if call.prompt_logprobs is not None:
        scored = choice.prompt_logprobs
        details["prompt_logprobs"] = prompt_logprobs(tokens, scored, call.prompt_logprobs, answer.prompter)
    return details
