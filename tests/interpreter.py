"""Triton's interpreter walks a scan, and the exclusive-or inside `tl.sort`, loss by loss: here, vectors at a time."""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import ReduceOps, ScanOps


def scan_by_doubling(self, tensors):
    """What `tl.associative_scan` does, a vector at a time; Triton's interpreter goes through it loss by loss."""
    values, types = [x.handle.data for x in tensors], [x.dtype for x in tensors]
    length = values[0].shape[self.axis]
    place = np.arange(length).reshape([-1 if i == self.axis else 1 for i in range(values[0].ndim)])
    distance = 1
    while distance < length:
        operands = [np.roll(v, distance, self.axis) for v in values] + values
        sums = self.combine_fn.fn(*map(self.to_tensor, operands, types * 2))
        sums = sums if isinstance(sums, tuple) else (sums,)
        values = [np.where(place >= distance, s.handle.data, v) for v, s in zip(values, sums, strict=True)]
        distance *= 2
    return list(map(self.to_tensor, values, types))


def vectorise():
    """Put the fast versions in place of the interpreter's own."""
    reduce = ReduceOps.generic_reduce

    def reduce_fast(self, tensors):
        if self.combine_fn is not tl.standard._xor_combine:
            return reduce(self, tensors)
        (x,) = tensors
        return [self.to_tensor(np.bitwise_xor.reduce(x.handle.data, self.axis, keepdims=self.keep_dims), x.dtype)]

    ReduceOps.generic_reduce = reduce_fast
    ScanOps.generic_scan = scan_by_doubling
