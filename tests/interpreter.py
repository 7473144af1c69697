"""Triton's interpreter, faster: the kernels sort and scan, and it does that one loss at a time."""

import contextlib
import functools
import inspect

import numpy as np
import triton.language as tl
from triton.language import core, semantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, ReduceOps, ScanOps

ADDRESS = np.dtype(np.uint64)


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


def reduce_xor(self, tensors, original=ReduceOps.generic_reduce):
    """The exclusive-or inside `tl.sort`, a vector at a time; other reductions as they were."""
    if self.combine_fn is not tl.standard._xor_combine:
        return original(self, tensors)
    (x,) = tensors
    return [self.to_tensor(np.bitwise_xor.reduce(x.handle.data, self.axis, keepdims=self.keep_dims), x.dtype)]


@functools.cache
def language_modules(fn):
    """The names of the modules that a device function knows triton.language by."""
    return {x.__name__ for x in fn.__globals__.values() if x is tl or x is tl.core}


def patch_once(fn, patched, original=interpreter._patch_lang):
    """What redirects triton.language to NumPy; the interpreter does so anew for every call of a device function."""
    modules = language_modules(fn)
    if modules <= patched:
        return interpreter._LangPatchScope()
    patched |= modules
    return original(fn)


@functools.cache
def known_shape(sizes, block_type=core.block_type.__init__):
    """What a block type of these sizes says of its shape: itself, how many, in words; and what a tensor says of it."""
    if not sizes:
        return core.tuple([]), 1, "", core.tuple([]), core.constexpr(1)
    known = core.block_type.__new__(core.block_type)
    block_type(known, core.float32, list(sizes))
    constants = core.tuple([core.constexpr(size) for size in sizes])
    return known.shape, known.numel, str(known.shape), constants, core.constexpr(known.numel)


def block_type(self, element_ty, shape):
    """What `block_type.__init__` does, whose shapes are looked up: every operation makes some of them."""
    sizes = tuple(x.value if isinstance(x, core.constexpr) else x for x in getattr(shape, "values", shape))
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.shape, self.numel, words, _, _ = known_shape(sizes)
    self.name = f"<{words}, {element_ty}>"


def same_type(self, other):
    """What `block_type.__eq__` says."""
    same_class = isinstance(other, core.block_type)
    return same_class and self.element_ty == other.element_ty and self.shape.values == other.shape.values


def same_scalar(self, other, original=core.dtype.__eq__):
    """What `dtype.__eq__` says; mostly both are one object."""
    return self is other or original(self, other)


def unwrapped(value, original=core._unwrap_if_constexpr):
    """What a constant holds, or what else this is; of containers, what each of their constants holds."""
    if isinstance(value, core.constexpr):
        return value.value
    return original(value) if isinstance(value, (list, tuple, core.tuple)) else value


def tensor(self, handle, type):
    """What `tensor.__init__` does, likewise."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    _, _, _, self.shape, self.numel = known_shape(tuple(type.shape.values) if type.is_block() else ())


def broadcast(self, lhs, rhs, original=semantic.TritonSemantic.broadcast_impl_value):
    """Both tensors, in one shape; mostly they have one."""
    left, right = lhs.type, rhs.type
    alike = left.is_block() == right.is_block()
    if alike and (not left.is_block() or left.shape.values == right.shape.values):
        return lhs, rhs
    return original(self, lhs, rhs)


def speed_up():
    """Put these in place of the interpreter's own."""
    core.block_type.__init__, core.block_type.__eq__ = block_type, same_type
    core.tensor.__init__, core.dtype.__eq__ = tensor, same_scalar
    core._unwrap_if_constexpr = unwrapped
    semantic.TritonSemantic.broadcast_impl_value = broadcast
    ReduceOps.generic_reduce = reduce_xor
    ScanOps.generic_scan = scan_by_doubling
    numpy_type = functools.cache(interpreter._get_np_dtype)  # which makes a table of all types for every question
    interpreter._get_np_dtype = lambda dtype: ADDRESS if dtype.scalar.is_ptr() else numpy_type(dtype.scalar)
    patched = set()

    def launch(self, *tensors_and_more, **named):
        """What GridExecutor.__call__ does, with `run_programs` in place of its loops."""
        named = {name: value for name, value in named.items() if name in inspect.getfullargspec(self.fn).args}
        given, named_here = self._init_args_hst(tensors_and_more, named)
        patched.clear()
        scope = interpreter._patch_lang(self.fn)
        try:
            arguments = inspect.getcallargs(self.fn, *given, **named_here)
            converted = {
                name: value if name in self.constexprs else interpreter._implicit_cvt(value)
                for name, value in arguments.items()
            }
            (count,) = self.grid
            interpreter.interpreter_builder.set_grid_dim(count, 1, 1)
            for function in on_launch:
                function(count, list(tensors_in(arguments.values())))
            run_programs(lambda: self.fn(**converted), count)
        except interpreter.InterpreterError:
            raise
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error
        finally:
            scope.restore()
            patched.clear()
        self._restore_args_dev(tensors_and_more, given, named, named_here)

    GridExecutor.__call__ = launch
    interpreter._patch_lang = lambda fn: patch_once(fn, patched)


def tensors_in(values):
    """The tensors among arguments, those inside of tuples too."""
    for value in values:
        if isinstance(value, tuple):
            yield from tensors_in(value)
        elif hasattr(value, "data_ptr"):
            yield value


def in_turn(program, count):
    """Run the programs of a launch one after another."""
    for number in range(count):
        set_program(number)
        program()


def set_program(number):
    """Which program the interpreter is in."""
    interpreter.interpreter_builder.set_grid_idx(number, 0, 0)


run_programs = in_turn
"""How the programs of a launch are run: (program, count); a test may put another in its place."""
on_launch = []
"""Who wants to hear of every launch: (count, tensors)."""


@contextlib.contextmanager
def replaced(**operations):
    """Other operations in place of the interpreter's own for a while, which can be found where they were."""
    builder = interpreter.interpreter_builder
    before = {name: vars(builder)[name] for name in operations if name in vars(builder)}
    vars(builder).update(operations)
    try:
        yield
    finally:
        for name in operations:
            del vars(builder)[name]
        vars(builder).update(before)
