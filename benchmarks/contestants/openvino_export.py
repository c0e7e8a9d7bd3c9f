"""Writes a model folder in OpenVINO's format, with its weights in their dtype. Run by OpenVINO's environment.

python -m benchmarks.contestants.openvino_export MODEL_DIR DTYPE TARGET_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from optimum.exporters.openvino import export_from_model
from transformers import AutoModelForCausalLM


def export(model_dir: Path, dtype: str, target: Path) -> None:
    """The folder is there in the end or not at all."""
    partial = target.with_suffix(".partial")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    export_from_model(model, output=partial, task="text-generation-with-past", stateful=True)
    partial.rename(target)


if __name__ == "__main__":
    export(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
