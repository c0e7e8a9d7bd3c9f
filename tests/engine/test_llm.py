"""The engine in process, as a user of the package meets it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardray
from shardray import LLM, SamplingParams
from shardray.runtime.engine.request import FieldError, FinishReason
from tests.tiny_models import Reference, save_llama

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("smollm2-135m", dtype="float32", max_model_len=512, max_num_seqs=8, num_threads=1) as llm:
        yield llm


def wait_until_idle(llm: LLM) -> None:
    for _ in range(200):
        if llm.stats().num_used_pages == 0 and llm.stats().num_running == 0:
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"still busy: {llm.stats()}")


def test_the_package_offers_the_engine_by_name() -> None:
    assert shardray.LLM is LLM


def test_a_chat_is_answered_and_ends_by_itself(llm: LLM) -> None:
    answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY)
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason is FinishReason.STOP


def test_a_batch_of_texts_and_ids_comes_back_in_order(llm: LLM) -> None:
    prompts = ["Once upon a time", [504, 3575, 282, 4649], "The sun"]
    together = llm.generate(prompts, GREEDY)
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
    assert [completion.token_ids for completion in together] == [completion.token_ids for completion in alone]


def test_a_stream_adds_up_to_the_completion(llm: LLM) -> None:
    whole = llm.generate("The sun", GREEDY)[0]
    assert "".join(delta.text for delta in llm.stream("The sun", GREEDY)) == whole.text


def test_a_dropped_stream_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream("The sun", SamplingParams(max_tokens=400, ignore_eos=True))
    next(stream)
    assert llm.stats().num_used_pages > 0
    stream.close()
    wait_until_idle(llm)


def test_a_stream_that_nobody_began_to_read_is_ended_with_its_iterator() -> None:
    with LLM("smollm2-135m", dtype="float32", max_model_len=8192, num_threads=1) as llm:
        stream = llm.stream("The sun", SamplingParams(max_tokens=4000, ignore_eos=True))
        while llm.stats().num_running == 0:
            threading.Event().wait(0.01)
        del stream
        wait_until_idle(llm)


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logits_that_are_not_numbers_end_a_request_with_an_error(
    tmp_path: Path, temperature: float, logprobs: int | None
) -> None:
    folder = save_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    params = SamplingParams(temperature=temperature, top_p=0.9, max_tokens=8, logprobs=logprobs)
    with LLM(folder, max_model_len=128, num_threads=1) as llm:
        for completion in llm.generate([[3, 4, 5], [6, 7]], params):
            assert (completion.token_ids, completion.finish_reason) == ([], FinishReason.ERROR)
            assert completion.error is not None
            assert "logits are not numbers" in completion.error


def test_one_thread_reads_many_requests_and_adds_more_meanwhile(llm: LLM) -> None:
    prompts = ["Once upon a time", "The sun", "A river"]
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
    streams = llm.streams()
    texts = {streams.add(prompt, GREEDY): "" for prompt in prompts[:2]}
    for streamed in streams:
        if len(texts) == 2:
            texts[streams.add(prompts[2], GREEDY)] = ""
        texts[streamed.number] += streamed.delta.text
    assert texts == {index: completion.text for index, completion in enumerate(alone)}
    assert streams.num_live == 0


def test_polling_returns_empty_handed_when_nothing_comes_in_time(llm: LLM) -> None:
    assert llm.streams().poll(timeout_s=0.01) == []


def test_closed_streams_free_the_pages_of_all_their_requests(llm: LLM) -> None:
    streams = llm.streams()
    for prompt in ("The sun", "A river"):
        streams.add(prompt, SamplingParams(max_tokens=400, ignore_eos=True))
    next(streams)
    streams.close()
    wait_until_idle(llm)


def test_who_reads_after_the_engine_has_ended_hears_of_it(tmp_path: Path) -> None:
    llm = LLM(save_llama(tmp_path), max_model_len=128, num_threads=1)
    streams = llm.streams()
    streams.add([3, 4, 5], SamplingParams(max_tokens=100, ignore_eos=True))
    llm.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the LLM was closed"):
            list(streams)
    with pytest.raises(RuntimeError, match="the LLM was closed"):
        llm.generate([[3, 4, 5]], GREEDY)


def test_a_stop_string_ends_the_text_before_itself(llm: LLM) -> None:
    whole = llm.generate("Once upon a time", GREEDY)[0].text
    stop = whole[10:14]
    stopped = llm.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=24, stop=(stop,)))[0]
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason is FinishReason.STOP
    wait_until_idle(llm)


def test_requests_without_a_seed_differ_and_with_one_agree(llm: LLM) -> None:
    free = llm.generate(["Once upon a time"] * 3, SamplingParams(max_tokens=16))
    assert len({completion.text for completion in free}) == 3
    seeded = llm.generate(["Once upon a time"] * 3, SamplingParams(max_tokens=16, seed=5))
    assert len({completion.text for completion in seeded}) == 1


def test_a_request_beyond_the_window_is_refused_with_the_numbers(llm: LLM) -> None:
    with pytest.raises(FieldError, match=r"prompt of 500 tokens \+ max_tokens 24 exceeds the context window of 512"):
        llm.generate([[5] * 500], GREEDY)


def test_a_folder_without_a_tokenizer_serves_token_ids(tmp_path: Path) -> None:
    reference = Reference(save_llama(tmp_path))
    with LLM(tmp_path, max_model_len=128, num_threads=1) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        assert llm.generate([[3, 4, 5]], params)[0].token_ids == reference.greedy((3, 4, 5), 8)
        with pytest.raises(ValueError, match=r"no tokenizer\.json"):
            llm.generate("text", params)


def test_without_its_tokenizer_a_model_serves_token_ids() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with LLM("smollm2-135m", dtype="float32", max_model_len=64, num_threads=1, skip_tokenizer_init=True) as llm:
        completion = llm.generate([[504, 3575]], params)[0]
        assert len(completion.token_ids) == 4
        assert completion.text == ""
        with pytest.raises(ValueError, match="no tokenizer"):
            llm.generate("text", params)
