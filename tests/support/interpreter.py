"""Triton's interpreter, made to do once what it does again and again: the tests take a third of the time.

What it computes stays the same, but that it rounds to bfloat16, as GPUs do. Its own functions come into
triton.language's place with every launch and every call of a device function: here they are found once. And with every
tensor, type and operation it makes the same few shapes anew, and looks the same things up: here they are kept.
"""

import contextlib
import functools
from unittest import mock

import numpy as np

from mmkernels import backends

INTERPRETS = backends.INTERPRETED and backends._triton_installed
NUMBERS = (bool, int, float)


def patch_once_a_launch():
    """The interpreter's functions come into triton.language once a launch, and into its core where a device function
    sees that; what is put where is remembered for the next launch."""
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    seen = {}  # by module: which of the two it sees
    changes = {}  # by what is patched already, and what is to be
    patched = []

    def patch_again(function):
        module = id(function.__globals__)
        if module not in seen:
            values = function.__globals__.values()
            seen[module] = tuple(each for each in (language, language.core) if any(v is each for v in values))
        scope = interpreter._LangPatchScope()
        if seen[module] in patched:
            return scope
        patched.append(seen[module])
        key = tuple(patched)
        if key not in changes:
            scope = patch(function)
            changes[key] = [(obj, name, vars(obj)[name]) for obj, name, _ in scope._changes]
        else:
            for change in changes[key]:
                scope.set_attr(*change)
        return scope

    @functools.wraps(launch)
    def launch_afresh(*arguments, **options):
        patched.clear()
        return launch(*arguments, **options)

    interpreter._patch_lang = patch_again
    interpreter.GridExecutor.__call__ = launch_afresh


def call_directly():
    """A builtin without the wrappers that ask whether they are in a kernel."""
    from triton.runtime import interpreter

    semantic = interpreter.interpreter_semantic

    def patch_attr(obj, name, member, builder, scope):
        inner = getattr(member, "__wrapped__", member)

        def call(*arguments, **options):
            options["_semantic"] = semantic
            return inner(*arguments, **options)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch_attr


def keep_shapes():
    """The shapes of types and tensors, as Triton writes them, and their sizes: the same objects for the same shape."""
    from triton.language import core

    make_type = core.block_type.__init__
    make_tensor = core.tensor.__init__
    equal = core.dtype.__eq__
    of_types, of_tensors = {}, {}

    def block_type(self, element_ty, shape):
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        if sizes not in of_types:
            make_type(self, element_ty, shape)
            of_types[sizes] = self.shape, self.numel
        self.element_ty = element_ty
        self.shape, self.numel = of_types[sizes]

    def tensor(self, handle, type):
        key = id(type.shape) if type.is_block() else None  # kept for ever
        if key not in of_tensors:
            make_tensor(self, handle, type)
            of_tensors[key] = self.shape, self.numel
        self.handle = handle
        self.type = type
        self.dtype = type.scalar
        self.shape, self.numel = of_tensors[key]

    core.block_type.__init__ = block_type
    core.block_type.name = functools.cached_property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.block_type.name.__set_name__(core.block_type, "name")
    core.tensor.__init__ = tensor
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def widen_at_once():
    """Operands of different shapes, without a type and a handle for every step in between."""
    from triton.language import core, semantic
    from triton.runtime import interpreter

    broadcast = semantic.TritonSemantic.broadcast_impl_value
    common = {}  # by two shapes of one rank: the shape of both, or None

    def common_shape(left, right):
        pair = left, right
        if pair not in common:
            fits = all(a == b or 1 in (a, b) for a, b in zip(left, right))
            sizes = [max(a, b) for a, b in zip(left, right)]
            common[pair] = core.block_type(core.float32, sizes).shape if fits else None
        return common[pair]

    def widened(tensor, shape):
        data = tensor.handle.data
        values = np.empty(shape, data.dtype)
        values[...] = data
        handle = interpreter.TensorHandle(values, tensor.handle.dtype.scalar)
        return core.tensor(handle, core.block_type(tensor.dtype, shape))

    def broadcast_impl_value(self, lhs, rhs):
        blocks = lhs.type.is_block(), rhs.type.is_block()
        if blocks == (True, False):
            return lhs, widened(rhs, lhs.type.shape)
        if blocks == (False, True):
            return widened(lhs, rhs.type.shape), rhs
        if blocks == (False, False) or lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        left, right = lhs.type.shape, rhs.type.shape
        shape = common_shape(left, right) if len(left) == len(right) else None
        if shape is None:
            return broadcast(self, lhs, rhs)
        return lhs if left is shape else widened(lhs, shape), rhs if right is shape else widened(rhs, shape)

    semantic.TritonSemantic.broadcast_impl_value = broadcast_impl_value


def keep_common_types():
    """Operands of one type need no conversion; which type two others have in common, and a number as a tensor of it,
    is found once."""
    from triton.language import core, semantic

    check = semantic.TritonSemantic.binary_op_type_checking_impl
    types, constants = {}, {}

    def common_type(self, a, b, div_or_mod):
        key = a.name, b.name, div_or_mod
        if key not in types:
            types[key] = self.computation_type_impl(a, False, b, False, div_or_mod)
        return types[key]

    def constant(self, number, dtype, div_or_mod):
        """(the type that a tensor of `dtype` and the number have in common, the number as a tensor)"""
        key = type(number), repr(number), dtype.name, div_or_mod  # repr: 0.0 and -0.0 are equal
        if key not in constants:
            wide = self.computation_type_impl(self.to_tensor_type(number), True, dtype, False, div_or_mod)
            constants[key] = wide, self._cast_to_computation_type(number, wide)
        return constants[key]

    def binary_op_type_checking_impl(
        self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False
    ):
        tensors = type(lhs) is core.tensor, type(rhs) is core.tensor
        if tensors == (True, True):
            a, b = lhs.dtype, rhs.dtype
            if a.is_ptr() or b.is_ptr():
                if allow_lhs_ptr and a.is_ptr() and b.is_int():
                    return self.broadcast_impl_value(lhs, rhs)
            elif a is b and not div_or_mod:
                return self.broadcast_impl_value(lhs, rhs)
            elif arithmetic_check:
                wide = common_type(self, a, b, div_or_mod)
                return self.broadcast_impl_value(self.cast(lhs, wide), self.cast(rhs, wide))
        elif arithmetic_check and tensors == (True, False) and type(rhs) in NUMBERS and not lhs.dtype.is_ptr():
            wide, rhs = constant(self, rhs, lhs.dtype, div_or_mod)
            return self.broadcast_impl_value(self.cast(lhs, wide), rhs)
        elif arithmetic_check and tensors == (False, True) and type(lhs) in NUMBERS and not rhs.dtype.is_ptr():
            wide, lhs = constant(self, lhs, rhs.dtype, div_or_mod)
            return self.broadcast_impl_value(lhs, self.cast(rhs, wide))
        return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    semantic.TritonSemantic.binary_op_type_checking_impl = binary_op_type_checking_impl


def cast_directly():
    """What has the type already stays; what the interpreter casts in one step, whatever the two types are, is cast."""
    from triton.language import core, semantic

    cast = semantic.TritonSemantic.cast
    integers = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
    direct = {(a, b) for a in integers | {"int1"} for b in integers | {"fp16", "fp32", "fp64"}}
    for narrow, wide in (("fp32", "fp64"), ("fp16", "fp32"), ("bf16", "fp32")):
        direct |= {(narrow, wide), (wide, narrow)}

    def cast_others(self, value, dtype, *options, **named):
        before, after = value.dtype, dtype.scalar
        if before is after:
            return value
        if options or named or (before.name, after.name) not in direct:
            return cast(self, value, dtype, *options, **named)
        made = core.block_type(after, value.type.shape) if value.type.is_block() else after
        return core.tensor(self.builder.cast_impl(value.handle, after), made)

    semantic.TritonSemantic.cast = cast_others


def unwrap_directly():
    """A constexpr's value, and what is none, without asking what else it could be."""
    from triton.language import core

    unwrap = core._unwrap_if_constexpr

    def unwrap_if_constexpr(value):
        kind = type(value)
        if kind is core.constexpr:
            return value.value
        return value if kind is core.tensor or kind in NUMBERS else unwrap(value)

    core._unwrap_if_constexpr = unwrap_if_constexpr


def keep_dtypes():
    from triton.language import core
    from triton.runtime import interpreter

    look_up = interpreter._get_np_dtype
    found = {}

    def np_dtype(dtype):
        if isinstance(dtype, core.pointer_type):
            return look_up(dtype)
        element = dtype.scalar
        if isinstance(element, core.pointer_type):
            return look_up(dtype)
        if element.name not in found:
            found[element.name] = look_up(element)
        return found[element.name]

    interpreter._get_np_dtype = np_dtype


def round_to_bfloat16():
    """The interpreter cuts float32's last bits off: all errors have one sign, and what many numbers have in common
    grows of them."""
    from triton.language import core
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(values, from_type, to_type, rounding_mode):
        if from_type != core.float32 or to_type != core.bfloat16:
            return convert(values, from_type, to_type, rounding_mode)
        bits = np.ascontiguousarray(values).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # the even one of two
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(nan, bits >> 16 | 0x40, nearest).astype(np.uint16).reshape(np.shape(values))

    interpreter._convert_float = convert_float


@contextlib.contextmanager
def launching_nothing():
    """Triton's operations allocate what they give, and no kernel runs: for tests of shapes and strides."""
    if not INTERPRETS:
        yield
        return
    from triton.runtime import interpreter

    with mock.patch.object(interpreter.GridExecutor, "__call__", lambda *arguments, **options: None):
        yield


if INTERPRETS:
    call_directly()
    patch_once_a_launch()
    keep_shapes()
    widen_at_once()
    keep_common_types()
    cast_directly()
    unwrap_directly()
    keep_dtypes()
    round_to_bfloat16()
