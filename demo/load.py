"""A steady load of requests over HTTP, sent with the `openai` client, and a record of every answer."""

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import httpx
import openai

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """How one request ended. Times are `time.time()` seconds, comparable with the registry's event log.

    `model` is the pinned version (`name@version`) that answered, according to the server, and `base` is its base model.
    If the request failed, both are empty and `error` says why.
    """

    adapter: str
    prompt: str
    sent_at: float
    first_token_at: float
    done_at: float
    model: str = ""
    base: str = ""
    text: str = ""
    error: str = ""

    @property
    def latency_s(self) -> float:
        """The seconds from sending to the last token."""
        return self.done_at - self.sent_at


class SteadyLoad:
    """Sends `rate` requests per second from its own thread, round-robin over the adapters and their prompts.

    The loop is open: a slow server does not slow down the sending. Every second request streams. Decoding is greedy,
    so each answer can be checked against the version that claims it.
    """

    def __init__(self, base_url: str, prompts: Mapping[str, Sequence[str]], rate: float, max_tokens: int):
        self._client_args = {"base_url": base_url, "api_key": "none", "max_retries": 0, "timeout": TIMEOUT_S}
        self._work = _round_robin(prompts)
        self._interval_s = 1.0 / rate
        self._max_tokens = max_tokens
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load", daemon=True)
        self.answers: list[Answer] = []
        self.num_sent = 0

    def start(self) -> "SteadyLoad":
        """Start sending."""
        self._thread.start()
        return self

    def stop(self) -> list[Answer]:
        """Stop sending, wait for the open requests and return all answers in the order in which they ended.

        A request that takes too long has no answer, so there may be fewer answers than `num_sent`.
        """
        assert self._thread.is_alive(), "the load sends until it is stopped: its thread ended early"
        self._stop.set()
        self._thread.join(TIMEOUT_S + 10)
        return self.answers

    async def _run(self) -> None:
        async with openai.AsyncOpenAI(**self._client_args) as client:  # type: ignore[arg-type]
            tasks: set[asyncio.Task[None]] = set()
            due = time.monotonic()
            while not self._stop.is_set():
                adapter, prompt = next(self._work)
                task = asyncio.create_task(self._ask(client, adapter, prompt, is_stream=self.num_sent % 2 == 0))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                self.num_sent += 1
                due = max(due + self._interval_s, time.monotonic() - 1.0)  # after a stall, catch up by at most 1 s
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            await asyncio.gather(*tasks, return_exceptions=True)  # one failure must not end the others

    async def _ask(self, client: openai.AsyncOpenAI, adapter: str, prompt: str, is_stream: bool) -> None:
        sent_at = time.time()
        try:
            model, base, text, first_at = await self._complete(client, adapter, prompt, is_stream)
            answer = Answer(adapter, prompt, sent_at, first_at, time.time(), model, base, text)
        except (openai.OpenAIError, httpx.HTTPError) as error:  # HTTPError: a stream broke off
            now = time.time()
            answer = Answer(adapter, prompt, sent_at, now, now, error=f"{type(error).__name__}: {error}")
        self.answers.append(answer)

    async def _complete(
        self, client: openai.AsyncOpenAI, adapter: str, prompt: str, is_stream: bool
    ) -> tuple[str, str, str, float]:
        if not is_stream:
            full = await client.completions.create(
                model=adapter, prompt=prompt, max_tokens=self._max_tokens, temperature=0
            )
            return full.model, full.system_fingerprint or "", full.choices[0].text, time.time()
        stream = await client.completions.create(
            model=adapter, prompt=prompt, max_tokens=self._max_tokens, temperature=0, stream=True
        )
        model = ""
        base = ""
        first_at = 0.0
        pieces = []
        async for chunk in stream:
            model = chunk.model
            base = chunk.system_fingerprint or ""
            first_at = first_at or time.time()
            pieces += [choice.text for choice in chunk.choices]
        return model, base, "".join(pieces), first_at or time.time()


def _round_robin(prompts: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    cycles = {name: itertools.cycle(texts) for name, texts in prompts.items()}
    return ((name, next(cycles[name])) for name in itertools.cycle(cycles))
