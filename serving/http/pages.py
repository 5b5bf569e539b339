"""The pages for people: what this server serves, and its API. They are plain HTML and need no internet."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from jinja2 import Environment, FileSystemLoader
from starlette.responses import HTMLResponse, Response

from serving.http.app_state import gateway_of
from serving.http.operations import relora_version

router = APIRouter()
_templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)


@dataclass(frozen=True)
class Field:
    """A field of a request body, as the page about the API shows it. `default` is JSON, or "required"."""

    name: str
    kind: str
    default: str
    description: str


@dataclass(frozen=True)
class Operation:
    """A route, as the page about the API shows it; `body` says what its request body is."""

    method: str
    path: str
    description: str
    body: str
    fields: tuple[Field, ...]


@router.get("/", include_in_schema=False)
async def home(request: HttpRequest) -> Response:
    """Show the bases and adapters that are served, with links to the other pages."""
    snapshot = gateway_of(request).snapshot
    page = _templates.get_template("home.html.j2")
    bases = [(base, name in snapshot.backends) for name, base in sorted(snapshot.bases.items())]
    routes = [route for _, route in sorted(snapshot.routes.items())]
    return HTMLResponse(page.render(bases=bases, routes=routes, version=relora_version()))


@router.get("/docs", include_in_schema=False)
async def docs(request: HttpRequest) -> Response:
    """Show the routes and the fields of their bodies, as the OpenAPI document describes them."""
    page = _templates.get_template("docs.html.j2")
    return HTMLResponse(page.render(operations=list(operations(request.app.openapi()))))


def operations(document: Mapping[str, Any]) -> Iterator[Operation]:
    """Yield the operations of an OpenAPI document in its order."""
    schemas = document.get("components", {}).get("schemas", {})
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            body = schemas.get(_name(content.get("schema", {})), {})
            yield Operation(
                method=method.upper(),
                path=path,
                description=operation.get("description", ""),
                body=body.get("description", ""),
                fields=tuple(_field(name, field, body) for name, field in body.get("properties", {}).items()),
            )


def _field(name: str, schema: Mapping[str, Any], body: Mapping[str, Any]) -> Field:
    default = "required" if name in body.get("required", ()) else json.dumps(schema.get("default"))
    return Field(name, _kind(schema), default, schema.get("description", ""))


def _kind(schema: Mapping[str, Any]) -> str:
    """Describe the values that a schema allows, such as "list of integer (0 to 20)"."""
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(map(repr, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return (_name(schema) or schema.get("type", "any")) + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    words = {
        "minimum": "from {:g}",
        "exclusiveMinimum": "above {:g}",
        "maximum": "to {:g}",
        "exclusiveMaximum": "below {:g}",
    }
    bounds = [text.format(schema[key]) for key, text in words.items() if key in schema]
    return f" ({' '.join(bounds)})" if bounds else ""


def _name(schema: Mapping[str, Any]) -> str:
    """Return the name of the schema that a reference points to, or "" without a reference."""
    return str(schema.get("$ref", "")).rpartition("/")[2]
