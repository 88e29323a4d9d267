"""What a rewrite is: an anchor, a walk that reads the site or refuses, and a replacement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx


class Refusal(Exception):
    """Why a candidate site is not rewritten. The text is shown to the user."""


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One form of a subgraph and what replaces it.

    name      dotted, stable, for example "moe.experts.grouped_mm"
    op        the semantic op, for example "moe_experts"
    anchors   the rare nodes at which a site of this form may end
    walk      reads the site from its anchor; raises Refusal where anything its meaning depends
              on is not what the op computes; changes nothing
    replace   inserts the op and redirects the users of the site's output
    describe  what was recognised, in a few words
    origin    the node that stands for a site in reports; None for its anchor
    optional  a refusal is no loss worth reporting: Inductor does well without this rewrite
    """

    name: str
    op: str
    anchors: Callable[[fx.Graph], Iterable[fx.Node]]
    walk: Callable[[fx.Node], Any]
    replace: Callable[[fx.Graph, Any], fx.Node]
    describe: Callable[[Any], str]
    origin: Callable[[Any], fx.Node] | None = None
    optional: bool = False
