"""Elementary functions as the GPU's special function unit has them."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def fast_log2(x):
    """The GPU's own logarithm; PTX documents its absolute error between 0.5 and 2 as about 2^-22."""
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def fast_exp2(x):
    """The GPU's own exponential, whose results below float32's normal numbers are 0."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """The GPU's own, of 23 bits."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def rounded(x, CT: tl.constexpr):
    """float32 x as a product with operands in the dtype CT takes it, float32."""
    if tl.bfloat16 == CT:
        if INTERPRETED:
            x = x.to(CT).to(tl.float32)
        else:
            # One instruction; and Triton, which sees no bfloat16 here, leaves the tile where it is.
            b_bits = tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $1, 0f00000000;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
            )
            x = b_bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def fast_sigmoid(x):
    return reciprocal(1.0 + fast_exp2(x * -LOG2_E))


@triton.jit
def log2_softplus(x):
    """log2(1 + exp(x)), to 2^-15 of the result, and to 2^-21 where exp(x) is below 2^-7."""
    e = fast_exp2(tl.abs(x) * -LOG2_E)
    # the logarithm loses a small e beside 1
    small = e * (LOG2_E - e * (LOG2_E / 2 - e * (LOG2_E / 3)))
    return tl.maximum(x, 0.0) * LOG2_E + tl.where(e < 2.0**-7, small, fast_log2(1.0 + e))


@triton.jit
def softplus(x):
    e = tl.exp(tl.minimum(x, 20.0))
    # the logarithm loses a small e beside 1
    small = e * (1.0 - 0.5 * e)
    return tl.where(x > 20.0, x, tl.where(x < -7.0, small, tl.log(1.0 + e)))
