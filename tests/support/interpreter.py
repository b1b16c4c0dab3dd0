"""Triton's interpreter, made to do what it does twice only once: the tests take half the time.

It puts its own functions in the place of triton.language's before every call of a device function, though they are
there already from the kernel's launch on. Here it does so once for each module in which device functions lie, and
launch.
"""

import functools

from mmkernels import backends


def patch_once_a_launch():
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    patched = set()

    def patch_once(function):
        if id(function.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(function.__globals__))
        return patch(function)

    @functools.wraps(launch)
    def launch_afresh(*arguments, **options):
        patched.clear()
        return launch(*arguments, **options)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh


if backends.INTERPRETED and backends._triton_installed:
    patch_once_a_launch()
