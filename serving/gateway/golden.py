"""The readiness check of a rollout: does a version on its engine repeat the answers stored when it was made?"""

import asyncio
from contextlib import aclosing
from pathlib import Path
from uuid import uuid4

from cluster.config.settings import Fleet
from cluster.errors import ReloraError
from cluster.fleet import open_blobs
from cluster.registry.registry import Version
from cluster.storage.blobs import BlobStore
from serving.engine.request import Request, SamplingParams
from serving.gateway.backend import Backend, raise_error_of
from serving.gateway.prompters import open_prompter
from serving.gateway.prompts import Prompter
from serving.gateway.routing import Target, dialect_of
from serving.remote.backend import RemoteBackend


async def probe_golden(version: Version, blobs: BlobStore, base: Path, backend: Backend) -> None:
    """Call `check_golden` with the prompter of the version on its base, whose files are in the folder `base`."""
    prompter = await asyncio.to_thread(open_prompter, blobs, base, dialect_of(version))
    await check_golden(version, prompter, backend)


async def probe_remotely(version: Version, fleet: Fleet) -> None:
    """Check the golden answers on each server that runs the version's base, which loads the adapter there."""
    blobs, folder = open_blobs(fleet), fleet.base(version.base).path
    for spec in fleet.engines_of(version.base):
        async with aclosing(RemoteBackend(spec, folder, blobs, fleet.serving)) as server:
            await probe_golden(version, blobs, folder, server)


async def check_golden(version: Version, prompter: Prompter, backend: Backend) -> None:
    """Send the version's golden prompts and compare the greedy answers with `version.details["golden"]`.

    Raises ReloraError that names the first difference, and whatever the engine raises. Each request asks for as many
    tokens as the stored answer has, so answers that were cut at a length limit can be compared too.
    """
    for index, golden in enumerate(version.details.get("golden", [])):
        request = _request(version, prompter, golden["prompt"], golden["completion"])
        text = await _answer(backend, request)
        if not _agrees(text, golden["completion"]):
            raise ReloraError(
                f"{version.label} on {version.base}: the answer to golden prompt {index} ({golden['prompt'][:80]!r}) "
                f"is {text[:80]!r} instead of {golden['completion'][:80]!r}."
            )


def _request(version: Version, prompter: Prompter, prompt: str | list[int], completion: str) -> Request:
    """Return the request for a golden prompt: text, or the tokens of a chat."""
    num_tokens = max(1, prompter.num_text_tokens(completion))
    return Request(
        id=f"golden-{uuid4().hex}",
        prompt_tokens=prompter.encode(prompt if isinstance(prompt, str) else tuple(prompt)),
        sampling=SamplingParams(temperature=0.0, max_tokens=num_tokens),
        adapter=Target(version.base, version).adapter,
    )


async def _answer(backend: Backend, request: Request) -> str:
    text = ""
    async with aclosing(backend.generate(request)) as events:
        async for event in events:
            raise_error_of(event)
            text += event.text
    return text


def _agrees(text: str, golden: str) -> bool:
    """Whether one text starts with the other. A text can have fewer tokens when tokenised than when generated."""
    if not text or not golden:
        return text == golden
    return text.startswith(golden) or golden.startswith(text)
