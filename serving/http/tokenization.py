"""The routes that turn text into tokens and back, with the tokenizer of the model that is named."""

import asyncio

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from cluster.errors import InvalidRequestError
from serving.gateway.gateway import Gateway
from serving.http.app_state import gateway_of
from serving.http.bodies.tokens import DetokenizeBody, TokenizeBody

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: HttpRequest) -> Response:
    """Return the tokens of a prompt or of a chat, as the model reads them."""
    gateway = gateway_of(request)
    target, prompter, chats = await gateway.prompter(body.model or _only_base(gateway))
    adds_special = body.add_special_tokens
    tokens = await asyncio.to_thread(prompter.tokenize, body.content(), chats, adds_special=adds_special)
    return JSONResponse(
        {
            "count": len(tokens),
            "max_model_len": gateway.max_model_tokens(target.base),
            "tokens": tokens,
            "token_strs": prompter.token_names(tokens) if body.return_token_strs else None,
        }
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: HttpRequest) -> Response:
    """Return the text of tokens, with special tokens."""
    gateway = gateway_of(request)
    _, prompter, _ = await gateway.prompter(body.model or _only_base(gateway))
    return JSONResponse({"prompt": prompter.detokenize(tuple(body.tokens))})


def _only_base(gateway: Gateway) -> str:
    served = sorted(gateway.snapshot.backends)
    if len(served) != 1:
        raise InvalidRequestError(f"model: name the model. Served bases are: {', '.join(served) or 'none'}.")
    return served[0]
