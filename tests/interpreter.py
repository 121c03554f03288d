"""Triton's interpreter in half the time: what it makes anew at every call of a device function or for every value is
made once."""

from __future__ import annotations

import math
from functools import cache


@cache
def hasten() -> None:
    """Replaces three functions of triton 3.6 by ones of the same results; leaves other versions as they are."""
    import numpy as np
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6."):
        return

    patch, numpy_dtype = interpreter._patch_lang, cache(interpreter._get_np_dtype)

    def patch_once(function):
        """A kernel's device functions find the language patched."""
        modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if modules and not any(tl.core.is_builtin(module.load) for module in modules):
            return interpreter._LangPatchScope()
        return patch(function)

    def numpy_dtype_of(type):
        return np.dtype(np.uint64) if type.scalar.is_ptr() else numpy_dtype(type.scalar)

    @cache
    def wrapped(shape):
        return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))

    def make_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = wrapped(type.shape if type.is_block() else ())

    interpreter._patch_lang, interpreter._get_np_dtype, tl.tensor.__init__ = patch_once, numpy_dtype_of, make_tensor
