"""Prompts as clients write them, and a base model's way of turning them into tokens."""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer

from cluster.checkpoints import open_checkpoint
from cluster.errors import InvalidRequestError


@dataclass(frozen=True)
class Chat:
    """The turns of a conversation as (role, text) pairs."""

    turns: tuple[tuple[str, str], ...]


Prompt = str | tuple[int, ...] | Chat


class Prompter:
    """One base model's tokenizer, limited to what serving needs. Its methods may be called from any thread."""

    def __init__(self, folder: Path):
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._num_tokens = int(open_checkpoint(folder).config["vocab_size"])

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids with the special tokens that the model expects; none is an InvalidRequestError."""
        tokens = self._checked(prompt) if isinstance(prompt, tuple) else self._tokenized(prompt)
        if not tokens:
            raise InvalidRequestError("The prompt is empty: there is no token to continue from.")
        return tokens

    def num_text_tokens(self, text: str) -> int:
        """How many tokens the text has, without special ones."""
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def token_text(self, token: int) -> str:
        """The token alone as text; bytes that are no whole character show as the replacement character."""
        return self._tokenizer.decode([token])

    def _tokenized(self, prompt: str | Chat) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self._tokenizer(_valid(prompt))["input_ids"])
        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                "This model has no chat template, so messages cannot be made into a prompt; use /v1/completions."
            )
        turns = [{"role": role, "content": text} for role, text in prompt.turns]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # templates raise it for turns that the model was not trained on
            raise InvalidRequestError(f"The model's chat template refuses these messages: {error}") from error
        return tuple(self._tokenizer(_valid(text), add_special_tokens=False)["input_ids"])

    def _checked(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        for token in tokens:
            if not 0 <= token < self._num_tokens:
                raise InvalidRequestError(
                    f"Token id {token} in the prompt is outside of the vocabulary of {self._num_tokens}."
                )
        return tokens


def _valid(text: str) -> str:
    """The text itself, if it is one: JSON can also spell halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"The prompt is not valid Unicode: {error}.") from error
    return text
