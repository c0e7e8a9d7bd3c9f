"""The generated code is that of the .proto files; these pass the linter, and break nobody who knows those released."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from shardray.v1 import common_pb2, control_pb2, inference_pb2

ROOT = Path(__file__).resolve().parent.parent.parent
BUF = Path(sys.executable).parent / "buf"


def test_the_generated_code_is_fresh() -> None:
    result = subprocess.run(
        [sys.executable, "proto/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_proto_files_pass_the_linter_every_field_commented() -> None:
    result = subprocess.run([BUF, "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def what_breaks(root: Path) -> str:
    """What clients of the released services would stumble over in the .proto files below ``root``."""
    command = [BUF, "breaking", "--against", ROOT / "proto" / "released.binpb"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.stderr == "", "it could not compare them"
    return result.stdout


def test_clients_of_the_released_services_are_understood() -> None:
    assert what_breaks(ROOT) == ""


def test_a_field_that_changes_its_number_would_be_noticed(tmp_path: Path) -> None:
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / "proto" / "shardray", tmp_path / "proto" / "shardray")
    changed = tmp_path / "proto" / "shardray" / "v1" / "inference.proto"
    changed.write_text(changed.read_text().replace("string request_id = 1;", "string request_id = 15;", 1))
    assert (
        'Previously present field "1" with name "request_id" on message "GenerateRequest" was deleted'
        in what_breaks(tmp_path)
    )


def test_the_files_say_which_package_they_are_in_go_and_java() -> None:
    """protoc-gen-go refuses a file without, and two packages of one proto package would import each other."""
    options = [module.DESCRIPTOR.GetOptions() for module in (common_pb2, control_pb2, inference_pb2)]
    assert {each.go_package for each in options} == {"shardray/v1;shardrayv1"}
    assert all(each.java_multiple_files for each in options)


def test_no_package_file_lies_beside_the_generated_code() -> None:
    assert not list((ROOT / "proto").rglob("__init__.py"))
