"""A progress bar on standard error, while a terminal shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int, what: str, shown: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function to call with the name of each step as it begins."""
    if not shown:
        yield lambda name: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("[dim]{task.fields[name]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(what), total=total, name="")
        begun = 0

        def step(name: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, name=escape(name))
            begun += 1

        yield step
