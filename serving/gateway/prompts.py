"""Prompts as clients write them, and the tokenizers that turn them into tokens."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from cluster.adapters.dialect import adapter_dialect, base_dialect
from cluster.errors import InvalidRequestError
from cluster.storage.checkpoints import open_checkpoint
from serving.chat.answer import AnswerFormat
from serving.chat.conversation import Chat
from serving.chat.settings import DEFAULT_CHAT_SETTINGS, ChatSettings
from serving.chat.template import ChatTemplate
from serving.engine.detokenizer import Vocabulary
from serving.engine.request import SamplingParams
from serving.gateway.token_bytes import TokenBytes

Prompt = str | tuple[int, ...] | Chat


class Asked(Protocol):
    """The part of a call that a tokenizer turns into tokens."""

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """At least one prompt."""
        ...

    @property
    def sampling(self) -> SamplingParams:
        """The sampling settings, without the tokens of `bad_words`."""
        ...

    @property
    def bad_words(self) -> tuple[str, ...]:
        """Words that the answer may not have."""
        ...


class Prepared(NamedTuple):
    """Prompts as tokens, the sampling settings that their answers need, and how to read the answers."""

    prompts: list[tuple[int, ...]]
    sampling: SamplingParams
    format: AnswerFormat


class Prompter:
    """A tokenizer, limited to what serving needs. Any thread may call its methods.

    It is that of the base in `folder`, or of adapters whose text files are in `beside`.
    """

    def __init__(self, folder: Path, beside: Path | None = None):
        dialect = base_dialect(folder)
        self._tokenizer = (dialect if beside is None else adapter_dialect(beside, dialect)).tokenizer
        self.vocabulary = Vocabulary(self._tokenizer)
        self.token_bytes = TokenBytes(self._tokenizer)
        self._num_tokens = int(open_checkpoint(folder).config["vocab_size"])

    def prepare(self, asked: Asked, chats: ChatSettings) -> Prepared:
        """Return what a call needs. Raises InvalidRequestError. A chat is the only prompt of its call."""
        sampling = asked.sampling
        if asked.bad_words:
            sampling = replace(sampling, bad_words=self.encode_bad_words(asked.bad_words))
        chat = asked.prompts[0]
        if isinstance(chat, Chat):
            return self._prepare_chat(chat, sampling, chats)
        return Prepared([self.encode(prompt) for prompt in asked.prompts], sampling, AnswerFormat())

    def _prepare_chat(self, chat: Chat, sampling: SamplingParams, chats: ChatSettings) -> Prepared:
        if chat.tools and not chat.is_forced and sampling.grammar is not None:
            raise InvalidRequestError(
                f"{sampling.grammar.origin}: an answer that may call tools cannot be constrained. Send "
                'tool_choice "none", or leave the constraint out.'
            )
        template = ChatTemplate(self._tokenizer, chat, chats)
        sampling = replace(sampling, grammar=template.grammar() or sampling.grammar)
        prompt = template.prompt(is_constrained=sampling.grammar is not None)
        format = template.answer_format(prompt)
        tokens = [_not_empty(tuple(self._encode_text(prompt)))]
        if not sampling.skip_special_tokens:  # the client wants to see them
            return Prepared(tokens, sampling, replace(format, hidden=()))
        return Prepared(tokens, replace(sampling, skip_special_tokens=not format.needs_special_tokens), format)

    def encode(self, prompt: Prompt, chats: ChatSettings = DEFAULT_CHAT_SETTINGS) -> tuple[int, ...]:
        """Return the prompt's token ids with the model's special tokens. Raises InvalidRequestError if it is empty."""
        tokens = self._checked(prompt) if isinstance(prompt, tuple) else self.tokenize(prompt, chats)
        return _not_empty(tokens)

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

    def tokenize(self, prompt: str | Chat, chats: ChatSettings, *, adds_special: bool | None = None) -> tuple[int, ...]:
        """Return the token ids of a text or a chat, which may be none.

        By default a text gets the model's special tokens; a chat has those that its template writes.
        """
        if isinstance(prompt, Chat):
            text, by_default = ChatTemplate(self._tokenizer, prompt, chats).render(), False
        else:
            text, by_default = prompt, True
        adds_special = by_default if adds_special is None else adds_special
        return tuple(self._tokenizer(_valid(text), add_special_tokens=adds_special)["input_ids"])

    def detokenize(self, tokens: tuple[int, ...]) -> str:
        """Return the text of tokens, with special tokens. Raises InvalidRequestError for unknown token ids."""
        return self._tokenizer.decode(self._checked(tokens))

    def token_names(self, tokens: tuple[int, ...]) -> list[str]:
        """Return the entries of the vocabulary for tokens."""
        return self._tokenizer.convert_ids_to_tokens(list(tokens))

    def num_text_tokens(self, text: str) -> int:
        """Return the number of the text's tokens, without special tokens."""
        return len(self._encode_text(text))

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return tokens as text."""
        vocabulary = self.vocabulary if skip_special_tokens else self.vocabulary.with_special
        return vocabulary.decode(list(tokens))

    def token_label(self, token: int) -> str:
        """Return a name of one token that shows its spaces, and the bytes of an incomplete character as numbers."""
        content = self.token_bytes(token)
        try:
            return content.decode() if content else f"token_id:{token}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def last_tokens(self, tokens: tuple[int, ...], num_kept: int) -> tuple[int, ...]:
        """Return the last tokens of a prompt. Its beginning-of-sequence token stays the first, if there is room."""
        bos, is_cut = self._tokenizer.bos_token_id, len(tokens) > num_kept
        if is_cut and num_kept > 1 and tokens[0] == bos:
            return (bos, *tokens[1 - num_kept :])
        return tokens[-num_kept:]

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenizer(_valid(text), add_special_tokens=False)["input_ids"]

    def _checked(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        for token in tokens:
            if not 0 <= token < self._num_tokens:
                raise InvalidRequestError(
                    f"The prompt has token id {token}, but the model's ids are 0 to {self._num_tokens - 1}."
                )
        return tokens


def _not_empty(tokens: tuple[int, ...]) -> tuple[int, ...]:
    if not tokens:
        raise InvalidRequestError("The prompt is empty. Send at least one token.")
    return tokens


def _valid(text: str) -> str:
    """Return the text, or raise InvalidRequestError: JSON can spell lone surrogates, which tokenizers reject."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"The text is not valid Unicode: {error}.") from error
    return text
