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
def power(x, t, q):
    """(x/t)^q for 0 ≤ x ≤ t: at most 1, no overflow at any q; underflow to 0 is meant."""
    return tl.exp2(q * log2_ratio(x, t))


@triton.jit
def to_fixed(x, fraction_bits):
    """x ≥ 0 (float32), rounded to a multiple of 2^-fraction_bits: sums of these do not depend on their order."""
    return (x * bits_float((fraction_bits + 127) << 23) + 0.5).to(tl.int64)


@triton.jit
def from_fixed(total, fraction_bits):
    """The float64 of a fixed-point total."""
    return total.to(tl.float64) * ((1023 - fraction_bits).to(tl.int64) << 52).to(tl.float64, bitcast=True)
