"""Calls and their answers, and the engine requests that a call becomes."""

from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

from cluster.config.settings import ServingConfig
from serving.chat.answer import AnswerFormat
from serving.engine.request import Request, SamplingParams, Terms, TokenEvent
from serving.gateway.prompts import Prompt, Prompter
from serving.gateway.routing import Target

Part = tuple[int, TokenEvent]  # a choice's index and an event of it


@dataclass(frozen=True)
class Call:
    """Asks a model for `num_choices` continuations of each prompt.

    Choice c of prompt p has index `p * num_choices + c`. With `is_unlimited` an answer may fill the model's context.
    The model's tokenizer turns `bad_words` into those of `sampling`. With `best_of`, as many continuations are
    generated, and the likeliest become the choices. `truncate_prompt_tokens` is the number of last tokens to keep of a
    prompt; -1 keeps as many as leave room for the answer. `prompt_logprobs` alternatives of the prompt's tokens are
    reported, in a format other than that of `echo`. With `echo` the text begins with the prompt, and with
    `return_token_ids` the answer has all tokens as numbers too.
    """

    id: str
    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    num_choices: int = 1
    is_unlimited: bool = False
    terms: Terms = field(default_factory=Terms)
    bad_words: tuple[str, ...] = ()
    best_of: int | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    return_token_ids: bool = False


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer in progress: who gives it, how to read it, and the events of all its choices.

    `prompts` are those of the call as tokens. `head` holds the first part, or every part of an answer that was asked
    for whole. `rest` yields the others; closing it aborts the requests.
    """

    target: Target
    prompter: Prompter
    format: AnswerFormat
    call: Call
    prompts: Sequence[tuple[int, ...]]
    head: list[Part]
    rest: AsyncGenerator[Part, None]

    @property
    def num_prompt_tokens(self) -> int:
        """The tokens of all prompts. A prompt counts once, whatever the number of its choices."""
        return sum(map(len, self.prompts))


def cut_prompt(
    call: Call, tokens: tuple[int, ...], prompter: Prompter, max_model_tokens: Callable[[], int]
) -> tuple[int, ...]:
    """Return a prompt's last tokens, if the call asks for that."""
    num_kept = call.truncate_prompt_tokens
    if num_kept == -1:
        num_kept = max(1, max_model_tokens() - (1 if call.is_unlimited else max(1, call.sampling.max_tokens)))
    return tokens if num_kept is None else prompter.last_tokens(tokens, num_kept)


def requests_of(
    call: Call, target: Target, prompts: Sequence[tuple[int, ...]], serving: ServingConfig
) -> list[Request]:
    """Return the request of each choice, or of each candidate with `best_of`."""
    deadline_s = call.terms.first_token_deadline_s or serving.first_token_deadline_s or None
    terms = replace(call.terms, first_token_deadline_s=deadline_s)
    return [
        Request(
            id=f"{call.id}-{index}-{choice}",
            prompt_tokens=tokens,
            sampling=_sampling(call, choice, len(tokens), serving.max_model_tokens),
            adapter=target.adapter,
            terms=terms,
        )
        for index, tokens in enumerate(prompts)
        for choice in range(call.best_of or call.num_choices)
    ]


def _sampling(call: Call, choice: int, num_prompt_tokens: int, max_model_tokens: int) -> SamplingParams:
    sampling = call.sampling
    if call.is_unlimited:
        sampling = replace(sampling, max_tokens=max(1, max_model_tokens - num_prompt_tokens))
    if sampling.seed is not None and choice:
        sampling = replace(sampling, seed=sampling.seed + choice)
    if call.best_of and sampling.num_logprobs is None:
        sampling = replace(sampling, num_logprobs=0)
    return sampling


def keep_best(call: Call, parts: Sequence[Part]) -> list[Part]:
    """Return the parts of each prompt's likeliest candidates, best first, with their indices as choices.

    A candidate's score is the mean log-probability of its tokens, as with OpenAI.
    """
    assert call.best_of is not None, "the call wants all its choices"
    logprobs: dict[int, list[float]] = defaultdict(list)
    for index, event in parts:
        logprobs[index] += [one.logprob for one in event.logprobs]
    scores = {index: sum(found) / len(found) if found else 0.0 for index, found in logprobs.items()}
    choices: dict[int, int] = {}  # from candidate to choice
    for prompt in range(len(call.prompts)):
        candidates = range(prompt * call.best_of, (prompt + 1) * call.best_of)
        ranked = sorted(candidates, key=lambda index: -scores[index])
        choices |= {index: prompt * call.num_choices + rank for rank, index in enumerate(ranked[: call.num_choices])}
    shows_logprobs = call.sampling.num_logprobs is not None
    return [
        (choices[index], event if shows_logprobs else event._replace(logprobs=()))
        for index, event in parts
        if index in choices
    ]
