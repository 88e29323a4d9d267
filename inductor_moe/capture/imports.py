"""Running a function on every modeling module of transformers that is imported from now on."""

from __future__ import annotations

import functools
import importlib.abc
import sys
import types
from collections.abc import Callable
from typing import Any

MODULES = "transformers.models."

_watchers: list[Callable[[types.ModuleType], None]] = []


def watch_imports(watcher: Callable[[types.ModuleType], None]) -> None:
    """Call watcher(module) after each import of a modeling module. Idempotent."""
    if watcher not in _watchers:
        _watchers.append(watcher)
    _install()


class _ImportWatch(importlib.abc.MetaPathFinder):
    """Lets the other finders find a modeling module and calls the watchers once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not (name.startswith(MODULES) and ".modeling_" in name):
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                run = spec.loader.exec_module

                def exec_module(module: types.ModuleType, run: Any = run) -> None:
                    run(module)
                    for watcher in _watchers:
                        watcher(module)

                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
                return spec
        return None


@functools.cache
def _install() -> None:
    sys.meta_path.insert(0, _ImportWatch())
