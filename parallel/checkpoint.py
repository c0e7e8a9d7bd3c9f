"""Reads slices of a safetensors checkpoint: only the headers when opened, then only the bytes that a slice covers.

Format: https://huggingface.co/docs/safetensors: an 8-byte little-endian header length, a JSON header, the bytes.
Knows nothing of models: a name and a slice go in, a tensor comes out. torch is imported once a tensor is asked for:
who only looks at headers, as a driver does, needs none.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_READABLE = ("F32", "BF16", "F16", "I8")
_DTYPES = {  # in a header, in torch, bytes of an element
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_PREFIX_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or not readable here; names the file and, where there is one, the fix."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its header describes it, and where its bytes lie."""

    name: str
    stored: str  # its dtype as the header has it: "BF16"
    shape: tuple[int, ...]
    path: Path
    offset: int  # of the first byte, from the start of the file

    def __post_init__(self) -> None:
        """Raises CheckpointError."""
        if self.stored not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: {self.name!r} has dtype {self.stored}; float32, bfloat16 and float16 are read"
            )

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, _DTYPES[self.stored][0])
        return dtype

    @property
    def item_bytes(self) -> int:
        return _DTYPES[self.stored][1]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


class Checkpoint:
    """A folder's ``model.safetensors``, or the shards that its index names. Safe to read from several threads.

    ``tensors`` may hold dtypes that ``read`` refuses (masks and the like that some models store). Raises
    CheckpointError if there are no weights, a shard is missing, or a file is cut short.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo] | None = None) -> None:
        """``tensors``: what the headers say, if they were read elsewhere and the weights are not here."""
        self.folder = folder
        self.tensors = _read_headers(folder) if tensors is None else tensors
        self.bytes_read = 0  # of tensor data, over the life of this object
        self._count_lock = threading.Lock()

    def read(self, name: str, index: tuple[slice, ...] = (), memory: torch.Tensor | None = None) -> torch.Tensor:
        """A contiguous tensor that holds ``tensor[index]``; dimensions without a slice are read whole. It lies at the
        beginning of ``memory``, contiguous on the CPU and large enough, or in memory of its own.

        A slice of the leading dimension is one read; slices of inner dimensions are one read per row.
        Raises CheckpointError for an unknown name, a dtype that is not a float of 16 or 32 bits, a slice out of range.
        """
        info = self._find(name)
        if info.stored not in _READABLE:
            raise CheckpointError(
                f"{info.path}: {name!r} has dtype {info.dtype}; float32, bfloat16 and float16 are read"
            )
        return self._read(info, index, memory)

    def read_bytes(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor:
        """As ``read``, of a tensor of uint8: what is packed in it is for the caller to know."""
        info = self._find(name)
        if info.stored != "U8":
            raise CheckpointError(f"{info.path}: {name!r} has dtype {info.dtype} where packed bytes are expected")
        return self._read(info, index)

    def _read(self, info: TensorInfo, index: tuple[slice, ...], memory: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        bounds = _bounds(info, index)
        shape = tuple(stop - start for start, stop in bounds)
        num_bytes = math.prod(shape) * info.item_bytes
        if memory is None:
            memory = torch.empty(num_bytes, dtype=torch.uint8)
        buffer = memory.view(-1).view(torch.uint8)[:num_bytes]
        self._fill(buffer.numpy().data, info, bounds)
        return buffer.view(info.dtype).reshape(shape)

    def _find(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            nearest = difflib.get_close_matches(name, self.tensors, n=1)
            hint = f"; the nearest name is {nearest[0]!r}" if nearest else ""
            raise CheckpointError(f"{self.folder}: has no tensor {name!r}{hint}")
        return info

    def _fill(self, target: memoryview, info: TensorInfo, bounds: list[tuple[int, int]]) -> None:
        done = 0
        with info.path.open("rb", buffering=0) as file:
            for offset, num_bytes in _byte_runs(info, bounds):
                file.seek(info.offset + offset)
                end = done + num_bytes
                while done < end:  # one call reads at most 2 GiB
                    count = file.readinto(target[done:end])
                    if not count:
                        raise CheckpointError(f"{info.path}: ends inside {info.name!r}; it was cut short while in use")
                    done += count
        with self._count_lock:
            self.bytes_read += done


def _bounds(info: TensorInfo, index: tuple[slice, ...]) -> list[tuple[int, int]]:
    if len(index) > len(info.shape):
        raise CheckpointError(f"{info.name!r} has shape {info.shape}; it cannot be sliced in {len(index)} dimensions")
    bounds = [(0, size) for size in info.shape]
    for dim, part in enumerate(index):
        size = info.shape[dim]
        start, stop = part.start or 0, size if part.stop is None else part.stop
        if part.step not in (None, 1) or not 0 <= start <= stop <= size:
            raise CheckpointError(f"{info.name!r} has shape {info.shape}; {part} does not fit dimension {dim}")
        bounds[dim] = (start, stop)
    return bounds


def _byte_runs(info: TensorInfo, bounds: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(offset from the tensor's start, length) of each contiguous run of bytes, in row-major order."""
    strides = [math.prod(info.shape[dim + 1 :]) * info.item_bytes for dim in range(len(info.shape))]
    inner = len(bounds)  # the first dimension from which on everything is read
    while inner > 0 and bounds[inner - 1] == (0, info.shape[inner - 1]):
        inner -= 1
    run_dim = max(inner - 1, 0)  # a run covers part of this dimension and all that lies inside it
    start, stop = bounds[run_dim] if bounds else (0, 1)
    stride = strides[run_dim] if strides else info.item_bytes
    for outer in itertools.product(*(range(*bound) for bound in bounds[:run_dim])):
        base = sum(i * outer_stride for i, outer_stride in zip(outer, strides[:run_dim], strict=True))
        yield base + start * stride, (stop - start) * stride


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    if (folder / SINGLE_FILE).is_file():
        return _read_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(_why_no_weights(folder))
    weight_map = _read_index(folder / INDEX_FILE)
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file_name in dict.fromkeys(weight_map.values()):
        path = folder / file_name
        if not path.is_file():
            raise CheckpointError(f"{folder / INDEX_FILE}: names {file_name}, which is missing; fetch the model again")
        headers[file_name] = _read_header(path)
    for name, file_name in weight_map.items():
        if name not in headers[file_name]:
            raise CheckpointError(f"{folder / INDEX_FILE}: says {name!r} is in {file_name}, which does not hold it")
    return {name: headers[file_name][name] for name, file_name in weight_map.items()}


def _read_index(path: Path) -> dict[str, str]:
    content = _parse_json(path, path.read_bytes())
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map from tensor names to files")
    for file_name in weight_map.values():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{path}: weight_map holds {file_name!r}, which is not a file name")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorInfo]:
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_PREFIX_BYTES), "little")
        if not 0 < header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - _PREFIX_BYTES):
            raise CheckpointError(f"{path}: is not a safetensors file, or was cut short ({file_bytes} bytes)")
        header = _parse_json(path, file.read(header_bytes))
    header.pop("__metadata__", None)
    data_start = _PREFIX_BYTES + header_bytes
    tensors = [_parse_entry(path, name, entry, data_start) for name, entry in header.items()]
    _check_layout(path, tensors, data_start, file_bytes)
    return {info.name: info for info in tensors}


def _parse_json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object")
    return parsed


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [int(size) for size in (*shape, begin, end)]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of {name!r} is malformed") from error
    info = TensorInfo(name, dtype_name, tuple(shape), path, data_start + begin)
    if min(sizes) < 0 or end - begin != info.num_bytes:
        raise CheckpointError(f"{path}: {name!r} of shape {shape} cannot lie in bytes {begin} to {end}")
    return info


def _check_layout(path: Path, tensors: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    """The tensors' bytes follow one another without a gap or an overlap, to the end of the file."""
    end = data_start
    for info in sorted(tensors, key=lambda info: (info.offset, math.prod(info.shape))):
        if info.offset != end:
            raise CheckpointError(f"{path}: {info.name!r} begins at byte {info.offset}, not {end}; the file is damaged")
        end += info.num_bytes
    if end != file_bytes:
        raise CheckpointError(f"{path}: holds {file_bytes} bytes, its header describes {end}; fetch it again")


def _why_no_weights(folder: Path) -> str:
    pattern = "pytorch_model*.bin" if any(folder.glob("pytorch_model*.bin")) else "*.bin"
    if not any(folder.glob(pattern)):
        return f"{folder}: has no weights; looked for {SINGLE_FILE} and {INDEX_FILE}"
    command = (
        'python -c "import glob, torch; from safetensors.torch import save_file; '
        f"save_file({{name: tensor.contiguous().clone() for file in sorted(glob.glob('{folder}/{pattern}')) "
        "for name, tensor in torch.load(file, map_location='cpu', weights_only=True).items()}, "
        f"'{folder}/{SINGLE_FILE}')\""
    )
    return f"{folder}: only pickled weights ({pattern}), which are never loaded; convert them with: {command}"
