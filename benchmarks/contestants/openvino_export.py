"""Writes a model folder in OpenVINO's format, with its weights in their dtype or in 8 bits. Run by its environment.

python -m benchmarks.contestants.openvino_export MODEL_DIR DTYPE TARGET_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import nncf
import openvino
from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig

from benchmarks.protocol import INT8

_MODEL = "openvino_model.xml"


def export(model_dir: Path, dtype: str, target: Path) -> None:
    """The folder is there in the end or not at all."""
    partial = target.with_name(f"{target.name}.partial")
    main_export(
        str(model_dir),
        output=partial,
        task="text-generation-with-past",
        convert_tokenizer=True,
        ov_config=OVConfig(dtype="auto"),  # or a large model would be cut to 8 bits
        model_loading_kwargs={"torch_dtype": "bfloat16" if dtype == INT8 else dtype},
    )
    if dtype == INT8:
        _compress(partial)
    partial.rename(target)


def _compress(folder: Path) -> None:
    """Weights to 8 bits with a scale for each output, as OpenVINO's own tools do it."""
    model = openvino.Core().read_model(folder / _MODEL)
    compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(compressed, folder / f"small_{_MODEL}")
    for suffix in (".xml", ".bin"):  # only now: the file was mapped
        (folder / f"small_{_MODEL}").with_suffix(suffix).rename((folder / _MODEL).with_suffix(suffix))


if __name__ == "__main__":
    export(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
