"""Running a function on every module of some names that is imported from now on."""

from __future__ import annotations

import functools
import importlib.abc
import sys
import types
from collections.abc import Callable
from typing import Any

MODULES = "transformers.models."

Watcher = Callable[[types.ModuleType], None]
_watchers: dict[Watcher, Callable[[str], bool]] = {}


def is_modeling(name: str) -> bool:
    """Whether a module holds the code of a transformers model."""
    return name.startswith(MODULES) and ".modeling_" in name


def watch_imports(watcher: Watcher, watched: Callable[[str], bool] = is_modeling) -> None:
    """Call watcher(module) after each import of a module whose name is watched. Idempotent."""
    _watchers[watcher] = watched
    _install()


class _ImportWatch(importlib.abc.MetaPathFinder):
    """Lets the other finders find a watched module and calls its watchers once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        watchers = [watcher for watcher, watched in _watchers.items() if watched(name)]
        if not watchers:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                run = spec.loader.exec_module

                def exec_module(module: types.ModuleType, run: Any = run) -> None:
                    run(module)
                    for watcher in watchers:
                        watcher(module)

                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
                return spec
        return None


@functools.cache
def _install() -> None:
    sys.meta_path.insert(0, _ImportWatch())
