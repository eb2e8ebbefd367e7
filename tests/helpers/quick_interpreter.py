"""Triton's interpreter, to the same bits with less Python at each operation: it makes the types of operands
anew every time, broadcasts what has one shape already, and patches Triton's language at each call of a
function. Most of a small kernel's time there goes into that."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.semantic import TritonSemantic


def install() -> None:
    """From now on, in this process; of the one version whose inside this knows. Others go their own pace."""
    if not triton.__version__.startswith("3.7."):
        return
    _types_are_made_once()
    _equal_shapes_are_left_alone()
    _the_language_is_patched_once_a_launch()


def _types_are_made_once() -> None:
    """Of blocks, of the tensors that have them, and numpy's."""
    of_block, of_numpy = tl.core.block_type.__init__, interpreter._get_np_dtype
    blocks: dict[Any, dict[str, Any]] = {}
    scalars: dict[str, Any] = {}
    of_one = tl.core.tuple([]), tl.constexpr(1)

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, getattr(element_ty, "address_space", 0), *shape)
        if key not in blocks:
            of_block(self, element_ty, shape)
            blocks[key] = {**vars(self), "sizes": tuple(self.shape),
                           "of_tensor": (tl.core.tuple([*map(tl.constexpr, self.shape)]),
                                         tl.constexpr(self.numel))}
        vars(self).update(blocks[key])
        self.element_ty = element_ty

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = vars(type).get("of_tensor", of_one)

    def np_dtype(type: Any) -> Any:
        name = type.scalar.name
        if name not in scalars:
            scalars[name] = of_numpy(type)
        return scalars[name]
    def same(self: Any, other: Any) -> bool:
        return self is other or dtypes_same(self, other)
    dtypes_same = tl.core.dtype.__eq__
    tl.core.block_type.__init__, tl.core.tensor.__init__, tl.core.dtype.__eq__ = block_type, tensor, same
    interpreter._get_np_dtype = np_dtype


def _equal_shapes_are_left_alone() -> None:
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        if vars(lhs.type).get("sizes") == vars(rhs.type).get("sizes"):
            return lhs, rhs
        return broadcast(self, lhs, rhs)
    TritonSemantic.broadcast_impl_value = broadcast_impl_value


def _the_language_is_patched_once_a_launch() -> None:
    """Not by the functions that a kernel calls; and what is to be patched is found once."""
    patch = interpreter._patch_lang
    whole = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    changes: list[tuple[Any, str, Any]] = []
    patched: list[Any] = []

    def patch_lang(function: Any) -> Any:
        if patched:
            return interpreter._LangPatchScope()
        if changes:
            scope = interpreter._LangPatchScope()
            for change in changes:
                scope.set_attr(*change)
        else:
            scope = patch(whole)
            changes.extend((thing, name, getattr(thing, name)) for thing, name, _ in scope._changes)
        patched.append(scope)
        restore = scope.restore

        def ended() -> None:
            patched.clear()
            restore()
        scope.restore = ended
        return scope
    interpreter._patch_lang = patch_lang
