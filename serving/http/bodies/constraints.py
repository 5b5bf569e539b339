"""The fields that say what an answer must look like: OpenAI's `response_format`, and vLLM's for structured output."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.engine import grammar
from serving.engine.grammar import Grammar

MAX_CHARACTERS = 100_000  # of a regular expression or a grammar
MAX_OPTIONS = 4096

JsonSchema = dict[str, Any] | bool | str  # as a value, or as JSON text
Pattern = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
Options = Annotated[list[str], Field(min_length=1, max_length=MAX_OPTIONS)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextFormat(_Part):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(_Part):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(_Part):
    """A JSON Schema. `strict` false accepts keywords that this server cannot enforce, and ignores them."""

    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(_Part):
    """A JSON document that matches a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(_Part):
    """vLLM's `structured_outputs`: exactly one of the first five fields."""

    json_: Annotated[JsonSchema | None, Field(alias="json")] = None
    regex: Pattern | None = None
    choice: Options | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None
    whitespace_pattern: Pattern | None = None
    disable_any_whitespace: bool = False

    def grammars(self) -> list[Grammar]:
        """Return the grammars that the fields ask for."""
        prefix = "structured_outputs"
        has_space, space = not self.disable_any_whitespace, self.whitespace_pattern
        schema = {"type": "object"} if self.json_object else None
        return [
            *_json(self.json_, f"{prefix}.json", space, has_whitespace=has_space),
            *_json(schema, f"{prefix}.json_object", space, has_whitespace=has_space),
            *_others(prefix + ".", self.regex, self.choice, self.grammar),
        ]

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        given = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(value is not None for value in given) != 1:
            raise ValueError("must have exactly one of json, regex, choice, grammar and json_object")
        return self


class ConstraintFields(BaseModel):
    """`response_format`, `structured_outputs`, and the `guided_*` fields of older vLLM. At most one may constrain."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Options | None = None
    guided_grammar: Pattern | None = None
    guided_whitespace_pattern: Pattern | None = None

    @model_validator(mode="after")
    def _check_one_constraint(self) -> Self:
        given = [name for name in ConstraintFields.model_fields if name != "guided_whitespace_pattern"]
        constraining = [name for name in given if getattr(self, name) is not None]
        if isinstance(self.response_format, TextFormat):
            constraining.remove("response_format")
        if len(constraining) > 1:
            raise ValueError(f"{' and '.join(constraining)} both say what the answer looks like: send one of them")
        return self

    def grammar(self) -> Grammar | None:
        """Return what the answer must look like, or None if it may be any text.

        Raises InvalidRequestError if a schema cannot be read. Other faults are found when the grammar is compiled.
        """
        found = [
            *_of_format(self.response_format),
            *(self.structured_outputs.grammars() if self.structured_outputs else ()),
            *_json(self.guided_json, "guided_json", self.guided_whitespace_pattern),
            *_others("guided_", self.guided_regex, self.guided_choice, self.guided_grammar),
        ]
        return found[0] if found else None


def _of_format(format: ResponseFormat | None) -> list[Grammar]:
    if isinstance(format, JsonObjectFormat):
        return [grammar.json_object("response_format")]
    if isinstance(format, JsonSchemaFormat):
        asked, origin = format.json_schema, "response_format.json_schema.schema"
        return [grammar.json_schema(asked.schema_, origin, is_lenient=asked.strict is False)]
    return []


def _json(schema: JsonSchema | None, origin: str, space: str | None, *, has_whitespace: bool = True) -> list[Grammar]:
    if schema is None:
        return []
    whitespace = space or grammar.WHITESPACE
    return [grammar.json_schema(schema, origin, whitespace=whitespace, has_whitespace=has_whitespace)]


def _others(prefix: str, regex: str | None, choice: list[str] | None, rules: str | None) -> list[Grammar]:
    return [
        *([grammar.regex(regex, f"{prefix}regex")] if regex is not None else ()),
        *([grammar.choice(choice, f"{prefix}choice")] if choice is not None else ()),
        *([grammar.context_free(rules, f"{prefix}grammar")] if rules is not None else ()),
    ]
