"""Builds ``tokenizer.json``, ``tokenizer_config.json`` and the chat template out of GGUF metadata.

Two kinds of vocabulary are known: ``gpt2`` (byte-level BPE with stored merges, cut first by a named pre-tokenizer) and
``llama`` (SentencePiece BPE with byte fallback; its merges follow from the scores of the pieces).
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from shardray.runtime.model.gguf_file import GgufFile
from shardray.runtime.model.model_cache import ModelSourceError

# How a text is cut before bytes are merged, by the names that GGUF gives to each way.
_GPT2 = ("gpt-2", "gpt2")
_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def write_tokenizer(source: GgufFile, folder: Path) -> None:
    """Write the tokenizer files of ``source`` into ``folder``. Raises ModelSourceError for an unknown kind."""
    kind = source.require("tokenizer.ggml.model", str)
    tokens = source.find_list("tokenizer.ggml.tokens", str)
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    if kind not in builders:
        raise ModelSourceError(f"{source.path}: tokenizer.ggml.model {kind!r} is not read; known: gpt2, llama")
    tokenizer = builders[kind](source, tokens)
    _add_special_tokens(source, tokens, tokenizer)
    add_bos = source.find("tokenizer.ggml.add_bos_token", bool)
    if add_bos if add_bos is not None else kind == "llama":
        _prepend_bos(source, tokens, tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_config(source, tokens, folder)


def _byte_level_bpe(source: GgufFile, tokens: list[str]) -> Tokenizer:
    cut = source.require("tokenizer.ggml.pre", str)
    merges: list[tuple[str, str]] = []
    for merge in source.find_list("tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=cut in _LLAMA3))
    tokenizer.pre_tokenizer = _pre_tokenizer(source, cut)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(source: GgufFile, cut: str) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut in _GPT2:
        return gpt2
    if cut in _DIGITS_THEN_GPT2:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if cut in _LLAMA3:
        split = pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join((*_GPT2, *_DIGITS_THEN_GPT2, *_LLAMA3))
    raise ModelSourceError(f"{source.path}: tokenizer.ggml.pre {cut!r} is not read; known: {known}")


def _sentencepiece_bpe(source: GgufFile, tokens: list[str]) -> Tokenizer:
    scores = source.find_list("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise ModelSourceError(f"{source.path}: has {len(tokens)} tokens but {len(scores)} scores")
    kinds = _token_kinds(source, tokens)
    unknown_id = source.find("tokenizer.ggml.unknown_token_id", int)
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        BPE(
            vocab,
            _merges_from_scores(tokens, scores, kinds, vocab),
            unk_token=tokens[unknown_id if unknown_id is not None else 0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if source.find("tokenizer.ggml.add_space_prefix", bool) is False:
        tokenizer.normalizer = spaces
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        pieces.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(pieces)
    return tokenizer


def _merges_from_scores(
    tokens: list[str], scores: list[float], kinds: list[int], vocab: dict[str, int]
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first: the order in which SentencePiece joins them."""
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.NORMAL}
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        if token not in normal:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                ranked.append((-score, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _token_kinds(source: GgufFile, tokens: list[str]) -> list[int]:
    kinds = source.find_list("tokenizer.ggml.token_type", int)
    return kinds or [int(gguf.TokenType.NORMAL)] * len(tokens)


def _add_special_tokens(source: GgufFile, tokens: list[str], tokenizer: Tokenizer) -> None:
    special = (gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN)
    for token, kind in zip(tokens, _token_kinds(source, tokens), strict=True):
        if kind in special:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == gguf.TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])


def _prepend_bos(source: GgufFile, tokens: list[str], tokenizer: Tokenizer) -> None:
    bos_id = source.require("tokenizer.ggml.bos_token_id", int)
    bos = tokens[bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )


def _write_config(source: GgufFile, tokens: list[str], folder: Path) -> None:
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.require("llama.context_length", int),
    }
    for role, key in _SPECIAL_ROLES.items():
        token_id = source.find(f"tokenizer.ggml.{key}_token_id", int)
        if token_id is not None and token_id < len(tokens):
            config[f"{role}_token"] = tokens[token_id]
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    template = source.find("tokenizer.chat_template", str)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
