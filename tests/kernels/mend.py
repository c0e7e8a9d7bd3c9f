"""What Triton 3.6's interpreter gets wrong on CPU tensors, mended: it stands in for the device, which does not.

``range`` with tensors of one element fails beside NumPy 2.4; products of bfloat16 multiply the bits as integers; and
float32 is cut off to bfloat16 where a device rounds to nearest even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend() -> None:
    _mend_range()
    _mend_casts()
    _mend_products()


def _mend_range() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor


def _mend_casts() -> None:
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
            return TensorHandle(rounded.numpy(), tl.bfloat16)
        return cast(self, source, to)

    InterpreterBuilder.cast_impl = cast_impl


def _mend_products() -> None:
    dot = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return dot(self, *wide, *rest)

    InterpreterBuilder.create_dot = create_dot
