"""An encoder behind smg: embeddings for the client of OpenAI."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from shardray.runtime.config import GatewaySettings
from shardray.runtime.model.tokenizer import Tokenizer
from tests.gateway.conftest import Smg, until_served
from tests.model.encoder_zoo import BERT, save_config
from tests.real_replica import RealReplica
from tests.serving import serving
from tests.stub_replica import SECRET
from tests.stub_tokenizer import write_tokenizer


@pytest.mark.asyncio
@pytest.mark.slow
async def test_embeddings_are_those_of_the_native_client(smg: Smg, tmp_path: Path) -> None:
    folder = write_tokenizer(save_config("bert", BERT | {"vocab_size": 259}, tmp_path / "bert"), keep_config=True)
    gateway = GatewaySettings(listen="127.0.0.1:0", model_name="bert", discovery_file=smg.discovery_file)
    replica = RealReplica(folder)
    try:
        async with serving(Tokenizer.load(folder), num_replicas=0, gateway=gateway) as up:
            await up.driver.attach(0, replica.address, SECRET, [])
            expected = await up.client.embed(["a text"])
            async with openai.AsyncOpenAI(base_url=smg.base_url, api_key="none", max_retries=0) as client:
                await until_served(client, "bert", lambda: client.embeddings.create(model="bert", input="a"))
                found = await client.embeddings.create(model="bert", input="a text", encoding_format="float")
                with pytest.raises(openai.BadRequestError):
                    await client.embeddings.create(model="bert", input="x" * 100)
            assert found.data[0].embedding == pytest.approx(expected[0], abs=1e-5)
    finally:
        replica.kill()
