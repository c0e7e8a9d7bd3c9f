"""Typed access to the metadata and tensors of one GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import gguf
import torch

from shardray.runtime.model.model_cache import ModelSourceError

T = TypeVar("T", str, int, float, bool)


class GgufFile:
    """A GGUF file, mapped into memory. Raises ModelSourceError for a file that is not one, or is cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ModelSourceError(f"{path}: not a readable GGUF file ({error}); fetch it again") from error
        self.tensors: dict[str, gguf.ReaderTensor] = {tensor.name: tensor for tensor in self._reader.tensors}

    def find(self, key: str, kind: type[T]) -> T | None:
        """The value of a metadata key, or None if the file does not say. Raises if it is of another kind."""
        field = self._reader.fields.get(key)
        if field is None:
            return None
        value = field.contents()
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind):
            raise ModelSourceError(f"{self.path}: {key} is {value!r}, not of type {kind.__name__}")
        return value

    def require(self, key: str, kind: type[T]) -> T:
        """Like ``find``, for a key that the model cannot do without."""
        value = self.find(key, kind)
        if value is None:
            raise ModelSourceError(f"{self.path}: has no metadata key {key}; it is not a complete model file")
        return value

    def find_list(self, key: str, kind: type[T]) -> list[T]:
        """The values of an array key; empty if the file does not have it."""
        field = self._reader.fields.get(key)
        values = [] if field is None else field.contents()
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise ModelSourceError(f"{self.path}: {key} is not an array of {kind.__name__}")
        return values

    def read_tensor(self, name: str) -> torch.Tensor:
        """The named tensor, dequantized to float32, in row-major shape (the reverse of GGUF's order)."""
        tensor = self.tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelSourceError(
                f"{self.path}: {name} has type {tensor.tensor_type.name}, not readable here"
            ) from error
        if not values.flags.writeable:  # float32 comes as the mapped file itself
            values = values.copy()
        return torch.from_numpy(values)
