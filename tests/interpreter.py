"""Triton's interpreter, mended where NumPy 2.4 refuses its ways and without what it makes in vain.

What a kernel computes stays its own; imported by conftest.py before the kernels are.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def hurry() -> None:
    """Four fifths of its time went into making the same few dozen types again and patching the same
    modules, and into sums made in 64 bits to look for overflows, of which it then says nothing."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    patch_language = interpreter._patch_lang

    @functools.cache
    def languages(function: Any) -> list[Any]:
        values = function.__globals__.values()
        return [lang for lang in (interpreter.tl, core) if any(v is lang for v in values)]

    def patch_language_once(function: Any) -> Any:
        """Not again for each function that a kernel calls."""
        if any(core.is_builtin(lang.load) for lang in languages(function)):
            return patch_language(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_language_once

    # All types have names that say what they are.
    core.block_type.__hash__ = core.pointer_type.__hash__ = core.dtype.__hash__
    interpreter._get_np_dtype = functools.cache(interpreter._get_np_dtype)

    make_type, types = core.block_type.__init__, {}

    def make_type_once(self: Any, element: Any, shape: Any) -> None:
        if (key := (element, tuple(shape))) not in types:
            make_type(self, element, shape)
            types[key] = vars(self).copy()
        vars(self).update(types[key])

    core.block_type.__init__ = make_type_once

    make_tensor, tensors = core.tensor.__init__, {}

    def make_tensor_once(self: Any, handle: Any, type: Any) -> None:
        if type not in tensors:
            make_tensor(self, handle, type)
            tensors[type] = vars(self).copy()
        vars(self).update(tensors[type], handle=handle)

    core.tensor.__init__ = make_tensor_once

    broadcast = TritonSemantic.broadcast_impl_value
    TritonSemantic.broadcast_impl_value = lambda self, left, right: (
        (left, right) if left.shape is right.shape else broadcast(self, left, right)
    )


def mend() -> None:
    """Before Triton 3.8 it takes int() of an array of one number, which NumPy 2.4 refuses, and of a
    NaN and a number NaN for the smaller and the larger, where a GPU takes the number."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index
    builder = interpreter.InterpreterBuilder
    builder.create_minnumf = lambda self, one, other: self.binary_op(one, other, np.fmin)
    builder.create_maxnumf = lambda self, one, other: self.binary_op(one, other, np.fmax)


hurry()
mend()
