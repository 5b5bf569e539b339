"""Chats as rows: messages in OpenAI's format, and how a model's chat template turns them into text.

The template is the tokenizer's own, so the same row may become another text on a new base.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from cluster.errors import InvalidDataError
from cluster.storage.jsonl import text_field

_SETTINGS = ("tools", "chat_template_kwargs")  # of a request, beside its messages, that change the prompt


@dataclass(frozen=True)
class Chat:
    """A conversation to answer. `request` is JSON text with `messages` and settings, so equal chats are equal."""

    request: str

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]) -> "Chat":
        """Return the chat of messages and of a request's other fields, which may have settings."""
        settings = {name: fields[name] for name in _SETTINGS if fields.get(name)}
        return cls(json.dumps({"messages": list(messages), **settings}, sort_keys=True))


Prompt = str | Chat


def prompt_and_completion(fields: Mapping[str, Any], at: str) -> tuple[Prompt, str]:
    """Return the prompt and the right answer of a training row. InvalidDataError names the field; `at` is the place.

    A row has `messages` that end with the assistant's, or `prompt` and `completion`, as text or as messages.
    """
    if "messages" in fields:
        messages = _messages(fields, "messages", at)
        if messages[-1]["role"] != "assistant":
            raise InvalidDataError(f"{at}: the last of the messages must be the assistant's, which is the right answer")
        return Chat.of(_nonempty(messages[:-1], at), fields), _answer(messages[-1], at)
    if isinstance(fields.get("prompt"), list):
        answer = _messages(fields, "completion", at)
        if len(answer) != 1:
            raise InvalidDataError(f"{at}: field 'completion' must be one message, not {len(answer)}")
        return Chat.of(_messages(fields, "prompt", at), fields), _answer(answer[0], at)
    return text_field(fields, "prompt", at), text_field(fields, "completion", at, may_be_empty=True)


def prompt_of(fields: Mapping[str, Any], at: str) -> Prompt:
    """Return the prompt of a logged request. If its messages end with the assistant's, that answer is left out."""
    if "messages" not in fields and not isinstance(fields.get("prompt"), list):
        return text_field(fields, "prompt", at)
    messages = _messages(fields, "messages" if "messages" in fields else "prompt", at)
    return Chat.of(_nonempty(messages[:-1] if messages[-1]["role"] == "assistant" else messages, at), fields)


def render(tokenizer: PreTrainedTokenizerBase, chat: Chat, answer: str | None = None) -> str:
    """Return the template's text of a chat up to where the answer begins, or with the answer.

    InvalidDataError if the tokenizer has no chat template or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise InvalidDataError("there is no chat template beside the model, so rows with messages cannot be used")
    request = json.loads(chat.request)
    messages = request["messages"] + ([] if answer is None else [{"role": "assistant", "content": answer}])
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=request.get("tools"),
            tokenize=False,
            add_generation_prompt=answer is None,
            **request.get("chat_template_kwargs", {}),
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise InvalidDataError(f"the chat template rejects the messages: {error}") from error
    return str(text)


def completion_text(tokenizer: PreTrainedTokenizerBase, chat: Chat, answer: str, end: str) -> str:
    """Return the answer as the model writes it: with what the template puts between the prompt and the token `end`."""
    start, whole = render(tokenizer, chat), render(tokenizer, chat, answer)
    written, found, _ = whole.removeprefix(start).partition(end)
    return written if found and whole.startswith(start) else answer


def _messages(fields: Mapping[str, Any], name: str, at: str) -> list[dict[str, Any]]:
    messages = fields.get(name)
    if not isinstance(messages, list) or not messages:
        raise InvalidDataError(f"{at}: field '{name}' must be a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidDataError(f"{at}: each of the messages must be an object with `role` and `content`")
    return [{**message, "content": _text(message, at)} for message in messages]


def _text(message: Mapping[str, Any], at: str) -> str | None:
    """Return a message's content as text; parts of text are joined."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, dict) and part.get("type") == "text" and "text" in part for part in parts):
        raise InvalidDataError(f"{at}: the content of a message must be text; images and other parts are not supported")
    return "".join(str(part["text"]) for part in parts)


def _answer(message: Mapping[str, Any], at: str) -> str:
    if not isinstance(message["content"], str):
        raise InvalidDataError(f"{at}: the answer has no text content; tool calls as answers are not supported")
    return message["content"]


def _nonempty(messages: list[dict[str, Any]], at: str) -> list[dict[str, Any]]:
    if not messages:
        raise InvalidDataError(f"{at}: there is no message before the answer")
    return messages
