"""Instructor: validated objects from answers."""

import instructor
import openai
import pydantic

from bench.clients.checklist import Checklist, Target

check = Checklist("instructor", "instructor")
QUESTION = [{"role": "user", "content": "Name one colour."}]


class Colour(pydantic.BaseModel):
    """A colour."""

    model_config = pydantic.ConfigDict(extra="forbid")  # a small model would add keys without end
    name: str = pydantic.Field(max_length=12)


def create(target: Target, mode: instructor.Mode, stream: bool = False):
    """Return what Instructor makes of one answer."""
    client = instructor.from_openai(openai.OpenAI(base_url=target.api, api_key="none"), mode=mode)
    model = instructor.Partial[Colour] if stream else Colour
    settings = {"model": target.base, "messages": QUESTION, "max_tokens": 100, "temperature": 0, "max_retries": 1}
    return client.chat.completions.create(response_model=model, stream=stream, **settings)


@check
def by_tools(target: Target) -> None:
    """Through a named function."""
    assert isinstance(create(target, instructor.Mode.TOOLS), Colour)


@check
def by_json_schema(target: Target) -> None:
    """Through `response_format`."""
    assert isinstance(create(target, instructor.Mode.JSON_SCHEMA), Colour)


@check
def by_strict_tools(target: Target) -> None:
    """Through a strict function."""
    assert isinstance(create(target, instructor.Mode.TOOLS_STRICT), Colour)


@check
def partial_objects(target: Target) -> None:
    """Through a stream of a growing object."""
    *_, last = create(target, instructor.Mode.TOOLS, stream=True)
    assert last.name is not None


if __name__ == "__main__":
    check.main()
