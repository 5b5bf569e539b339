"""Pydantic AI: agents with tools and typed results."""

import pydantic
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from bench.clients.checklist import Checklist, Target

check = Checklist("pydantic-ai", "pydantic-ai-slim")


class Colour(pydantic.BaseModel):
    """A colour."""

    name: str = pydantic.Field(max_length=12)


def agent(target: Target, **more) -> Agent:
    """Return an agent on the base model."""
    model = OpenAIChatModel(target.base, provider=OpenAIProvider(base_url=target.api, api_key="none"))
    return Agent(model, model_settings=ModelSettings(max_tokens=100, temperature=0), **more)


@check
def run(target: Target) -> None:
    """A text."""
    assert agent(target).run_sync("Name one colour.").output


@check
def history(target: Target) -> None:
    """A second turn with the messages of the first."""
    first = agent(target).run_sync("Name one colour.")
    assert agent(target).run_sync("Another?", message_history=first.all_messages()).output


@check
def typed_output_by_a_tool(target: Target) -> None:
    """A result through the library's own function call."""
    assert isinstance(agent(target, output_type=Colour).run_sync("Name one colour.").output, Colour)


@check
def typed_output_by_a_schema(target: Target) -> None:
    """A result through `response_format`."""
    made = agent(target, output_type=NativeOutput(Colour)).run_sync("Name one colour.")
    assert isinstance(made.output, Colour)


if __name__ == "__main__":
    check.main()
