"""The model's tokenizer and chat template.

Loaded with `PreTrainedTokenizerFast`, which knows the file formats and needs no torch (`AutoTokenizer` would
import it). Encoding and rendering run in a few threads of their own: a long prompt takes seconds, and the
tokenizer works outside of Python's lock.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from gateway_svc.errors import InvalidField
from gateway_svc.text.detokenize import TokenBytes
from gateway_svc.text.gguf_tokenizer import load_gguf_tokenizer
from gateway_svc.text.qwen_tokenizer import QWEN_VOCABULARY, load_qwen_tokenizer

# A folder is complete or is refused: nothing is looked for in the network. The import reads these.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jinja2
from transformers import PreTrainedTokenizerFast

T = TypeVar("T")
Message = dict[str, Any]

# What the renderer is told by name; a template's own variables cannot have these names.
RESERVED_VARIABLES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


class TokenizerError(ValueError):
    """The model's tokenizer cannot be loaded; the message names the file."""


def load_tokenizer(path: Path, threads: int = 2) -> ModelTokenizer:
    """The tokenizer of a Hugging Face folder or a GGUF file.

    Raises:
        TokenizerError: it is missing, damaged, or of a kind that is not supported.
    """
    try:
        if path.is_file():
            backend, extras = load_gguf_tokenizer(path)
            return ModelTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **extras), threads)
        if not (path / "tokenizer.json").is_file():
            if not (path / QWEN_VOCABULARY).is_file():
                raise TokenizerError(f"{path}: holds no tokenizer.json (and no {QWEN_VOCABULARY})")
            backend, extras = load_qwen_tokenizer(path / QWEN_VOCABULARY)
            return ModelTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **extras), threads)
        return ModelTokenizer(PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True), threads)
    except TokenizerError:
        raise
    except Exception as error:  # the libraries below raise plain Exception for a damaged file
        raise TokenizerError(f"{path}: cannot load the tokenizer: {error}") from error


class ModelTokenizer:
    """Text and chats to tokens, and the bytes of tokens."""

    def __init__(self, hf: PreTrainedTokenizerFast, threads: int = 2) -> None:
        self._hf = hf
        self._backend = hf.backend_tokenizer
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self.visible = TokenBytes(self._backend, skip_special=True)
        self._tables: dict[tuple[str, ...], TokenBytes] = {(): self.visible}
        self.verbatim = TokenBytes(self._backend, skip_special=False)
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = {token.content: i for i, token in added.items() if token.special}
        # In characters, as it is spelt in the vocabulary.
        self.longest_token = max(map(len, self._backend.get_vocab()), default=1)

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows; the model may have more."""
        return int(self._backend.get_vocab_size())

    @property
    def special_ids(self) -> list[int]:
        """Tokens that no text makes."""
        return list(self._special_ids.values())

    @property
    def eos_id(self) -> int | None:
        """The token that ends an answer, as far as the tokenizer knows."""
        token_id: int | None = self._hf.eos_token_id
        return token_id

    def use_chat_template(self, path: Path) -> None:
        """Render chats with the template in this file from now on. Raises TokenizerError."""
        try:
            self._hf.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path}: cannot read the chat template: {error}") from error

    @property
    def chat_template(self) -> str | None:
        """The model's template for chats; None where it has none, or several."""
        template = self._hf.chat_template
        return template if isinstance(template, str) else None

    def template_in_use(self, chat_template: str | None, has_tools: bool) -> str:
        """The template that a chat is rendered with, given the request's own, if any; empty without one."""
        if chat_template is None and self._hf.chat_template is None:
            return ""
        try:
            tools: list[dict[str, Any]] | None = [{}] if has_tools else None
            return str(self._hf.get_chat_template(chat_template, tools))
        except ValueError:  # several, and no default among them
            return ""

    def has_token(self, text: str) -> bool:
        """Whether this text is one token."""
        return self._backend.token_to_id(text) is not None

    def special_id(self, text: str) -> int | None:
        """The id of the special token of this text, if there is one."""
        return self._special_ids.get(text)

    def table(self, skip_special: bool, seen: tuple[str, ...] = ()) -> TokenBytes:
        """The bytes of tokens in an answer. Special ones may be skipped, but for those in `seen`."""
        if not skip_special:
            return self.verbatim
        seen = tuple(text for text in seen if text in self._special_ids)
        if seen not in self._tables:
            self._tables[seen] = TokenBytes(self._backend, skip_special=True, seen=seen)
        return self._tables[seen]

    def special_token(self, role: str) -> str | None:
        """The text of the special token in this role ("eos_token", "bos_token", ...), if there is one."""
        token = getattr(self._hf, role, None)
        return None if token is None else str(token)

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        return await self.in_thread(lambda: self._encode([text], add_special_tokens)[0])

    async def encode_all(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of several texts."""
        return await self.in_thread(lambda: self._encode(texts, add_special_tokens))

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        chat_template: str | None = None,
        variables: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a chat, through the model's template or the one given, which may tell of tools.

        Raises:
            InvalidField: there is no template, or it does not take these messages.
        """
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template": chat_template,
            "tools": tools,
            **(variables or {}),
        }

        def work() -> list[int]:
            return self._encode([self._render(messages, options)], add_special_tokens)[0]

        return await self.in_thread(work)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return await self.in_thread(
            lambda: b"".join([self.verbatim[i] for i in token_ids]).decode("utf-8", "replace")
        )

    def spelling(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary spells them."""
        return [self._backend.id_to_token(i) or "" for i in token_ids]

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def _render(self, messages: Sequence[Message], options: dict[str, Any]) -> str:
        if options["chat_template"] is None and self._hf.chat_template is None:
            raise InvalidField("messages", "the model has no chat template; use completions, or token ids")
        try:
            return str(self._hf.apply_chat_template(list(messages), tokenize=False, **options))
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise InvalidField("messages", f"the chat template does not take them: {error}") from error

    async def in_thread(self, work: Callable[[], T]) -> T:
        """What `work` returns, worked out beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
