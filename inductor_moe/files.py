"""Whether a file can be written where it is wanted, asked before the work that it is for."""

from __future__ import annotations

import os
from pathlib import Path


def unwritable(path: str | os.PathLike[str]) -> str | None:
    """Why there can be no file at this path; None if there can."""
    file = Path(path).absolute()
    if file.is_dir():
        return f"{path} is a folder"
    return None if file.parent.is_dir() else f"there is no folder {file.parent} for {file.name}"
