"""Every family with an encoder against ``transformers``, in float32: logits, embeddings, and what a rank reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shardray import LLM, SamplingParams
from shardray.parallel.checkpoint import Checkpoint
from shardray.parallel.plan import make_plan
from shardray.runtime.engine.request import FieldError
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.folder import read_pooling
from shardray.runtime.model.load import ParameterLoader
from shardray.runtime.model.parameters import model_sizes, num_owned_elements
from shardray.runtime.model.spec import ModelConfigError, Pooling
from tests.model.encoder_zoo import ENCODERS, PAIRS, EncoderReference, PairReference, save_encoder
from tests.model.logits import LogitsOf
from tests.model.test_families import distance, random_ids

NUM_DECODES = 24
TOLERANCE = 2e-4  # of the largest logit
PROMPT_LENS = [1, 30, 9, 17, 100]


def some_ids(count: int, seed: int) -> list[int]:
    return [3 + i % 90 for i in random_ids(count, seed)]


@pytest.mark.parametrize("name", PAIRS)
def test_a_decoder_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    """Two prompts of unlike lengths; the second comes while the first is decoded."""
    reference = PairReference(save_encoder(name, tmp_path))
    prompts, lens = [some_ids(37, 5), some_ids(19, 6)], [9, 4]
    sequences = [some_ids(count + NUM_DECODES, seed) for seed, count in enumerate(lens)]
    found: list[list[torch.Tensor]] = [[], []]
    with LogitsOf(tmp_path) as model:
        model.step({}, {0: prompts[0]})
        found[0].append(model.step({0: sequences[0][:5]}, {1: prompts[1]})[0])
        feeds = [[4, *[1] * NUM_DECODES], [3, 1, *[1] * (NUM_DECODES - 1)]]
        starts = [5, 0]
        for counts in zip(*feeds, strict=True):
            rows = {slot: sequences[slot][starts[slot] : starts[slot] + count] for slot, count in enumerate(counts)}
            for slot, part in model.step(rows).items():
                found[slot].append(part)
                starts[slot] += len(rows[slot])
    for prompt, ids, parts in zip(prompts, sequences, found, strict=True):
        logits = torch.cat(parts)
        assert distance(logits, reference.logits(prompt, ids[: len(logits)])) < TOLERANCE


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gives_the_embeddings_of_transformers(name: str, tmp_path: Path) -> None:
    reference = EncoderReference(save_encoder(name, tmp_path))
    prompts = [tuple(some_ids(count, seed)) for seed, count in enumerate(PROMPT_LENS)]
    with LLM(tmp_path, device="cpu", dtype="float32", max_num_batched_tokens=140, max_num_seqs=4) as llm:
        for pooling in (Pooling(), Pooling("cls"), Pooling("last"), Pooling("mean", normalize=True)):
            for prompt, found in zip(prompts, llm.embed(prompts, pooling), strict=True):
                assert distance(found, reference.embedding(prompt, pooling)) < TOLERANCE, pooling


@pytest.mark.parametrize("name", [*PAIRS, *ENCODERS])
def test_a_rank_reads_the_bytes_that_it_owns_and_no_more(name: str, tmp_path: Path) -> None:
    family, spec = read_model_config(save_encoder(name, tmp_path))
    plan = make_plan(model_sizes(spec), 3, 3)
    for rank in range(9):
        stage, tp_rank = divmod(rank, 3)
        checkpoint = Checkpoint(tmp_path)
        loader = ParameterLoader(checkpoint, family, spec, plan, tp_rank, torch.float32)
        parts = [loader.embedding()] if stage == 0 else []
        parts += [loader.layer(index) for index in plan.stages[stage]]
        if spec.num_encoder_layers - 1 in plan.stages[stage]:
            parts.append(loader.encoder_end())
        parts += [loader.head()] if stage == 2 else []
        owned = num_owned_elements(spec, plan, stage, tp_rank)
        assert sum(tensor.numel() for part in parts for tensor in part.values()) == owned
        assert checkpoint.bytes_read == 4 * owned


def test_forced_ids_begin_the_output_and_are_not_part_of_it(tmp_path: Path) -> None:
    reference = PairReference(save_encoder("m2m100", tmp_path))
    prompt = tuple(some_ids(12, 1))
    with LLM(tmp_path, device="cpu", dtype="float32") as llm:
        for forced in [(), (50,), (61, 7, 8)]:
            params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, forced_token_ids=forced)
            assert llm.generate([prompt], params)[0].token_ids == reference.greedy(prompt, 9, forced)


def test_what_a_configuration_forces_or_bars_holds_without_being_asked_for(tmp_path: Path) -> None:
    reference = PairReference(save_encoder("m2m100", tmp_path))
    prompt = tuple(some_ids(12, 1))
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    barred = reference.greedy(prompt, 9, (50,))[0]
    generation = {"decoder_start_token_id": 2, "forced_bos_token_id": 50, "bad_words_ids": [[barred]]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    with LLM(tmp_path, device="cpu", dtype="float32") as llm:
        found = llm.generate([prompt], params)[0].token_ids
    reference.model.generation_config.bad_words_ids = [[barred]]
    assert found == reference.greedy(prompt, 9, (50,))
    assert barred not in found


def test_what_a_model_does_not_do_is_refused_with_what_it_does(tmp_path: Path) -> None:
    with LLM(save_encoder("bert", tmp_path), device="cpu") as llm:
        with pytest.raises(FieldError, match="gives embeddings, and generates no text"):
            llm.generate([[5, 6]])
        with pytest.raises(FieldError, match="has 131 tokens; the encoder reads at most 130 at once"):
            llm.embed([[5] * 131])
    with LLM(save_encoder("bart", tmp_path / "bart"), device="cpu", max_num_batched_tokens=100) as llm:
        with pytest.raises(FieldError, match="generates text, and gives no embeddings"):
            llm.embed([[5, 6]])
        with pytest.raises(FieldError, match="has 37 tokens; the encoder reads at most 36 at once"):
            llm.generate([[5] * 37])
        with pytest.raises(
            FieldError, match=r"beginning of 1 tokens \+ max_tokens 200 exceeds the context window of 128"
        ):
            llm.generate([[5] * 36], SamplingParams(max_tokens=200))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key' is not supported",
        ),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings False"),
        ("bart", {"encoder_attention_heads": 6}, "encoder_attention_heads 6 and decoder_attention_heads 5 must be"),
        ("t5", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj 'gated-tanh' is not supported; the nearest is"),
    ],
)
def test_what_would_change_the_output_is_refused(
    name: str, change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = save_encoder(name, tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelConfigError, match=message):
        read_model_config(tmp_path)


def write_modules(folder: Path, kinds: list[str], pooling: dict[str, object]) -> None:
    modules = [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "", "type": f"some.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in (folder / str(module["path"]) for module in modules if module["idx"]):
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(pooling if path.name.endswith("Pooling") else {}))


def test_pooling_is_that_of_the_modules_of_sentence_transformers(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == Pooling("mean")
    write_modules(tmp_path, ["Transformer", "Pooling"], {"pooling_mode_cls_token": True})
    assert read_pooling(tmp_path) == Pooling("cls")
    write_modules(tmp_path, ["Transformer", "Pooling", "Normalize"], {"pooling_mode": "lasttoken"})
    assert read_pooling(tmp_path) == Pooling("last", normalize=True)


@pytest.mark.parametrize(
    "kinds",
    [
        ["Transformer", "Pooling", "Dense", "Normalize"],  # as LaBSE has it
        ["Transformer", "Normalize", "Pooling"],
        ["WordEmbeddings", "Pooling"],
        ["Transformer"],
    ],
)
def test_other_modules_of_sentence_transformers_are_refused(kinds: list[str], tmp_path: Path) -> None:
    write_modules(tmp_path, kinds, {"pooling_mode": "cls"})
    with pytest.raises(ModelConfigError, match=rf"modules\.json: {', '.join(kinds)}, one after the other, is not"):
        read_pooling(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "cannot be read: "),
        ('[{"idx": 0, "type": "some.models.Transformer"}]', "is not a list of modules, each with a type and a path"),
        ('{"type": 1}', "is not a list of modules"),
        ("3", "is not a list of modules"),
    ],
)
def test_broken_modules_are_refused_with_their_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ModelConfigError, match=f"{tmp_path}/modules.json: {message}"):
        read_pooling(tmp_path)
