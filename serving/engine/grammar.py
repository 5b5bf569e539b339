"""What an answer may look like, as one value: a JSON Schema, a regular expression, a choice or a grammar.

The functions build a `Grammar` from what a client sends. They do not compile it: `serving.engine.matcher` does, with
llguidance, whose format a `Grammar` holds. So they raise InvalidRequestError only for a schema that is not JSON.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

from cluster.errors import InvalidRequestError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Between two JSON tokens: one space, or a line break and an indentation. JSON allows any number of spaces and breaks,
# and small models then write them until `max_tokens`.
WHITESPACE = r"\x20|\r?\n[\x20\x09]{0,32}"

Schema = Mapping[str, Any] | bool


@dataclass(frozen=True)
class Grammar:
    """A grammar in llguidance's format or, with `is_gbnf`, in llama.cpp's.

    `origin` names the request's field that it comes from, for error messages.
    """

    text: str
    origin: str = field(default="grammar", compare=False)
    is_gbnf: bool = False

    def lark(self) -> str:
        """Return the text in llguidance's format. Raises InvalidRequestError for GBNF that cannot be read."""
        if not self.is_gbnf:
            return self.text
        try:
            return gbnf_to_lark(self.text)
        except Exception as error:  # the converter raises plain exceptions
            raise InvalidRequestError(
                f"{self.origin}: the grammar is not in Lark's syntax, which needs a rule `start: ...`, and cannot be "
                f"read as GBNF: {error}"
            ) from error


def json_schema(
    schema: Schema | str,
    origin: str = "json_schema",
    *,
    whitespace: str = WHITESPACE,
    has_whitespace: bool = True,
    is_lenient: bool = False,
) -> Grammar:
    """Return the grammar of the JSON documents that match a schema, given as JSON text or as its value.

    `whitespace` is a regular expression for the space between tokens. With `is_lenient`, keywords that the library
    cannot enforce are ignored instead of refused. `x-guidance` in the schema overrides these options.
    """
    options: JsonCompileOptions = {"whitespace_flexible": has_whitespace, "lenient": is_lenient}
    if has_whitespace:
        options["whitespace_pattern"] = whitespace
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return Grammar(LLMatcher.grammar_from_json_schema(text, options), origin)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{origin}: the schema is not valid JSON: {error}") from error


def json_object(origin: str = "json_object") -> Grammar:
    """Return the grammar of any JSON object."""
    return json_schema({"type": "object"}, origin)


def regex(pattern: str, origin: str = "regex") -> Grammar:
    """Return the grammar of the texts that a regular expression matches as a whole."""
    return Grammar(LLMatcher.grammar_from_regex(pattern), origin)


def choice(options: Sequence[str], origin: str = "choice") -> Grammar:
    """Return the grammar of a few fixed texts."""
    return Grammar(f"start: {' | '.join(map(_literal, options))}", origin)


def context_free(text: str, origin: str = "grammar") -> Grammar:
    """Return a grammar in Lark's syntax as llguidance extends it, or in llama.cpp's GBNF."""
    return Grammar(text, origin, is_gbnf=not is_lark_syntax(text))


def function_calls(
    functions: Mapping[str, Schema],
    origin: str = "tool_choice",
    *,
    around: tuple[str, str] = ("", ""),
    around_each: tuple[str, str] = ("", ""),
    separator: str | None = None,
    keys: tuple[str, str] = ("name", "arguments"),
) -> Grammar:
    """Return the grammar of one call of one of the functions, or of one or more calls if there is a `separator`.

    `functions` maps names to the schemas of their arguments. A call is a JSON object with the two `keys`. `around`
    stands before and after all calls, `around_each` before and after each one. These are plain texts: a special token
    of the model cannot be asked for. A Hermes call has `around_each=("<tool_call>\\n", "\\n</tool_call>")`, and a list
    of calls is `around=("[", "]"), separator=", "`.
    """
    assert functions, "there is no function to call"
    name_key, arguments_key = map(json.dumps, keys)
    calls = {
        f"call_{i}": [_literal(f"{{{name_key}: {json.dumps(name)}, {arguments_key}: "), _embedded(schema), '"}"']
        for i, (name, schema) in enumerate(functions.items())
    }
    more = [] if separator is None else ["(", _literal(separator), "call", ")*"]
    rules = {
        "start": [*_literals(around[0]), "call", *more, *_literals(around[1])],
        "call": [*_literals(around_each[0]), "(", " | ".join(calls), ")", *_literals(around_each[1])],
        **calls,
    }
    return Grammar("\n".join(f"{name}: {' '.join(parts)}" for name, parts in rules.items()), origin)


def _embedded(schema: Schema) -> str:
    """Return a schema as part of a rule. It stays a document of its own, so its `$ref`s lead where they should."""
    options = {
        "whitespace_pattern": WHITESPACE,
        **(schema.get("x-guidance", {}) if isinstance(schema, Mapping) else {}),
    }
    whole = schema if isinstance(schema, Mapping) else {} if schema else {"not": {}}
    return f"%json {json.dumps({**whole, 'x-guidance': options})}"


def _literals(text: str) -> list[str]:
    return [_literal(text)] if text else []


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
