"""What was fused, what was refused and why: one Report a compile, kept for the process."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
from collections.abc import Iterable
from typing import Any

from inductor_moe import advice


@dataclasses.dataclass(frozen=True)
class Site:
    """One place in a graph that a rewrite looked at.

    op       the semantic op, for example "moe_experts"
    rewrite  the rewrite that matched or refused, for example "moe.experts.grouped_mm"
    module   the dotted path of the nn.Module it came from, or ""
    source   "file:line: code" of the model's line it came from, or ""
    detail   what was recognised: layout, activation, shapes
    reason   None for a matched site; otherwise why it was left to Inductor
    before   the calls that the op replaces, "name ×number" by comma, or "" where the graph
             never held them
    after    the op with the shapes of its tensors, or "" for a refused site
    kernels  the Triton kernels that run it on a GPU
    bytes    that a call has to move: tensors once, updated states twice, of the experts' weights
             those that its tokens can reach; symbolic sizes as traced; None where not counted
    flops    that a call has to do, counted alike
    """

    op: str
    rewrite: str
    module: str = ""
    source: str = ""
    detail: str = ""
    reason: str | None = None
    before: str = ""
    after: str = ""
    kernels: str = ""
    bytes: int | None = None
    flops: int | None = None

    @property
    def advice(self) -> str:
        """What the user can do about a refusal; "" for a matched site."""
        return "" if self.reason is None else advice.on_refusal(self.reason)

    @property
    def matched(self) -> bool:
        return self.reason is None


@dataclasses.dataclass(frozen=True)
class Report:
    """The sites of one compile, over all its graphs.

    graphs   how many graphs the passes saw
    sites    every site, in graph order
    notes    remarks on the compile as a whole, for example why it was left alone
    breaks   the reasons of Dynamo's graph breaks, where they were collected
    cached   whether the compile came from Inductor's cache and the report from disk
    """

    sites: tuple[Site, ...] = ()
    notes: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()
    graphs: int = 1
    cached: bool = False

    @property
    def matched(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.matched)

    @property
    def refused(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if not site.matched)

    def counts(self) -> dict[str, int]:
        """Matched sites per op, for example {"moe_experts": 4}."""
        return dict(collections.Counter(site.op for site in self.matched))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {**dataclasses.asdict(self), "counts": self.counts()}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of to_json."""
        fields = json.loads(text)
        return cls(
            sites=tuple(Site(**site) for site in fields["sites"]),
            notes=tuple(fields["notes"]),
            breaks=tuple(fields["breaks"]),
            graphs=fields["graphs"],
            cached=fields["cached"],
        )

    def to_html(self) -> str:
        """A self-contained page; text that comes from the model is escaped."""
        from inductor_moe.report_html import render

        return render(self)

    def __str__(self) -> str:
        lines = [self.summary()]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  graph break: {reason}" for reason in self.breaks]
        for site in self.sites:
            mark = "fused" if site.matched else "left "
            lines.append(f"  {mark} {site.op}  [{site.rewrite}]  {site.module or '(no module)'}")
            if site.detail:
                lines.append(f"        {site.detail}")
            if site.source:
                lines.append(f"        at {site.source}")
            if site.reason:
                lines.append(f"        because {site.reason}")
                lines.append(f"        advice: {site.advice}")
        return "\n".join(lines)

    def summary(self) -> str:
        """One line: graphs, matched sites per op, refused sites."""
        graphs = f"{self.graphs} graph" + ("" if self.graphs == 1 else "s")
        if not self.sites:
            return f"inductor_moe: {graphs}, no sites"
        fused = ", ".join(f"{count} {op}" for op, count in sorted(self.counts().items()))
        text = f"inductor_moe: {graphs}, fused {fused or 'nothing'}"
        if self.refused:
            text += f", left {len(self.refused)} to Inductor"
        return text + (" (from the cache)" if self.cached else "")


def merge(reports: Iterable[Report]) -> Report:
    """One report over several compiles; sites in order."""
    reports = list(reports)
    return Report(
        sites=tuple(site for report in reports for site in report.sites),
        notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
        breaks=tuple(reason for report in reports for reason in report.breaks),
        graphs=sum(report.graphs for report in reports),
        cached=bool(reports) and all(report.cached for report in reports),
    )


# A long-lived process recompiles; the oldest reports are dropped beyond this many.
_KEEP = 4096
_reports: collections.deque[Report] = collections.deque(maxlen=_KEEP)
_lock = threading.Lock()


def record(report: Report) -> None:
    """Append a report to the process's list."""
    with _lock:
        _reports.append(report)


def reports() -> tuple[Report, ...]:
    """The reports of every compile in this process, oldest first, the last 4096 of them."""
    with _lock:
        return tuple(_reports)


def scaled(number: float) -> str:
    """Three digits and a unit prefix: 9.46 M."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} T"
