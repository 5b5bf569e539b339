"""LangChain's OpenAI classes."""

import pydantic
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from bench.clients.checklist import Checklist, Target

check = Checklist("langchain", "langchain-openai")


class Colour(pydantic.BaseModel):
    """A colour."""

    name: str = pydantic.Field(max_length=12)


@tool
def get_weather(city: str) -> str:
    """Return the weather of a city."""
    return f"sunny in {city}"


def chat_model(target: Target, **more) -> ChatOpenAI:
    """Return a chat model that answers with at most 100 tokens."""
    settings = {"max_tokens": 100, "temperature": 0, "max_retries": 0, **more}
    return ChatOpenAI(base_url=target.api, api_key="none", model=target.base, **settings)


@check
def invoke(target: Target) -> None:
    """One answer with usage."""
    message = chat_model(target, max_tokens=8).invoke("Name one colour.")
    assert message.content
    assert message.usage_metadata["output_tokens"] > 0


@check
def stream(target: Target) -> None:
    """An answer in parts."""
    assert "".join(part.content for part in chat_model(target, max_tokens=8).stream("Name one colour."))


@check
def batch(target: Target) -> None:
    """Several questions at a time."""
    assert len(chat_model(target, max_tokens=4).batch(["One.", "Two.", "Three."])) == 3


@check
def second_turn(target: Target) -> None:
    """The answer goes back as the library sends it."""
    model = chat_model(target, max_tokens=8)
    first = model.invoke([HumanMessage("Name one colour.")])
    assert model.invoke([HumanMessage("Name one colour."), first, HumanMessage("Another?")]).content is not None


@check
def structured_output(target: Target) -> None:
    """`with_structured_output` in its default form."""
    assert isinstance(chat_model(target).with_structured_output(Colour).invoke("Name one colour."), Colour)


@check
def structured_output_by_a_function_call(target: Target) -> None:
    """`with_structured_output` through a named tool."""
    model = chat_model(target).with_structured_output(Colour, method="function_calling")
    assert isinstance(model.invoke("Name one colour."), Colour)


@check
def bound_tools(target: Target) -> None:
    """A required call, and its result in the next turn."""
    model = chat_model(target)
    called = model.bind_tools([get_weather], tool_choice="any").invoke("What is the weather in Bern?")
    assert called.tool_calls[0]["name"] == "get_weather"
    result = ToolMessage("sunny", tool_call_id=called.tool_calls[0]["id"])
    assert isinstance(model.bind_tools([get_weather]).invoke([HumanMessage("Weather?"), called, result]), AIMessage)


@check
def completion(target: Target) -> None:
    """The completion class."""
    settings = {"model": target.adapter, "max_tokens": 4, "max_retries": 0}
    assert OpenAI(base_url=target.api, api_key="none", **settings).invoke("Once upon")


@check
def embeddings(target: Target) -> None:
    """Texts as vectors; the class sends token ids unless it is told not to."""
    settings = {"model": target.base, "check_embedding_ctx_length": False}
    vectors = OpenAIEmbeddings(base_url=target.api, api_key="none", **settings).embed_documents(["a cat", "a dog"])
    assert len(vectors) == 2


if __name__ == "__main__":
    check.main()
