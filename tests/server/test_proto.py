"""The generated code is that of the .proto files, and the files pass the linter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shardray.v1 import common_pb2, control_pb2, inference_pb2

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_generated_code_is_fresh() -> None:
    result = subprocess.run(
        [sys.executable, "proto/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_proto_files_pass_the_linter_every_field_commented() -> None:
    buf = Path(sys.executable).parent / "buf"
    result = subprocess.run([buf, "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_files_say_which_package_they_are_in_go_and_java() -> None:
    """protoc-gen-go refuses a file without, and two packages of one proto package would import each other."""
    options = [module.DESCRIPTOR.GetOptions() for module in (common_pb2, control_pb2, inference_pb2)]
    assert {each.go_package for each in options} == {"shardray/v1;shardrayv1"}
    assert all(each.java_multiple_files for each in options)


def test_no_package_file_lies_beside_the_generated_code() -> None:
    assert not list((ROOT / "proto").rglob("__init__.py"))
