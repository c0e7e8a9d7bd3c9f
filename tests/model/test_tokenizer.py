"""Ids and texts as transformers and SentencePiece have them, from a folder that was converted out of GGUF."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from shardray.runtime.model.chat_template import ChatTemplateError
from shardray.runtime.model.folder import read_eos_token_ids
from shardray.runtime.model.gguf_file import GgufFile
from shardray.runtime.model.gguf_tokenizer import write_tokenizer
from shardray.runtime.model.tokenizer import Tokenizer, TokenizerError
from tests.model.gguf_writing import BYTE, CONTROL, NORMAL, UNKNOWN, finish

PARIS = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def reference(smollm2_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_folder)


@settings(max_examples=150)
@given(text=st.text() | st.text(alphabet="ab 12\n\t'é中😀<|im_end|>"))
def test_smollm2_ids_and_texts_are_those_of_transformers(
    smollm2_tokenizer: Tokenizer, reference: Any, text: str
) -> None:
    ids = smollm2_tokenizer.encode(text)
    assert ids == reference.encode(text)
    for skip in (True, False):
        expected = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert smollm2_tokenizer.decode(ids, skip_special_tokens=skip) == expected


def test_smollm2_ids_are_those_it_was_trained_with(smollm2_tokenizer: Tokenizer) -> None:
    # The published ids of the default system prompt; numbers are cut into single digits.
    assert smollm2_tokenizer.encode("You are a helpful AI assistant named SmolLM, trained by Hugging Face") == (
        [2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    )
    assert smollm2_tokenizer.encode("2025") == [smollm2_tokenizer.encode(digit)[0] for digit in "2025"]
    assert smollm2_tokenizer.encode("<|im_start|>user<|im_end|>") == [1, 4093, 2]
    assert smollm2_tokenizer.vocab_size == 49152


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_conversation_becomes_the_ids_that_transformers_makes_of_it(
    smollm2_tokenizer: Tokenizer, reference: Any, add_generation_prompt: bool
) -> None:
    messages = [*PARIS, {"role": "assistant", "content": "Paris, “naturally”."}, {"role": "user", "content": " why?\n"}]
    expected = reference.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )
    assert smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt) == expected


def test_a_chat_gets_no_special_tokens_beyond_those_of_its_template(sentencepiece_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sentencepiece_folder, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.has_chat_template
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    assert ids == tokenizer.encode("hello")  # <s> once, from the template
    assert ids[0] == 1
    assert tokenizer.encode("hello", add_special_tokens=False) == ids[1:]


def test_a_model_without_a_chat_template_says_what_to_send_instead(sentencepiece_tokenizer: Tokenizer) -> None:
    assert not sentencepiece_tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match="send a text or token ids"):
        sentencepiece_tokenizer.apply_chat_template(PARIS)


def test_a_folder_without_a_tokenizer_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json; write one with"):
        Tokenizer.load(tmp_path)
    assert Tokenizer.load_optional(tmp_path) is None


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: .*cannot read it"):
        Tokenizer.load_optional(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [2, 7]}, "config.json": {"eos_token_id": 9}}, {2, 7}),
        ({"generation_config.json": {"bos_token_id": 1}, "config.json": {"eos_token_id": 9}}, {9}),
        ({"generation_config.json": {"eos_token_id": 5}, "tokenizer_config.json": {"eos_token": "</s>"}}, {5}),
        ({"tokenizer_config.json": {"eos_token": {"content": "</s>"}}}, {2}),
        ({}, set()),
    ],
)
def test_ids_that_end_a_text_are_found_wherever_a_model_names_them(
    sentencepiece_folder: Path, tmp_path: Path, files: dict[str, Any], expected: set[int]
) -> None:
    shutil.copy(sentencepiece_folder / "tokenizer.json", tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read_eos_token_ids(tmp_path) == expected


def test_truncation_stored_in_a_file_does_not_cut_prompts(sentencepiece_folder: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(sentencepiece_folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert len(tokenizer.encode("hello world " * 8)) > 8
    assert len(tokenizer.encode("hello")) == 2


def test_sentencepiece_words_letters_and_bytes(sentencepiece_tokenizer: Tokenizer) -> None:
    ids = sentencepiece_tokenizer.encode("hello Paris 😀", add_special_tokens=False)
    assert [sentencepiece_tokenizer.piece(token_id) for token_id in ids] == (
        [b" hello", b" Paris", b" ", *(bytes([byte]) for byte in "😀".encode())]
    )
    assert sentencepiece_tokenizer.first_piece(ids[0]) == b"hello"
    assert sentencepiece_tokenizer.decode(ids) == "hello Paris 😀"


def token_kind(processor: Any, token_id: int) -> int:
    if processor.is_unknown(token_id):
        return UNKNOWN
    if processor.is_control(token_id):
        return CONTROL
    return BYTE if processor.is_byte(token_id) else NORMAL


def write_vocabulary(path: Path, processor: Any) -> GgufFile:
    num_tokens = processor.vocab_size()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in range(num_tokens)])
    writer.add_token_scores([float(processor.get_score(i)) for i in range(num_tokens)])
    writer.add_token_types([token_kind(processor, i) for i in range(num_tokens)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    finish(writer)
    return GgufFile(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """A BPE trained by sentencepiece, and ours made from its pieces and scores alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("trained")
    texts = ["hello world, the capital of France is Paris", "naïve cafés stream shards and tokens", "x = 10 ** 2"] * 40
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    write_tokenizer(write_vocabulary(folder / "vocabulary.gguf", processor), folder)
    return processor, Tokenizer.load(folder)


@settings(max_examples=300)
@given(text=st.text(alphabet="helo wrdFancisP  10*\n\té中😀▁", max_size=40))
def test_merges_derived_from_scores_cut_texts_as_sentencepiece_does(trained: tuple[Any, Tokenizer], text: str) -> None:
    processor, tokenizer = trained
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == processor.encode(text)
