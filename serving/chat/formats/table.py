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


def find_format(template: str, name: str = "auto") -> ToolFormat | None:
    """Return the format of that name, or else the one that a chat template shows. None: no format suits."""
    if name != "auto":
        return FORMATS.get(name)
    return next((format for format in FORMATS.values() if format.suits(template)), None)
