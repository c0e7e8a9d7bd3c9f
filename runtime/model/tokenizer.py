"""Text to token ids and back, by the ``tokenizer.json`` of a model folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import tokenizers

from shardray.runtime.model.chat_template import ChatTemplate, ChatTemplateError
from shardray.runtime.model.folder import read_json

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenizerError(ValueError):
    """A model folder without a usable tokenizer."""


class Tokenizer:
    """The tokenizer and chat template of one model. Safe to use from several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: ChatTemplate | None,
        continues_prompts: bool = True,
        folder: Path | None = None,
    ) -> None:
        """``continues_prompts``: the output is the rest of the prompt's text, not a text of its own."""
        backend.no_truncation()  # some files cut prompts at their training length
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self.continues_prompts = continues_prompts
        self.folder = folder  # that it was read from
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._anchor_id = _find_anchor(backend)
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path, chats: bool = True) -> Tokenizer:
        """Read the tokenizer of ``folder``, with its chat template if ``chats``.

        Raises TokenizerError or ChatTemplateError, naming the fix.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"{folder}: has no tokenizer.json; write one with transformers' "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}), or send token ids"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: tokenizers {tokenizers.__version__} cannot read it: {error}") from error
        has_encoder = bool(read_json(folder / "config.json").get("is_encoder_decoder"))
        return cls(backend, ChatTemplate.load(folder) if chats else None, not has_encoder, folder)

    @classmethod
    def load_optional(cls, folder: Path) -> Tokenizer | None:
        """Like ``load``, but None for a folder without ``tokenizer.json``, which can serve token ids only."""
        return cls.load(folder) if (folder / "tokenizer.json").is_file() else None

    def encode(self, text: str, add_special_tokens: bool = True, max_len: int | None = None) -> list[int]:
        """Token ids of ``text``; with those that the model expects around every text if ``add_special_tokens``.

        A text that has more than ``max_len`` of them is cut, and these are still around it.
        """
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens and max_len is None)
        if max_len is not None:
            encoding.truncate(max_len - (self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0))
            encoding = self._backend.post_process(encoding, None, add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence of ids; bytes that are no UTF-8 become replacement characters."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation of ``{"role": ..., "content": ...}``. Raises ChatTemplateError."""
        if self._chat_template is None:
            raise ChatTemplateError("the model has no chat template; send a text or token ids instead of messages")
        # The template writes its special tokens out, so none are added.
        return self.encode(self._chat_template.render(messages, add_generation_prompt), add_special_tokens=False)

    def piece(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text that has begun: part of a character, for some. Empty if unknown."""
        found = self._pieces.get(token_id)
        if found is None:
            found = self._pieces[token_id] = self._make_piece(token_id)
        return found

    def first_piece(self, token_id: int) -> bytes:
        """The same for the first token of a text, which loses its leading space in SentencePiece vocabularies."""
        text = self.decode([token_id], skip_special_tokens=False)
        return self.piece(token_id) if _REPLACEMENT in text else text.encode()

    def _make_piece(self, token_id: int) -> bytes:
        anchor = [] if self._anchor_id is None else [self._anchor_id]
        anchor_len = len(self.decode(anchor))
        text = self.decode([*anchor, token_id], skip_special_tokens=False)[anchor_len:]
        token: str = self._backend.id_to_token(token_id) or ""
        if _REPLACEMENT not in text:
            return text.encode()
        byte_token = _BYTE_TOKEN.fullmatch(token)
        if byte_token:
            return bytes([int(byte_token[1], 16)])
        values = [_byte_level_alphabet().get(character) for character in token]
        return text.encode() if None in values else bytes(value for value in values if value is not None)


@lru_cache
def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself, or the next free one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _find_anchor(backend: tokenizers.Tokenizer) -> int | None:
    """An ordinary token that reads the same wherever it stands: what precedes a token whose bytes are looked up."""
    for letter in "abcdefghijklmnopqrstuvwxyz":
        token_id: int | None = backend.token_to_id(letter)
        if token_id is not None and backend.decode([token_id, token_id]) == 2 * letter:
            return token_id
    return None
