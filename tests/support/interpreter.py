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
    from triton.language import core, semantic

    make_type = core.block_type.__init__
    make_tensor = core.tensor.__init__
    broadcast = semantic.TritonSemantic.broadcast_impl_value
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

    def broadcast_impl_value(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    core.block_type.__init__ = block_type
    core.block_type.name = functools.cached_property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.block_type.name.__set_name__(core.block_type, "name")
    core.tensor.__init__ = tensor
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    semantic.TritonSemantic.broadcast_impl_value = broadcast_impl_value


def leave_same_types():
    """Operands of one type need no conversion, and the question which one is their common type has an answer."""
    from triton.language import core, semantic

    check = semantic.TritonSemantic.binary_op_type_checking_impl
    cast = semantic.TritonSemantic.cast

    def same(lhs, rhs):
        return type(lhs) is type(rhs) is core.tensor and lhs.dtype is rhs.dtype and not lhs.dtype.is_ptr()

    def binary_op_type_checking_impl(
        self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False
    ):
        if same(lhs, rhs) and not div_or_mod:
            return self.broadcast_impl_value(lhs, rhs)
        return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    def cast_others(self, value, dtype, *options, **named):
        return value if value.type.scalar is dtype.scalar else cast(self, value, dtype, *options, **named)

    semantic.TritonSemantic.binary_op_type_checking_impl = binary_op_type_checking_impl
    semantic.TritonSemantic.cast = cast_others


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
    leave_same_types()
    keep_dtypes()
    round_to_bfloat16()
