"""Writes a model folder in OpenVINO's format, with its weights in their dtype or in 8 bits. Run by OpenVINO's
environment.

python -m benchmarks.contestants.openvino_export MODEL_DIR DTYPE TARGET_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig

from benchmarks.protocol import INT8


def export(model_dir: Path, dtype: str, target: Path) -> None:
    """The folder is there in the end or not at all."""
    partial = target.with_name(f"{target.name}.partial")
    in_int8 = dtype == INT8
    main_export(
        str(model_dir),
        output=partial,
        task="text-generation-with-past",
        convert_tokenizer=True,
        # "auto": or a large model would be cut to 8 bits
        ov_config=OVConfig(quantization_config={"bits": 8, "sym": True}) if in_int8 else OVConfig(dtype="auto"),
        model_loading_kwargs={"torch_dtype": "bfloat16" if in_int8 else dtype},
    )
    partial.rename(target)


if __name__ == "__main__":
    export(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
