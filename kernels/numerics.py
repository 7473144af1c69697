"""Device functions shared by the kernels: bit patterns, powers in the log domain, fixed point."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF_BITS = tl.constexpr(0x7F800000)
"""The bit pattern of +inf. Numbers ≥ 0 and their bit patterns are ordered alike; NaN without its sign lies above."""
Q_CAP = tl.constexpr(2.0**40)
"""Above it q changes nothing: two float32 losses differ by 2^-24 at least, and (1 − 2^-24)^Q_CAP is 0."""


@triton.jit
def float_bits(x):
    """The bit pattern of a float32 as an int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def bits_float(bits):
    """The float32 of a bit pattern."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def rounded(product):
    """A product ≥ 0 (or NaN) as the float32 it is, also in a sum across lanes.

    Without, each lane fuses its own product into the first addition: a·b + round(c·d) in one, c·d + round(a·b) in
    another, and then not all lanes hold the same sum, though it counts as one value.
    """
    return tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exponent_bits(x):
    """The biased exponent of x ≥ 0 (float32), kept where its `normaliser` is a normal number."""
    return tl.minimum(tl.maximum(float_bits(x) >> 23, 1), 253)


@triton.jit
def normaliser(x):
    """The power of two that brings x > 0 (float32) near 1: dividing by the maximum, without a rounding error."""
    return bits_float((254 - exponent_bits(x)) << 23)


@triton.jit
def log2_ratio(x, t):
    """log2(x/t) for 0 ≤ x ≤ t, to a few units in the last place wherever it is near 0; no under- or overflow.

    For x > t/2: log(x/t) = 2·atanh(z), z = (x − t)/(x + t), whose numerator is exact. |z| ≤ 1/3, so eight terms do.
    """
    norm = normaliser(t)
    t_near_1 = t * norm
    x_same = x * norm
    z = (x_same - t_near_1) / (x_same + t_near_1)
    y = z * z
    series = 1.0 / 13 + y * (1.0 / 15)
    series = 1.0 / 11 + y * series
    series = 1.0 / 9 + y * series
    series = 1.0 / 7 + y * series
    series = 1.0 / 5 + y * series
    series = 1.0 / 3 + y * series
    near = (2 * LOG2E) * (z + z * y * series)
    far = tl.log2(x * normaliser(x) / t_near_1) + (exponent_bits(x) - exponent_bits(t)).to(tl.float32)
    return tl.where(x > 0.5 * t, near, far)


@triton.jit
def log2_of_share(x, t, POWER: tl.constexpr):
    """log2(x/t) for 0 ≤ x ≤ t as `power` needs it, in two parts: of the ratio as it was rounded, and what that lacks.

    The second depends on t alone. With a scalar t, it and the factors are computed outside of a loop over x.
    """
    if POWER == "exact":
        y, rest = log2_ratio(x, t), 0.0
    else:
        norm = normaliser(t)
        near_1 = t * norm
        inverse = 1.0 / near_1
        # The rounding of the inverse would be an error of one sign in every power.
        rest = (1.0 - inverse.to(tl.float64) * near_1.to(tl.float64)).to(tl.float32) * LOG2E
        y = (x * norm) * inverse
        if POWER == "approx":
            y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [y], tl.float32, is_pure=True, pack=1)
        else:
            y = tl.log2(y)
    return y, rest


@triton.jit
def power(x, t, q, POWER: tl.constexpr):
    """(x/t)^q for 0 ≤ x ≤ t: at most 1, no overflow at any q; underflow to 0 is meant.

    POWER: "exact", for every q; or for q up to 21, wrong by q·2^-22 of itself at most, "approx", a third of the
    instructions by NVIDIA's logarithm, or "log2", the same by Triton's, for AMD GPUs and the interpreter.
    """
    y, rest = log2_of_share(x, t, POWER)
    y = q * y + q * rest
    if POWER == "approx":
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [y], tl.float32, is_pure=True, pack=1)
    else:
        y = tl.exp2(y)
    return y


@triton.jit
def log2_wide(x):
    """log2 of a float64 x ≥ 2^-1022, a float64 wrong by 1e-7 at most, whatever the exponent; equal for equal x.

    By the logarithm of a float32: that of a float64 is long, and float64 is slow on most GPUs.
    """
    bits = x.to(tl.int64, bitcast=True)
    from_1_to_2 = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    return ((bits >> 52) - 1023).to(tl.int32).to(tl.float64) + tl.log2(from_1_to_2.to(tl.float32)).to(tl.float64)


@triton.jit
def exp2_wide(y):
    """2^y of a float64 −1022 ≤ y < 1023, a float64 wrong by 2e-7 of itself at most; likewise."""
    whole = y.to(tl.int32)
    power = tl.exp2((y - whole.to(tl.float64)).to(tl.float32)).to(tl.float64)
    return power * ((whole + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def to_fixed(x, fraction_bits):
    """x ≥ 0 (float32), rounded to a multiple of 2^-fraction_bits: sums of these do not depend on their order."""
    return (x * bits_float((fraction_bits + 127) << 23) + 0.5).to(tl.int64)


@triton.jit
def from_fixed(total, fraction_bits):
    """The float64 of a fixed-point total."""
    return total.to(tl.float64) * ((1023 - fraction_bits).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def from_normalised(total, fraction_bits, x):
    """The float64 of a fixed-point total of numbers that were multiplied by `normaliser(x)`."""
    return from_fixed(total, fraction_bits + 127 - exponent_bits(x))
