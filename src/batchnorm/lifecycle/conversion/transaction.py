"""Modules change their class and attributes together, or not at all."""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# Which of the hooks above are called in another way.
HOOK_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Transaction:
    """Changes to modules that are undone, all of them, if they are not carried to the end."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[nn.Module, type[nn.Module], dict[str, Any]]] = {}
        self._hooks: list[tuple[dict[Any, Any], dict[Any, Any]]] = []

    def change(
        self,
        module: nn.Module,
        to: type[nn.Module] | None = None,
        gets: Mapping[str, Any] | None = None,
        loses: Iterable[str] = (),
    ) -> None:
        """Give ``module`` another class and attributes, in place: whoever holds it holds it still."""
        self._before.setdefault(id(module), (module, type(module), dict(module.__dict__)))
        # Straight into the dict: Module.__setattr__ would sort tensors and modules into places of its own.
        module.__dict__.update(gets or {})
        for name in loses:
            module.__dict__.pop(name, None)
        if to is not None:
            module.__class__ = to

    def undo(self) -> None:
        """Every module as it was before."""
        for module, kind, attributes in self._before.values():
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for hooks, before in self._hooks:
            hooks.update(before)

    def successor(self, layer: nn.Module) -> nn.Module:
        """A new object with the tensors, hooks and attributes of ``layer``, to take its place.

        The dicts of hooks themselves go over, so that the handles which users keep go on removing their hooks; the
        old layer gets copies of them and stays usable. Hooks that are bound to the old layer are bound to the new.
        """
        self.change(layer)
        new: nn.Module = object.__new__(type(layer))
        new.__dict__.update(layer.__dict__)
        for name in STATE:
            new.__dict__[name] = layer.__dict__[name].copy()
        for name in (*HOOKS, *HOOK_FLAGS):
            layer.__dict__[name] = layer.__dict__[name].copy()
        for name in HOOKS:
            hooks = new.__dict__[name]
            self._hooks.append((hooks, dict(hooks)))
            for key, hook in hooks.items():
                hooks[key] = _bound_to(new, layer, hook)
        return new


@contextmanager
def transaction() -> Iterator[Transaction]:
    """A ``Transaction`` that is undone by any exception, Ctrl-C included."""
    changes = Transaction()
    try:
        yield changes
    except BaseException:
        changes.undo()
        raise


def _bound_to(new: nn.Module, old: nn.Module, hook: Any) -> Any:
    if isinstance(hook, types.MethodType) and hook.__self__ is old:
        return types.MethodType(hook.__func__, new)
    # torch's own wrapper for hooks that want the module they are registered on.
    held = getattr(hook, "module", None)
    if isinstance(hook, nn.modules.module._WrappedHook) and (held is not None or hasattr(hook, "hook")):
        again = object.__new__(type(hook))
        again.__dict__.update(hook.__dict__)
        again.hook = _bound_to(new, old, hook.hook)
        if isinstance(held, weakref.ReferenceType) and held() is old:
            again.module = weakref.ref(new)
        return again
    return hook
