"""Random JSON Schemas of the kinds that clients send, in which every answer is bounded."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_NAMES = (
    *("name", "title", "city", "area", "price", "rating", "tags", "artist", "album", "playlist", "date", "time"),
    *("genre", "food", "near", "family_friendly", "quantity", "status", "notes", "email", "id", "parent", "items"),
)
_OPTIONS = ("low", "medium", "high", "open", "closed", "yes", "no", "rock", "jazz", "été", 'a "quoted" one', "1", "new")
_PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^[a-z]+(_[a-z]+){0,2}$", "^(0|[1-9][0-9]{0,2})%$", "^#[0-9a-f]{6}$")
_FORMATS = ("date", "time", "uuid", "ipv4", "email")
_MAX_DEPTH = 3


def random_schema(seed: int) -> Schema:
    """Return the schema of an object with 1 to 5 properties, nested up to three levels deep."""
    return _Maker(random.Random(seed)).whole()


class _Maker:
    def __init__(self, draw: random.Random):
        self._draw = draw
        self._definitions: Schema = {}

    def whole(self) -> Schema:
        schema = self._object(1)
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _value(self, depth: int) -> Schema:
        makers: list[Callable[[int], Schema]] = [
            *(self._text, self._text, self._pattern, self._format, self._enum, self._enum, self._const),
            *(self._integer, self._integer, self._number, self._boolean, self._null, self._any_of, self._reference),
        ]
        if depth < _MAX_DEPTH:
            makers += [self._array, self._array, self._object, self._object]
        return self._draw.choice(makers)(depth + 1)

    def _object(self, depth: int) -> Schema:
        names = self._draw.sample(_NAMES, self._draw.randint(1, 5 if depth == 1 else 3))
        return {
            "type": "object",
            "properties": {name: self._value(depth) for name in names},
            "required": [name for name in names if self._draw.random() < 0.8],
            "additionalProperties": False,
        }

    def _array(self, depth: int) -> Schema:
        least = self._draw.randint(0, 2)
        most = least + self._draw.randint(0, 2)
        return {"type": "array", "items": self._value(depth), "minItems": least, "maxItems": most}

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._draw.choice((self._text, self._integer, self._enum))(depth), self._null(depth)]}

    def _reference(self, depth: int) -> Schema:
        name = f"part{len(self._definitions)}"
        self._definitions[name] = self._draw.choice((self._text, self._enum, self._integer))(depth)
        return {"$ref": f"#/$defs/{name}"}

    def _text(self, depth: int) -> Schema:
        least = self._draw.choice((0, 0, 1, 3))
        return {"type": "string", "minLength": least, "maxLength": least + self._draw.randint(4, 20)}

    def _pattern(self, depth: int) -> Schema:
        return {"type": "string", "pattern": self._draw.choice(_PATTERNS), "maxLength": 24}

    def _format(self, depth: int) -> Schema:
        return {"type": "string", "format": self._draw.choice(_FORMATS)}

    def _enum(self, depth: int) -> Schema:
        return {"enum": self._draw.sample((*_OPTIONS, 3, 2.5, None, True), self._draw.randint(2, 5))}

    def _const(self, depth: int) -> Schema:
        return {"const": self._draw.choice((*_OPTIONS, 7, [1, "a"], {"x": None}))}

    def _integer(self, depth: int) -> Schema:
        least = self._draw.randint(-50, 50)
        return {"type": "integer", "minimum": least, "maximum": least + self._draw.randint(0, 5000)}

    def _number(self, depth: int) -> Schema:
        return {"type": "number", "minimum": 0, "maximum": self._draw.randint(1, 100)}

    def _boolean(self, depth: int) -> Schema:
        return {"type": "boolean"}

    def _null(self, depth: int) -> Schema:
        return {"type": "null"}
