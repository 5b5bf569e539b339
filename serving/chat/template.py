"""A model's chat template: it turns a conversation into a prompt, and shows how the answer is to be read."""

import inspect
import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from cluster.errors import InvalidRequestError
from serving.chat.answer import AnswerFormat
from serving.chat.conversation import Chat
from serving.chat.declared import DeclaredFormat
from serving.chat.formats.json_list import JsonList, forced_calls
from serving.chat.formats.table import FORMATS, find_format
from serving.chat.settings import ChatSettings
from serving.chat.thinking import Thinking, find_thinking
from serving.chat.written_tools import write_tools
from serving.engine.grammar import Grammar

# Errors that a template raises for messages, tools or variables that it was not written for.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
# Variables that a request sets by fields of their own, or that would change what apply_chat_template does.
_RESERVED = frozenset(("messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters))


class ChatTemplate:
    """The template of one chat. Its methods raise InvalidRequestError for what the template cannot do."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat, settings: ChatSettings):
        if not (chat.template or tokenizer.chat_template):
            raise InvalidRequestError(
                "This model has no chat template, so it cannot answer messages. Use /v1/completions instead."
            )
        self._tokenizer = tokenizer
        self._chat = chat
        self._settings = settings
        self._source: str = tokenizer.get_chat_template(chat.template, list(chat.tools) or None)
        is_auto = settings.tool_parser == settings.reasoning_parser == "auto" and chat.template is None
        reads_calls = bool(chat.tools) and not chat.is_forced
        self._declared = getattr(tokenizer, "response_template", None) if is_auto and reads_calls else None
        self._writes_tools = not self._mentions("tools")
        parser = "hermes" if self._writes_tools and settings.tool_parser == "auto" else settings.tool_parser
        self._format = find_format(self._source, parser)
        self._thinking = find_thinking(self._source, settings.reasoning_parser)

    def grammar(self) -> Grammar | None:
        """Return the grammar of the answer if it must be a tool call."""
        chat = self._chat
        if not chat.is_forced:
            return None
        schemas = chat.tool_schemas()
        tools = schemas if chat.forced_tool is None else {chat.forced_tool: schemas[chat.forced_tool]}
        return forced_calls(tools, is_single=chat.forced_tool is not None or chat.max_calls == 1)

    def prompt(self, *, is_constrained: bool) -> str:
        """Return the prompt. If it opens reasoning, but a grammar leaves no room for that, the reasoning is closed."""
        text = self.render()
        if is_constrained and self._thinking is not None and _is_open(self._thinking, self._chat, text):
            text += f"{self._thinking.end}\n\n"
        return text

    def render(self) -> str:
        """Return the prompt, as transformers' `apply_chat_template` writes it.

        A template that does not know the role "developer" gets "system" instead: many leave unknown roles out. One that
        does not know tools gets them as text (`serving.chat.written_tools`).
        """
        self._check()
        chat = self._chat
        known = "developer" in self._source
        messages = [
            {**message, "role": "system"} if message["role"] == "developer" and not known else dict(message)
            for message in chat.messages
        ]
        tools = [] if self._writes_tools else list(chat.tools)
        try:
            return self._tokenizer.apply_chat_template(
                write_tools(messages, chat.tools) if self._writes_tools else messages,
                tools=tools or None,
                documents=list(chat.documents) or None,
                chat_template=chat.template,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                tokenize=False,
                **self._variables(),
            )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequestError(f"The model's chat template rejects these messages: {error}") from error

    def answer_format(self, prompt: str) -> AnswerFormat:
        """Return how to read the answer to a prompt: as the tokenizer declares, or as template and settings say."""
        if self._declared is not None:
            return AnswerFormat(
                declared=DeclaredFormat(self._declared, prompt, self._chat.tools), max_calls=self._chat.max_calls
            )
        format = JsonList(self._format) if self._chat.is_forced else self._format if self._chat.tools else None
        thinking = self._thinking
        marks = {*(format.tokens if format else ()), *((thinking.start, thinking.end) if thinking else ())}
        special = {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        return AnswerFormat(
            format=format,
            thinking=thinking,
            is_thinking_open=thinking is not None and _is_open(thinking, self._chat, prompt),
            tools=self._chat.tool_schemas(),
            max_calls=self._chat.max_calls,
            hidden=special - marks if special & marks else (),
        )

    def _check(self) -> None:
        chat = self._chat
        if chat.template and not self._settings.trusts_request_templates:
            raise InvalidRequestError(
                "chat_template: this server uses the model's own template. serving.trust_request_chat_template = true "
                "in the fleet file lets requests bring one."
            )
        if reserved := sorted(_RESERVED & chat.variables.keys()):
            raise InvalidRequestError(f"chat_template_kwargs: {reserved[0]!r} is no variable that a request may set.")
        if chat.documents and not self._mentions("documents"):
            raise InvalidRequestError(
                "documents: the model's chat template does not use documents, so the model would not see them."
            )
        if chat.tools and self._format is None and self._declared is None and not chat.is_forced:
            raise InvalidRequestError(
                "tools: this server does not know in which format the model writes calls. Set tool_parser of the base "
                f"or the adapter in the fleet file to one of: {', '.join(FORMATS)}."
            )

    def _variables(self) -> dict[str, Any]:
        effort, variables = self._chat.reasoning_effort, self._chat.variables
        if effort is None or (effort == "none" and self._thinking is None):
            return dict(variables)
        if self._mentions("reasoning_effort"):
            return {"reasoning_effort": effort, **variables}
        if self._mentions("enable_thinking"):
            return {"enable_thinking": effort != "none", **variables}
        raise InvalidRequestError("reasoning_effort: the model's chat template has no setting for it.")

    def _mentions(self, variable: str) -> bool:
        return re.search(rf"\b{variable}\b", self._source) is not None


def _is_open(thinking: Thinking, chat: Chat, prompt: str) -> bool:
    """Return whether the answer begins inside the reasoning."""
    if chat.continue_final_message:
        begun = prompt[prompt.rfind(chat.messages[-1].get("content", "").strip()) :]
        return begun.rfind(thinking.start) > begun.rfind(thinking.end)
    return prompt.rstrip().endswith(thinking.start)
