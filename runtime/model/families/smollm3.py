"""SmolLM3: a Llama in which every fourth layer knows no positions."""

from __future__ import annotations

from shardray.runtime.model.config_json import Config
from shardray.runtime.model.families.family import Family, of_each_layer, optional, windowed_layers, without_positions
from shardray.runtime.model.families.llama import LLAMA_IGNORED, llama_like_sources, read_llama_like
from shardray.runtime.model.families.qwen import WINDOW_FIELDS
from shardray.runtime.model.spec import DecoderSpec


def _read_config(config: Config) -> DecoderSpec:
    spec = read_llama_like({"rope_theta": 2e6} | config, tied=True)
    interval = optional(config, "no_rope_layer_interval", 4)
    default = [(index + 1) % interval != 0 for index in range(spec.num_layers)]
    rotated = of_each_layer(config, "no_rope_layers", spec.num_layers, (False, True), default)  # 0 and 1 in files
    if optional(config, "use_sliding_window", False):
        spec = windowed_layers(spec, config, lambda index: not rotated[index])
    return without_positions(spec, lambda index, _: not rotated[index])


SMOLLM3 = Family(
    "smollm3",
    ("smollm3",),
    _read_config,
    llama_like_sources,
    LLAMA_IGNORED,
    irrelevant=WINDOW_FIELDS,
)
