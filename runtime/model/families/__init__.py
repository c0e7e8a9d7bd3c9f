"""The families: one small file each, from ``config.json`` to a DecoderSpec and from checkpoint names to parameters."""

from __future__ import annotations

import logging
from pathlib import Path

from shardray.runtime.model.config_json import Config, nearest_of
from shardray.runtime.model.families.bart import BART
from shardray.runtime.model.families.bert import BERT, DISTILBERT
from shardray.runtime.model.families.bloom import BLOOM
from shardray.runtime.model.families.cohere import COHERE, COHERE2
from shardray.runtime.model.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from shardray.runtime.model.families.exaone4 import EXAONE4
from shardray.runtime.model.families.falcon import FALCON
from shardray.runtime.model.families.family import Family
from shardray.runtime.model.families.gemma import GEMMA, GEMMA2, GEMMA3
from shardray.runtime.model.families.gpt2 import GPT2
from shardray.runtime.model.families.gpt_neo import GPT_NEO
from shardray.runtime.model.families.gpt_neox import GPT_NEOX
from shardray.runtime.model.families.gpt_oss import GPT_OSS
from shardray.runtime.model.families.gptj import CODEGEN, GPTJ
from shardray.runtime.model.families.granite import GRANITE
from shardray.runtime.model.families.irrelevant import IRRELEVANT
from shardray.runtime.model.families.llama import LLAMA
from shardray.runtime.model.families.marian import M2M100, MARIAN
from shardray.runtime.model.families.mistral import MISTRAL
from shardray.runtime.model.families.mixtral import MIXTRAL
from shardray.runtime.model.families.modernbert import MODERNBERT
from shardray.runtime.model.families.mpt import MPT
from shardray.runtime.model.families.nemotron import NEMOTRON
from shardray.runtime.model.families.olmo import OLMO, OLMO2
from shardray.runtime.model.families.olmoe import OLMOE
from shardray.runtime.model.families.opt import OPT
from shardray.runtime.model.families.phi import PHI
from shardray.runtime.model.families.phi3 import PHI3
from shardray.runtime.model.families.qwen import QWEN2, QWEN3
from shardray.runtime.model.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from shardray.runtime.model.families.smollm3 import SMOLLM3
from shardray.runtime.model.families.stablelm import STABLELM
from shardray.runtime.model.families.starcoder import GPT_BIGCODE, STARCODER2
from shardray.runtime.model.families.t5 import T5
from shardray.runtime.model.folder import read_object
from shardray.runtime.model.quantization import METHOD, in_int8
from shardray.runtime.model.spec import DecoderSpec, ModelConfigError

FAMILIES = (
    BART,
    BERT,
    BLOOM,
    CODEGEN,
    COHERE,
    COHERE2,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DISTILBERT,
    EXAONE4,
    FALCON,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPTJ,
    GPT_BIGCODE,
    GPT_NEO,
    GPT_NEOX,
    GPT_OSS,
    GRANITE,
    LLAMA,
    M2M100,
    MARIAN,
    MISTRAL,
    MIXTRAL,
    MODERNBERT,
    MPT,
    NEMOTRON,
    OLMO,
    OLMO2,
    OLMOE,
    OPT,
    PHI,
    PHI3,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    SMOLLM3,
    STABLELM,
    STARCODER2,
    T5,
)

_log = logging.getLogger(__name__)
_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def read_model_config(folder: Path) -> tuple[Family, DecoderSpec]:
    """The family and the spec of a model folder. Raises ModelConfigError naming the field that is not supported."""
    path = folder / "config.json"
    fields = Config(read_object(path))
    family = _family_of(fields)
    quantization = fields.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method and method not in (METHOD, *family.quantizations):
        raise ModelConfigError(
            f"config.json: quantization_config: {method!r} is not supported; take the float checkpoint that this was "
            "made of, and shardray quantize for weights of 8 bits"
        )
    spec = family.read_config(fields)
    if method == METHOD:
        spec = in_int8(spec, quantization)
    if unknown := unknown_fields(fields, family):
        _log.warning("%s: fields that nothing is known of, and that are ignored: %s", path, ", ".join(unknown))
    return family, spec


def unknown_fields(config: Config, family: Family) -> list[str]:
    """Fields with a value that were neither read nor are known to be irrelevant to what a model computes."""
    known = config.read | IRRELEVANT.keys() | family.irrelevant.keys()
    return sorted(field for field in config if field not in known and config.has_value(field))


def _family_of(config: Config) -> Family:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    hint = nearest_of(model_type, _BY_MODEL_TYPE)
    raise ModelConfigError(f"config.json: model_type {model_type!r} is not supported; {hint}")
