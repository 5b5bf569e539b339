"""The settings of engines that are not ours, `[[engines]]` of the fleet file. See `cluster.config.settings`."""

from typing import Literal

from cluster.config.types import CountOrZero, Folder, Positive, WebUrl, frozen

EngineKind = Literal["vllm", "sglang", "openai"]


@frozen
class EngineSpec:
    """Optional: servers that run a base in place of our own engine, one table each. A base may have several servers."""

    base: str
    """Name of the base that the server runs."""
    url: WebUrl
    """Address of the server, without /v1."""
    kind: EngineKind = "vllm"
    """How to talk to it. vllm and sglang: load adapters through its routes. openai: it finds adapters by itself."""
    model: str = ""
    """What the server calls the base. Empty: the first model that it lists."""
    adapters: Folder = ".cache/engine-adapters"
    """The folder where adapters are written for the server. Both must see it: a shared disk or a mounted volume."""
    adapters_on_server: str = ""
    """The path of that folder on the server. Empty: the same path."""
    api_key_env: str = ""
    """The environment variable that has the server's API key. Empty: no key."""
    timeout_s: Positive = 60.0
    """If the server sends nothing for so many seconds, the request fails."""
    connect_retries: CountOrZero = 5
    """Attempts to connect again, 0.5 s after the first failure and then after twice the time before: 5 last 7.5 s."""
