"""What `inductor-moe explain` is pointed at: a function that returns a model and its input."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from inductor_moe.errors import InductorMoeError

DEFAULT = "build"
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def load(target: str) -> Call:
    """(model, args, kwargs) of script.py, script.py:function or package.module:function.

    The script's folder, or the working directory for a module, is on the import path meanwhile
    and after. Raises InductorMoeError; errors of the user's own code pass through.
    """
    where, _, name = target.rpartition(":")
    if not where or "/" in name or "\\" in name:
        where, name = target, DEFAULT
    names = _run_script(where) if where.endswith(".py") else _import_module(where)
    function = names.get(name)
    if not callable(function):
        found = "no such name" if name not in names else f"a {type(function).__name__}"
        raise InductorMoeError(
            f"{target}: {name!r} must be a function without arguments that returns "
            f"(model, args) or (model, args, kwargs); found {found}"
        )
    return _checked(f"{where}:{name}", function())


def _run_script(file: str) -> Mapping[str, Any]:
    path = Path(file)
    if not path.is_file():
        raise InductorMoeError(f"{file}: no such file")
    sys.path.insert(0, str(path.parent.resolve()))
    return runpy.run_path(str(path), run_name=path.stem)


def _import_module(name: str) -> Mapping[str, Any]:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return vars(importlib.import_module(name))
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
        raise InductorMoeError(
            f"{name}: no such module; give script.py, script.py:function or "
            "package.module:function"
        ) from error


def _checked(target: str, value: Any) -> Call:
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) in (2, 3) and callable(parts[0]) and isinstance(parts[1], (tuple, list)):
        kwargs = parts[2] if len(parts) == 3 else {}
        if isinstance(kwargs, Mapping):
            return parts[0], tuple(parts[1]), dict(kwargs)
    got = ", ".join(type(part).__name__ for part in parts)
    raise InductorMoeError(
        f"{target} returned ({got}); it must return (model, args) or (model, args, kwargs), where "
        "model is callable, args is a tuple and kwargs is a dict"
    )
