"""Llama 3: the answer is `{"name": ..., "parameters": {...}}`, several calls separated by `;`.

Nothing marks a call, except that `<|python_tag|>` may come first. So an object is a call only if it names a known tool.
"""

from typing import ClassVar

from serving.chat.formats.tool_format import Tools, new_call_id
from serving.chat.json_call import json_call
from serving.chat.source import Content, Source, Steps, peek, skip_optional, take_space, text_until

TAG = "<|python_tag|>"


class Llama:
    """See the module."""

    tokens: ClassVar[tuple[str, ...]] = (TAG,)

    def suits(self, template: str) -> bool:
        """See `ToolFormat`."""
        return TAG in template or '"parameters": dictionary of argument name and its value' in template

    def parse(self, source: Source, tools: Tools) -> Steps[None]:
        """See `ToolFormat`."""
        if (yield from peek(source)) != "{" and not (yield from text_until(source, (TAG,))):
            return
        while (yield from peek(source)) == "{":
            no_call = yield from json_call(source, tools)
            if no_call is not None:
                yield Content(no_call)
                break
            yield from skip_optional(source, ";")
            yield from take_space(source)
        yield from text_until(source, ())

    def new_id(self) -> str:
        """See `ToolFormat`."""
        return new_call_id()
