"""The bytes that each token stands for, as the tokenizer's decoder would write them in the middle of a text.

A token's bytes may be part of a character, so decoding it alone loses them. It also loses the space that many
tokenizers drop at the start of a text.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # byte-level BPE's spelling of bytes
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Returns tokens as bytes. Special tokens are their names."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        steps = list(_steps(json.loads(decoder.__getstate__()))) if decoder is not None else []
        self._kinds = {step.get("type") for step in steps}
        self._spaces = [mark for step in steps if (mark := _space_of(step)) is not None]

    def __call__(self, token: int) -> bytes:
        """Return one token's bytes; none if the tokenizer does not know it."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if "ByteLevel" in self._kinds:
            return b"".join(bytes([_BYTE_OF[c]]) if c in _BYTE_OF else c.encode() for c in piece)
        byte = _BYTE_TOKEN.fullmatch(piece) if "ByteFallback" in self._kinds else None
        if byte is not None:
            return bytes.fromhex(byte[1])
        if "WordPiece" in self._kinds:
            return piece[2:].encode() if piece.startswith("##") else f" {piece}".encode()
        for mark in self._spaces:
            piece = piece.replace(mark, " ")
        return piece.encode()


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the decoders that a sequence of decoders applies in turn."""
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _space_of(step: dict[str, Any]) -> str | None:
    """Return the character that a decoder turns into a space, if it does that."""
    if step.get("type") == "Metaspace":
        return str(step["replacement"])
    if step.get("type") == "Replace" and step.get("content") == " ":
        return step["pattern"].get("String")
    return None
