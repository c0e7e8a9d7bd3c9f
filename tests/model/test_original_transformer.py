"""The Transformer of arXiv 1706.03762 as a spec, against its formulas in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardray.runtime.model import families
from shardray.runtime.model.families.family import Family, Source
from shardray.runtime.model.parameters import ENCODER, embedding_parameters, layer_parameters
from shardray.runtime.model.positions import Sinusoidal
from shardray.runtime.model.spec import Attention, DecoderSpec, Embedding, Encoder, Head, Layer, Mlp, Norm, Norms
from tests.model.logits import LogitsOf
from tests.model.test_families import distance

SIZE, HEADS, VOCAB, LAYERS, MAX_LEN = 60, 5, 97, 3, 128
_NORM = Norm("layer", eps=1e-6, has_bias=True)
_AFTER = Norms(after=_NORM)
_ATTENTION = Attention(HEADS, HEADS, SIZE // HEADS, scale=(SIZE // HEADS) ** -0.5)
_AROUND = Attention(HEADS, HEADS, SIZE // HEADS, scale=(SIZE // HEADS) ** -0.5, causal=False)
_MLP = Mlp(84, "relu", gated=False, up_bias=True, down_bias=True)
_EMBEDDING = Embedding(scale=SIZE**0.5, positions=Sinusoidal(MAX_LEN))
SPEC = DecoderSpec(
    vocab_size=VOCAB,
    hidden_size=SIZE,
    max_positions=MAX_LEN,
    embedding=_EMBEDDING,
    layers=(Layer(_ATTENTION, _MLP, _AFTER, _AFTER, cross=_AROUND, cross_norms=_AFTER),) * LAYERS,
    head=Head(None, tied=True),
    encoder=Encoder(MAX_LEN, _EMBEDDING, (Layer(_AROUND, _MLP, _AFTER, _AFTER),) * LAYERS, shares_tokens=True),
)


def _sources(spec: DecoderSpec) -> dict[str, Source]:
    """A checkpoint that calls everything as the runtime does."""
    assert spec.encoder is not None
    found = {"embed.weight": Source("embed.weight"), "head.weight": Source("embed.weight")}
    found |= {name: Source(f"layers.{{layer}}.{name}") for name in layer_parameters(spec, spec.layers[0])}
    names = layer_parameters(spec, spec.encoder.layers[0])
    return found | {ENCODER + name: Source(f"{ENCODER}layers.{{layer}}.{name}") for name in names}


FAMILY = Family("transformer", ("transformer",), lambda config: SPEC, _sources)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(families._BY_MODEL_TYPE, "transformer", FAMILY)
    assert SPEC.encoder is not None
    assert list(embedding_parameters(SPEC)) == ["embed.weight"]
    generator = torch.Generator().manual_seed(3)
    shapes = {"embed.weight": (VOCAB, SIZE)}
    for prefix, layers in (("", SPEC.layers), (ENCODER, SPEC.encoder.layers)):
        for index, layer in enumerate(layers):
            for name, parameter in layer_parameters(SPEC, layer).items():
                shapes[f"{prefix}layers.{index}.{name}"] = parameter.shape
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in tensors:
        if "norm" in name and name.endswith("weight"):
            tensors[name] += 1.0
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "transformer", "dtype": "float32", "decoder_start_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_it_is_expressible_and_gives_what_the_formulas_give(folder: Path) -> None:
    prompt, output = [(7 * i) % VOCAB for i in range(41)], [(5 * i + 3) % VOCAB for i in range(33)]
    with LogitsOf(folder) as model:
        model.step({}, {2: prompt})
        parts = [model.step({2: output[:7]})[2]]
        parts += [model.step({2: [token_id]})[2] for token_id in output[7:]]
    assert distance(torch.cat(parts).double(), Formulas(folder).logits(prompt, output)) < 1e-5


class Formulas:
    """Section 3 of the paper, written down."""

    def __init__(self, folder: Path) -> None:
        self._weights: dict[str, Tensor] = {n: t.double() for n, t in load_file(folder / "model.safetensors").items()}

    def logits(self, prompt: list[int], output: list[int]) -> Tensor:
        memory = self._embed(prompt)
        for index in range(LAYERS):
            memory = self._layer(f"{ENCODER}layers.{index}.", memory, None)
        x = self._embed(output)
        for index in range(LAYERS):
            x = self._layer(f"layers.{index}.", x, memory)
        return x @ self._weights["embed.weight"].T

    def _embed(self, token_ids: list[int]) -> Tensor:
        rows = [
            [(math.sin if i % 2 == 0 else math.cos)(position / 10_000 ** ((i - i % 2) / SIZE)) for i in range(SIZE)]
            for position in range(len(token_ids))
        ]
        return self._weights["embed.weight"][token_ids] * SIZE**0.5 + torch.tensor(rows, dtype=torch.float64)

    def _layer(self, name: str, x: Tensor, memory: Tensor | None) -> Tensor:
        x = self._norm(f"{name}attention_norm.", x + self._attend(name, x, x, causal=memory is not None))
        if memory is not None:
            x = self._norm(f"{name}cross_norm.", x + self._attend(f"{name}cross.", x, memory, causal=False))
        return self._norm(f"{name}mlp_norm.", x + self._feed_forward(name, x))

    def _attend(self, name: str, x: Tensor, memory: Tensor, causal: bool) -> Tensor:
        def heads(part: str, of: Tensor) -> Tensor:
            return (of @ self._weights[f"{name}{part}.weight"].T).view(len(of), HEADS, -1).transpose(0, 1)

        queries, keys, values = heads("q", x), heads("k", memory), heads("v", memory)
        scores = queries @ keys.transpose(1, 2) / math.sqrt(SIZE // HEADS)
        if causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        attended = torch.softmax(scores, dim=-1) @ values
        return attended.transpose(0, 1).reshape(len(x), -1) @ self._weights[f"{name}o.weight"].T

    def _feed_forward(self, name: str, x: Tensor) -> Tensor:
        def linear(part: str, of: Tensor) -> Tensor:
            return of @ self._weights[f"{name}{part}.weight"].T + self._weights[f"{name}{part}.bias"]

        return linear("down", linear("up", x).clamp(min=0.0))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + 1e-6)
        return scaled * self._weights[f"{name}after.weight"] + self._weights[f"{name}after.bias"]
