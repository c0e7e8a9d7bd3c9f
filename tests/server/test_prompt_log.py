"""The log has request ids, and neither prompts nor outputs nor tokens, unless the operator asks for them."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import pytest

from shardray.runtime.client import Access, AsyncClient, ServerError
from shardray.runtime.config import GrpcAuthSettings, GrpcSettings
from shardray.runtime.engine.llm import LLM
from shardray.runtime.engine.request import SamplingParams
from shardray.runtime.model.tokenizer import Tokenizer
from tests.chaos.tiny import save_tiny
from tests.serving import serving

SECRET, TOKEN, WRONG = "my pin is 8213", "token-of-ci-00001", "token-of-nobody-1"


@pytest.mark.asyncio
async def test_a_run_at_debug_logs_ids_and_no_words_of_clients(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokens").write_text(f"ci inference {TOKEN}")
    (tmp_path / "tokens").chmod(0o600)
    auth = GrpcAuthSettings(tokens=str(tmp_path / "tokens"))
    settings = GrpcSettings(listen="127.0.0.1:0", auth=auth)
    caplog.set_level(logging.DEBUG)
    async with serving(tokenizer, grpc=settings, access=Access(token=TOKEN)) as up:
        assert SECRET in (await up.client.generate(SECRET, request_id="r1", max_tokens=20)).text
        await up.client.tokenize(SECRET)
        for bad in ({"stop": [SECRET * 30]}, {"max_tokens": 10**6}, {"temperature": -1.0}):
            with pytest.raises(ServerError):
                await up.client.generate(SECRET, **bad)  # type: ignore[arg-type]
        with contextlib.suppress(ServerError):
            await up.client.generate([{"role": "user", "content": SECRET}], max_tokens=3)
        async with AsyncClient(up.address, access=Access(token=WRONG)) as stranger:
            with pytest.raises(ServerError):
                await stranger.generate(SECRET)
        up.replicas[0].kill()
    logged = caplog.text + "".join(capfd.readouterr())
    assert "request ci·r1 ended: finish_reason length, num_prompt_tokens 14, num_output_tokens 20" in logged
    assert [word for word in (SECRET, "8213", TOKEN, WRONG) if word in logged] == []


@pytest.mark.asyncio
async def test_prompts_and_outputs_are_logged_if_the_operator_asks_for_them(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # as `shardray serve` has it
    caplog.handler.setLevel(logging.NOTSET)
    settings = GrpcSettings(listen="127.0.0.1:0", log_prompts=True)
    async with serving(tokenizer, grpc=settings) as up:
        await up.client.generate("abc", request_id="r1", max_tokens=4)
    assert [record.getMessage() for record in caplog.records] == [
        "request r1: prompt 'abc'",
        "request r1: output 'abca'",
    ]


def test_an_engine_at_debug_logs_no_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    prompt = list(range(7, 27))
    with LLM(str(save_tiny(tmp_path))) as llm:
        [completion] = llm.generate(prompt, SamplingParams(max_tokens=4, seed=0))
    assert len(completion.token_ids) == 4
    shown = ", ".join(map(str, prompt[:5]))
    assert shown not in caplog.text
