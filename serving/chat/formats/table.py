"""The table of formats, and how a chat template's format is found."""

from collections.abc import Mapping

from serving.chat.formats.hermes import Hermes
from serving.chat.formats.llama import Llama
from serving.chat.formats.mistral import Mistral
from serving.chat.formats.pythonic import Pythonic
from serving.chat.formats.qwen_xml import QwenXml
from serving.chat.formats.tool_format import ToolFormat

# By name, as `tool_parser` in a fleet file spells it. The first that suits a template is its format.
FORMATS: Mapping[str, ToolFormat] = {
    "qwen3_coder": QwenXml(),
    "hermes": Hermes(),
    "mistral": Mistral(),
    "pythonic": Pythonic(),
    "llama3_json": Llama(),
}


def find_format(template: str) -> ToolFormat | None:
    """Return the format in which the model of a chat template writes tool calls, or None if no format suits."""
    return next((format for format in FORMATS.values() if format.suits(template)), None)
