"""bfloat16 in Triton's interpreter as a GPU has it.

The interpreter holds a bfloat16 in the 16 bits of an unsigned integer, and calculates with these as with whole numbers.
Here it widens them to float32, calculates, and rounds to the nearest.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle


def is_narrow(x: Any) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def widened(x: TensorHandle) -> TensorHandle:
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_narrow(x) else x


def narrowed(x: Any) -> TensorHandle:
    """Rounded to the nearest, of two as near to the even one; a NaN stays one."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(x), np.uint16(0x7FC0), rounded), tl.bfloat16)


def calculate_in_float32(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def calculate(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        if not any(map(is_narrow, args)):
            return method(self, *args)
        found = method(self, *(widened(x) if is_narrow(x) else x for x in args))
        return found if found.data.dtype == np.bool_ else narrowed(found.data)

    return calculate


def teach_bfloat16() -> None:
    """To the interpreter of this process, for good."""
    cast_impl, create_dot, total = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, ReduceOps.sum

    def cast(self: InterpreterBuilder, x: TensorHandle, dst_type: Any, *_: Any) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16:
            return x if is_narrow(x) else narrowed(x.data)
        return cast_impl(self, widened(x), dst_type)

    def multiply(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return create_dot(self, widened(a), widened(b), *rest)

    def add_up(self: ReduceOps, x: Any) -> Any:
        assert not is_narrow(x.handle), "a sum of bfloat16, of which the order of roundings is not known"
        return total(self, x)

    def from_number(self: InterpreterBuilder, value: float) -> TensorHandle:
        return narrowed([value])

    replaced: dict[str, Any] = {"cast_impl": cast, "create_dot": multiply, "get_bf16": from_number}
    for name in ("binary_op", "unary_op", "create_fma", "create_rsqrt"):
        replaced[name] = calculate_in_float32(getattr(InterpreterBuilder, name))
    for name, method in replaced.items():
        setattr(InterpreterBuilder, name, method)
    ReduceOps.sum = add_up
