"""The `openai` package: models, completions, embeddings and errors."""

import openai

from bench.clients.checklist import Checklist, Target, refusal

check = Checklist("openai", "openai")


def connect(target: Target) -> openai.OpenAI:
    """Return a client that tries once."""
    return openai.OpenAI(base_url=target.api, api_key="none", max_retries=0, timeout=300)


def complete(target: Target, **more):
    """Return a completion of at most 8 tokens."""
    settings = {"model": target.base, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, **more}
    return connect(target).completions.create(**settings)


@check
def models_are_listed(target: Target) -> None:
    """Both models are in the list."""
    assert {target.base, target.adapter} <= {model.id for model in connect(target).models.list()}


@check
def an_adapter_with_a_slash_in_its_name_is_found(target: Target) -> None:
    """GET /v1/models/org/name."""
    assert connect(target).models.retrieve(target.adapter).id == target.adapter


@check
def completion_of_the_base(target: Target) -> None:
    """A plain completion has text and usage."""
    reply = complete(target)
    assert reply.choices[0].text
    assert reply.usage.completion_tokens == 8


@check
def completion_of_an_adapter(target: Target) -> None:
    """The reply names the adapter."""
    assert complete(target, model=target.adapter).model.startswith(target.adapter)


@check
def completion_streams(target: Target) -> None:
    """The parts of a stream are the whole text."""
    parts = [chunk.choices[0].text for chunk in complete(target, stream=True)]
    assert "".join(parts) == complete(target).choices[0].text


@check
def completion_streams_usage(target: Target) -> None:
    """`include_usage` adds a last chunk."""
    *_, last = complete(target, stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens == 8
    assert last.choices == []


@check
def completion_of_several_prompts(target: Target) -> None:
    """Choices come in the order of the prompts."""
    reply = complete(target, prompt=["Once upon", "The sky is"])
    assert [choice.index for choice in reply.choices] == [0, 1]


@check
def completion_of_token_ids(target: Target) -> None:
    """A prompt may be token ids."""
    assert complete(target, prompt=[10, 20, 30]).usage.prompt_tokens == 3


@check
def completion_with_several_choices(target: Target) -> None:
    """n = 3."""
    assert len(complete(target, n=3, temperature=1.0, seed=1).choices) == 3


@check
def best_of_several(target: Target) -> None:
    """`best_of` 3 and n = 1."""
    assert len(complete(target, best_of=3, n=1, temperature=1.0).choices) == 1


@check
def logprobs_join_to_the_text(target: Target) -> None:
    """The tokens of `logprobs` are the text, with as many alternatives as asked."""
    choice = complete(target, logprobs=3).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert all(len(top) >= 3 for top in choice.logprobs.top_logprobs)


@check
def echo_scores_a_prompt(target: Target) -> None:
    """`echo` with `max_tokens` 0 returns the prompt with its logprobs, as evaluation tools ask."""
    choice = complete(target, echo=True, max_tokens=0, logprobs=1).choices[0]
    assert choice.text == "Once upon a time"
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])


@check
def stop_strings_end_an_answer(target: Target) -> None:
    """The text ends before the stop string."""
    text = complete(target).choices[0].text
    reply = complete(target, stop=[text[3:6]])
    assert reply.choices[0].finish_reason == "stop"
    assert text[3:6] not in reply.choices[0].text


@check
def a_seed_repeats_an_answer(target: Target) -> None:
    """The same seed gives the same text."""
    texts = {complete(target, temperature=1.0, seed=7).choices[0].text for _ in range(2)}
    assert len(texts) == 1


@check
def logit_bias_forces_a_token(target: Target) -> None:
    """A bias of 100 wins at every step."""
    text = complete(target, logit_bias={"300": 100}, max_tokens=2).choices[0].text
    assert text
    assert text[: len(text) // 2] == text[len(text) // 2 :]


@check
def penalties_change_an_answer(target: Target) -> None:
    """Frequency and presence penalties are accepted over their range."""
    plain, penalised = (complete(target, max_tokens=48, frequency_penalty=p) for p in (0.0, 2.0))
    assert plain.choices[0].text != penalised.choices[0].text
    complete(target, presence_penalty=-2.0)


@check
def extra_sampling_fields(target: Target) -> None:
    """The fields that vLLM adds."""
    complete(target, extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 4})


@check
def unknown_models_and_long_prompts_have_typed_errors(target: Target) -> None:
    """404 and 400."""
    refusal(openai.NotFoundError, lambda: complete(target, model="no-such-model"))
    refusal(openai.BadRequestError, lambda: complete(target, prompt="word " * 200_000))


@check
def embeddings(target: Target) -> None:
    """One vector per input; the client asks for base64."""
    reply = connect(target).embeddings.create(model=target.base, input=["a cat", "a dog"])
    assert len(reply.data) == 2
    assert len(reply.data[0].embedding) == len(reply.data[1].embedding) > 8


if __name__ == "__main__":
    check.main()
