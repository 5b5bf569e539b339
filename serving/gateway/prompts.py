"""Prompts as clients write them, and the tokenizers that turn them into tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError

from cluster.checkpoints import open_checkpoint
from cluster.dialect import adapter_dialect, base_dialect
from cluster.errors import InvalidRequestError


@dataclass(frozen=True)
class Chat:
    """A conversation as (role, text) pairs."""

    turns: tuple[tuple[str, str], ...]


Prompt = str | tuple[int, ...] | Chat


class Prompter:
    """A tokenizer, limited to what serving needs. Any thread may call its methods.

    It is that of the base in `folder`, or of adapters whose text files are in `beside`.
    """

    def __init__(self, folder: Path, beside: Path | None = None):
        dialect = base_dialect(folder)
        self._tokenizer = (dialect if beside is None else adapter_dialect(beside, dialect)).tokenizer
        self._num_tokens = int(open_checkpoint(folder).config["vocab_size"])

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the prompt's token ids with the model's special tokens. Raises InvalidRequestError if it is empty."""
        tokens = self._checked(prompt) if isinstance(prompt, tuple) else self._tokenized(prompt)
        if not tokens:
            raise InvalidRequestError("The prompt is empty. Send at least one token.")
        return tokens

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of words that may not be written: at the start of a text, and after a space.

        The second form counts only where it is another first token and no longer, as in vLLM. Raises
        InvalidRequestError if a word has no tokens.
        """
        encoded: list[tuple[int, ...]] = []
        for word in words:
            plain, spaced = (tuple(self._encode_text(prefix + word.lstrip())) for prefix in ("", " "))
            if not plain:
                raise InvalidRequestError(f"bad_words: {word!r} has no tokens of this model.")
            encoded.append(plain)
            if len(spaced) == len(plain) and spaced[0] != plain[0]:
                encoded.append(spaced)
        return tuple(encoded)

    def num_text_tokens(self, text: str) -> int:
        """Return the number of the text's tokens, without special tokens."""
        return len(self._encode_text(text))

    def token_text(self, token: int) -> str:
        """Return one token as text. Bytes of an incomplete character become the replacement character."""
        return self._tokenizer.decode([token])

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenizer(_valid(text), add_special_tokens=False)["input_ids"]

    def _tokenized(self, prompt: str | Chat) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self._tokenizer(_valid(prompt))["input_ids"])
        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                "This model has no chat template, so it cannot answer messages. Use /v1/completions instead."
            )
        turns = [{"role": role, "content": text} for role, text in prompt.turns]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # templates raise this for roles or orders that the model does not know
            raise InvalidRequestError(f"The model's chat template rejects these messages: {error}") from error
        return tuple(self._tokenizer(_valid(text), add_special_tokens=False)["input_ids"])

    def _checked(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        for token in tokens:
            if not 0 <= token < self._num_tokens:
                raise InvalidRequestError(
                    f"The prompt has token id {token}, but the model's ids are 0 to {self._num_tokens - 1}."
                )
        return tokens


def _valid(text: str) -> str:
    """Return the text, or raise InvalidRequestError: JSON can spell lone surrogates, which tokenizers reject."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"The text is not valid Unicode: {error}.") from error
    return text
