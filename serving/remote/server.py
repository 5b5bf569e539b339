"""One server over HTTP. Its failures become our errors: it is gone, it is busy, it refuses, or it failed."""

import json
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cluster.config.engines import EngineSpec
from cluster.errors import ContextLengthError, InvalidRequestError, OverloadedError, ReloraError
from serving.errors import BackendDiedError, BackendFailedError
from serving.remote.kinds import KINDS

CONNECT_TIMEOUT_S = 5.0
STATS_TIMEOUT_S = 4.0
_ALREADY = "already"  # in every server's answer to loading an adapter twice


class LostAdapterError(BackendDiedError):
    """The server does not have the adapter, because it restarted or evicted it. Load it, and ask again."""


class RemoteServer:
    """The routes of one server. Only one event loop may use it; `aclose` ends its connections."""

    def __init__(self, spec: EngineSpec):
        self.spec = spec
        self.kind = KINDS[spec.kind]
        self._client: httpx.AsyncClient | None = None

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def complete(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of a streamed completion. Closing the generator disconnects, which aborts the request.

        Raises BackendDiedError if the server is gone, LostAdapterError, OverloadedError if it is busy,
        InvalidRequestError with its message if it refuses the request, and BackendFailedError.
        """
        with self._our_errors():
            async with self._opened().stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise self._refusal(response)
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]" or not line.startswith("data:"):
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise self._error(*_message_of(chunk), retry_after=None)
                    yield chunk

    async def load(self, name: str, path: str, timeout_s: float) -> None:
        """Load an adapter's files under a name that always means the same files. Loading it again does nothing.

        Raises BackendFailedError with the server's message if it cannot use them.
        """
        assert self.kind.load_route is not None, "a server without routes finds adapters by itself"
        body = {"lora_name": name, "lora_path": path}
        response = await self._send("POST", self.kind.load_route, timeout_s, json=body)
        if response.status_code == 200 or _ALREADY in response.text:
            return
        message, status = _message_of(_json(response), response.status_code)
        if status == 404 and "Not Found" in response.text:
            message = "it has no such route. Start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
        raise BackendFailedError(f"{self._who} cannot load adapter {name} from {path}: {message}")

    async def unload(self, name: str) -> None:
        """Unload an adapter; its requests in progress finish. An unknown name is ignored."""
        assert self.kind.unload_route is not None, "a server without routes unloads nothing"
        response = await self._send("POST", self.kind.unload_route, json={"lora_name": name})
        is_gone = self.kind.is_lost_adapter(response.status_code, response.text)
        if response.status_code != 200 and not is_gone:
            raise self._refusal(response)

    async def models(self) -> list[dict[str, Any]]:
        """Return the server's list of models: its base first, then its adapters."""
        response = await self._send("GET", "/v1/models")
        if response.status_code != 200:
            raise self._refusal(response)
        models: list[dict[str, Any]] = _json(response).get("data", [])
        return models

    async def stats(self) -> dict[str, float]:
        """Return the gauges that the server publishes. Raises BackendDiedError if it is not healthy."""
        response = await self._send("GET", self.kind.health_route, STATS_TIMEOUT_S)
        if response.status_code != 200:
            raise BackendDiedError(f"{self._who} is not healthy: status {response.status_code}.")
        return await self._gauges() if self.kind.gauges else {}

    async def _gauges(self) -> dict[str, float]:
        response = await self._send("GET", "/metrics", STATS_TIMEOUT_S)
        sums: dict[str, float] = {}
        if response.status_code == 200:
            for family in text_string_to_metric_families(response.text):
                name = self.kind.gauges.get(family.name)
                values = [sample.value for sample in family.samples if not sample.name.endswith("_created")]
                if name is not None:
                    sums[name] = sum(values)
        return sums

    @property
    def _who(self) -> str:
        return f"The {self.spec.kind} server at {self.spec.url}"

    def _opened(self) -> httpx.AsyncClient:
        if self._client is None:
            key = os.environ.get(self.spec.api_key_env, "") if self.spec.api_key_env else ""
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
            self._client = httpx.AsyncClient(
                base_url=self.spec.url,
                headers={"authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(self.spec.timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
                transport=httpx.AsyncHTTPTransport(retries=self.spec.connect_retries, limits=limits),
            )
        return self._client

    async def _send(self, method: str, route: str, timeout_s: float | None = None, **more: Any) -> httpx.Response:
        timeout = httpx.Timeout(timeout_s or self.spec.timeout_s, connect=CONNECT_TIMEOUT_S)
        with self._our_errors():
            return await self._opened().request(method, route, timeout=timeout, **more)

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise BackendFailedError(f"{self._who} sent nothing for {self.spec.timeout_s:g} s.") from error
        except httpx.TransportError as error:
            raise BackendDiedError(f"{self._who} does not answer: {type(error).__name__}: {error}") from error
        except ValueError as error:
            raise BackendFailedError(f"{self._who} sent something that is not JSON: {error}") from error

    def _refusal(self, response: httpx.Response) -> ReloraError:
        message, status = _message_of(_json(response), response.status_code)
        return self._error(message, status, response.headers.get("retry-after"))

    def _error(self, message: str, status: int, retry_after: str | None) -> ReloraError:
        text = f"{self._who}: {message}"
        if self.kind.is_lost_adapter(status, message):
            return LostAdapterError(text)
        if status in (401, 403):
            return BackendFailedError(f"{self._who} refuses our API key: set `api_key_env` of this engine. {message}")
        if status in (429, 503):
            return OverloadedError(text, float(retry_after) if retry_after and retry_after.isdigit() else 1.0)
        if status >= 500:  # an engine of vLLM that dies answers 500 to all its requests, and then restarts
            return BackendDiedError(text)
        return ContextLengthError(message) if "context length" in message else InvalidRequestError(message)


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        parsed = response.json()
    except ValueError:
        return {"message": response.text[:500]}
    return parsed if isinstance(parsed, dict) else {"message": response.text[:500]}


def _message_of(body: dict[str, Any], status: int = 500) -> tuple[str, int]:
    """Return the message and the status of an error. SGLang's are flat, FastAPI's own have `detail`."""
    error = body.get("error", body)
    if not isinstance(error, dict):
        return str(error), status
    message = error.get("message") or error.get("error_message") or error.get("detail") or "no reason was given"
    code = error.get("code")
    return str(message), code if isinstance(code, int) and code >= 400 else status
