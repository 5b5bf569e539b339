"""Tools for a model whose chat template does not know them: they are written into the messages, in Hermes' format.

The system message lists the tools, an assistant's calls become text, and a tool's answer becomes a user's message. A
model that was not trained on tools may follow this or not; a forced call is valid in any case.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serving.chat.formats.hermes import CLOSE, OPEN

Message = Mapping[str, Any]

_RULES = """You can call functions. These are their signatures, one in each line:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as JSON between these tags:
{open}
{{"name": <name>, "arguments": <arguments>}}
{close}"""


def write_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return the messages with all tools, calls and answers of tools as text."""
    written = [_written(message) for message in messages]
    if not tools:
        return written
    rules = _RULES.format(tools="\n".join(map(json.dumps, tools)), open=OPEN, close=CLOSE)
    if written and written[0]["role"] == "system":
        first, *rest = written
        return [{**first, "content": f"{first['content']}\n\n{rules}"}, *rest]
    return [{"role": "system", "content": rules}, *written]


def _written(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [_call(call["function"]) for call in message.get("tool_calls") or ()]
    if not calls:
        return message
    parts = [message["content"]] if message.get("content") else []
    return {"role": message["role"], "content": "\n".join(parts + calls)}


def _call(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSE}"
