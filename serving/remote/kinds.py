"""How the kinds of server differ: their routes, how a request names an adapter, and the fields that they take.

The text and the end of an answer are computed here from its tokens, as for our own engines. So a server only has to
choose tokens, and fields about text are never sent.
"""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cluster.config.engines import EngineKind
from cluster.config.settings import ServingConfig
from cluster.errors import InvalidRequestError
from serving.engine.request import Request, SamplingParams

# Fields that `SequenceState` reads, from the tokens that the server returns.
_READ_HERE = frozenset(
    ("max_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
)
_PLAIN = ("temperature", "top_p", "top_k", "seed")
_OPENAI = (*_PLAIN, "frequency_penalty", "presence_penalty", "logit_bias")
_SGLANG = (*_OPENAI, "repetition_penalty", "min_p", "min_tokens")
_VLLM = (*_SGLANG, "allowed_token_ids", "num_logprobs")
# With these fields a token depends on the earlier ones in a way that a longer prompt cannot express.
_CONTINUABLE = _READ_HERE | {*_PLAIN, "min_p", "logit_bias", "allowed_token_ids", "num_logprobs"}
_REQUEST = frozenset(("id", "prompt_tokens", "sampling", "adapter", "resumed_tokens", "terms"))
_DEFAULTS = SamplingParams()
_PLAIN_REQUEST = Request("", (0,), _DEFAULTS)


@dataclass(frozen=True)
class ServerKind:
    """One kind of server. Without `load_route` the server finds adapters by itself, by the name of their folder.

    `sampling` are the fields of `SamplingParams` that it takes. `gauges` are ours by the names in its /metrics.
    """

    name: EngineKind
    health_route: str
    load_route: str | None
    unload_route: str | None
    sampling: tuple[str, ...]
    gauges: Mapping[str, str]
    can_salt: bool = True

    def adapter_model(self, base_model: str, name: str) -> str:
        """Return the model name that asks for a loaded adapter."""
        return f"{base_model}:{name}" if self.name == "sglang" else name

    def is_lost_adapter(self, status: int, message: str) -> bool:
        """Whether an error says that the adapter is not loaded (any more)."""
        return status == 404 or (self.name == "sglang" and status == 400 and "loaded" in message)

    def check(self, request: Request, serving: ServingConfig) -> None:
        """Raise InvalidRequestError that names the first field which this kind of server cannot do."""
        known = {*_READ_HERE, *self.sampling}
        asked = [name for name in _changed(request.sampling, _DEFAULTS) if name not in known]
        asked += [name for name in _changed(request, _PLAIN_REQUEST) if name not in _REQUEST]
        if asked:
            raise InvalidRequestError(
                f"{asked[0]}: this model runs on a {self.name} server, and this field cannot be passed on to it."
            )
        if not self.can_salt and _salt(request, serving):
            raise InvalidRequestError(
                f"cache_salt: this model runs on a server of kind {self.name!r}, which cannot keep prefixes apart."
            )

    def body(self, request: Request, serving: ServingConfig, model: str, prompt: list[int]) -> dict[str, Any]:
        """Return the body of POST /v1/completions, without the fields that say when to stop.

        Every field is sent, because a server may have other defaults (vLLM takes them from generation_config.json).
        """
        values = {name: getattr(request.sampling, name) for name in self.sampling}
        body = {name: value for name, value in values.items() if value not in (None, ())}
        if "logit_bias" in body:
            body["logit_bias"] = {str(token): bias for token, bias in request.sampling.logit_bias}
        num_logprobs = body.pop("num_logprobs", None)
        if num_logprobs is not None:
            body |= {"logprobs": num_logprobs, "return_tokens_as_token_ids": True}
        if not can_continue(request.sampling):
            body.setdefault("seed", _seed_of(request))
        if self.name == "sglang" and not body["top_k"]:
            body["top_k"] = -1
        if request.terms.priority:
            body["priority"] = request.terms.priority
        salt = _salt(request, serving)
        if salt:
            body["cache_salt"] = salt
        return {**body, "model": model, "prompt": prompt, "stream": True, "return_token_ids": True}


def can_continue(sampling: SamplingParams) -> bool:
    """Whether the tokens so far, added to the prompt, lead to the same tokens as before.

    Otherwise a resumed request has to be computed again from its prompt.
    """
    if sampling.seed is not None and sampling.temperature > 0:  # the server would start its random numbers again
        return False
    return all(name in _CONTINUABLE for name in _changed(sampling, _DEFAULTS))


def _changed(values: Request | SamplingParams, defaults: Request | SamplingParams) -> list[str]:
    """Return the names of the fields that differ from the defaults."""
    return [f.name for f in fields(values) if getattr(values, f.name) != getattr(defaults, f.name)]


def _seed_of(request: Request) -> int:
    """Return a seed that depends only on the request's id: computed again, the answer is the same."""
    return int.from_bytes(hashlib.blake2b(request.id.encode(), digest_size=7).digest())


def _salt(request: Request, serving: ServingConfig) -> str:
    """Return a salt that keeps apart what `serving.prefix_cache` and the request keep apart, or ""."""
    if serving.prefix_cache == "off" or not request.terms.can_cache:
        return secrets.token_hex(16)
    tenant = request.terms.tenant if serving.prefix_cache == "tenant" else ""
    if not tenant and not request.terms.cache_salt:
        return ""
    return hashlib.sha256(repr((tenant, request.terms.cache_salt)).encode()).hexdigest()


KINDS: Mapping[EngineKind, ServerKind] = {
    "vllm": ServerKind(
        name="vllm",
        health_route="/health",
        load_route="/v1/load_lora_adapter",
        unload_route="/v1/unload_lora_adapter",
        sampling=_VLLM,
        gauges={
            "vllm:num_requests_running": "running",
            "vllm:num_requests_waiting": "waiting",
            "vllm:generation_tokens": "tokens_generated",
            "vllm:num_preemptions": "preemptions",
        },
    ),
    "sglang": ServerKind(
        name="sglang",
        health_route="/health",
        load_route="/load_lora_adapter",
        unload_route="/unload_lora_adapter",
        sampling=_SGLANG,
        gauges={"sglang:num_running_reqs": "running", "sglang:num_queue_reqs": "waiting"},
    ),
    "openai": ServerKind(
        name="openai",
        health_route="/v1/models",
        load_route=None,
        unload_route=None,
        sampling=_OPENAI,
        gauges={},
        can_salt=False,
    ),
}
