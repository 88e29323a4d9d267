"""A report as one page: no script, no external resources, every text of the model escaped."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterable

from inductor_moe import advice
from inductor_moe.report import Report, Site, scaled

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1c2128; --faint: #57606a; --line: #d8dee4;
  --fused: #116a2f; --fused-soft: #dcf5e3; --left: #8a4600; --left-soft: #ffeccc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1317; --card: #181d23; --text: #e4e8ec; --faint: #9aa5b1; --line: #303841;
    --fused: #6fdc8c; --fused-soft: #15311f; --left: #ffb454; --left-soft: #3a2a10;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem;
  background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.6rem; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 0.4rem 0; }
code { font: 0.875em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
code, li { overflow-wrap: anywhere; }
.faint { color: var(--faint); }
.counts { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 1.2rem 0 0; padding: 0; }
.counts > div {
  flex: 1 1 7rem; padding: 0.7rem 1rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card);
}
.counts dt { color: var(--faint); font-size: 0.85rem; }
.counts dd { margin: 0; font-size: 1.6rem; font-weight: 600; line-height: 1.2; }
.counts .fused dd { color: var(--fused); }
.counts .left dd { color: var(--left); }
article, .box {
  margin: 0.75rem 0; padding: 0.9rem 1rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card);
}
article.fused { border-left: 4px solid var(--fused); }
article.left { border-left: 4px solid var(--left); }
.mark {
  display: inline-block; padding: 0 0.55rem; border-radius: 1rem; font-size: 0.8rem;
  font-weight: 600; vertical-align: 0.1em; white-space: nowrap;
}
.fused .mark { background: var(--fused-soft); color: var(--fused); }
.left .mark { background: var(--left-soft); color: var(--left); }
dl.facts { display: grid; grid-template-columns: 7rem 1fr; gap: 0.25rem 1rem; margin: 0.6rem 0 0; }
dl.facts dt { color: var(--faint); }
dl.facts dd { margin: 0; min-width: 0; }
pre.code {
  margin: 0.3rem 0 0; padding: 0.5rem 0.7rem; border-radius: 6px; background: var(--page);
  white-space: pre-wrap;
}
.calls { display: flex; flex-wrap: wrap; gap: 0.3rem; margin-top: 0.3rem; }
.calls code { padding: 0 0.4rem; border-radius: 4px; background: var(--page); }
.advice { display: block; padding-left: 0.7rem; border-left: 3px solid var(--left); }
summary { cursor: pointer; }
details ul { margin: 0.3rem 0 0; padding-left: 1.2rem; }
ul.box { padding-left: 2rem; }
ul.box > li { white-space: pre-line; }
ul.box > li + li { margin-top: 0.8rem; }
@media (max-width: 34rem) {
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: 0.5rem; }
}
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
SHOWN_MODULES = 3


def render(report: Report) -> str:
    """The page of a report."""
    parts = [
        _counts(report),
        _remarks("Notes", report.notes),
        _remarks("Graph breaks", report.breaks, [advice.on_break(why) for why in report.breaks]),
        _section("Left to Inductor", report.refused),
        _section("Fused", report.matched),
    ]
    if not report.sites:
        parts.append(
            '<p class="box">No sites: the graphs hold no Mixture-of-Experts or delta-rule layer '
            "in a form that a rewrite looks for. Inductor compiled them as it always does.</p>"
        )
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>inductor_moe report</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>inductor_moe report</h1>
<p class="faint">{escape(report.summary())}</p>
</header>
<main>
{body}
</main>
</body>
</html>
"""


# What HTML cannot hold, and marks that reorder the text around them.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str) -> str:
    """Text as HTML; control and direction characters become U+FFFD."""
    return html.escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text))


def _counts(report: Report) -> str:
    rows = [
        ("fused", f"fused {op}", number) for op, number in sorted(report.counts().items())
    ] or [("", "fused", 0)]
    rows.append(("left" if report.refused else "", "left to Inductor", len(report.refused)))
    rows.append(("left" if report.breaks else "", "graph breaks", len(report.breaks)))
    rows.append(("", "graphs", report.graphs))
    tiles = "\n".join(
        f'<div class="{kind}"><dt>{escape(name)}</dt><dd>{number}</dd></div>'
        for kind, name, number in rows
    )
    return f'<dl class="counts">\n{tiles}\n</dl>'


def _remarks(title: str, texts: Iterable[str], advised: Iterable[str] = ()) -> str:
    """A list of texts, each with its advice below where there is some."""
    remedies = [f'<p class="advice">{escape(text)}</p>' for text in advised]
    items = [f"<li>{escape(text.strip())}" for text in texts]
    remedies += [""] * (len(items) - len(remedies))
    if not items:
        return ""
    lines = "\n".join(f"{item}{remedy}</li>" for item, remedy in zip(items, remedies, strict=True))
    return f'<section>\n<h2>{title}</h2>\n<ul class="box">\n{lines}\n</ul>\n</section>'


def _section(title: str, sites: tuple[Site, ...]) -> str:
    """Sites that differ in their module only share a card."""
    if not sites:
        return ""
    alike: dict[Site, list[Site]] = {}
    for site in sites:
        alike.setdefault(dataclasses.replace(site, module=""), []).append(site)
    cards = "\n".join(_card(group) for group in alike.values())
    return f"<section>\n<h2>{title} ({len(sites)})</h2>\n{cards}\n</section>"


def _card(sites: list[Site]) -> str:
    site = sites[0]
    kind, mark = ("fused", "fused") if site.matched else ("left", "left to Inductor")
    number = f" &times; {len(sites)}" if len(sites) > 1 else ""
    facts = []
    if site.reason:
        facts.append(("because", escape(site.reason)))
        facts.append(("advice", f'<span class="advice">{escape(site.advice)}</span>'))
    facts.append(("module", _modules([each.module or "(no module)" for each in sites])))
    if site.detail:
        facts.append(("recognised", escape(site.detail)))
    if site.source:
        facts.append(("source", _source(site.source)))
    if site.after:
        facts.append(("before", _before(site.before)))
        facts.append(("after", f"<code>{escape(site.after)}</code>"))
    if site.bytes is not None or site.flops is not None:
        facts.append(("each call", _needs(site.bytes, site.flops)))
    if site.kernels:
        facts.append(("kernels", escape(site.kernels)))
    facts.append(("rewrite", f"<code>{escape(site.rewrite)}</code>"))
    rows = "\n".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    return (
        f'<article class="{kind}">\n<h3>{escape(site.op)}{number} '
        f'<span class="mark">{mark}</span></h3>\n<dl class="facts">\n{rows}\n</dl>\n</article>'
    )


def _modules(names: list[str]) -> str:
    """The module names, those beyond the first few folded away."""
    listed = [f"<code>{escape(name)}</code>" for name in names]
    if len(listed) <= SHOWN_MODULES:
        return "<br>".join(listed)
    items = "".join(f"<li>{name}</li>" for name in listed)
    return f"<details><summary>{listed[0]} to {listed[-1]}</summary><ul>{items}</ul></details>"


_SOURCE = re.compile(r"(?P<where>.+?:\d+): (?P<code>.*)", re.DOTALL)


def _source(source: str) -> str:
    """The place, and its code on a line of its own."""
    parts = _SOURCE.fullmatch(source)
    if parts is None:
        return f"<code>{escape(source)}</code>"
    return (
        f"<code>{escape(parts['where'])}</code>"
        f'<pre class="code"><code>{escape(parts["code"])}</code></pre>'
    )


def _before(names: str) -> str:
    if not names:
        return "one call, put there while Dynamo traced the model"
    calls = names.split(", ")
    number = sum(int(name.partition(" \N{MULTIPLICATION SIGN}")[2] or 1) for name in calls)
    chips = " ".join(f"<code>{escape(name)}</code>" for name in calls)
    return f'{number} calls:<div class="calls">{chips}</div>'


def _needs(moved: int | None, work: int | None) -> str:
    parts = []
    if moved is not None:
        parts.append(f"{scaled(moved)}B to move")
    if work is not None:
        parts.append(f"{scaled(work)}FLOP")
    if moved and work is not None:
        parts.append(f"{work / moved:.3g} FLOP a byte")
    return ", ".join(parts)
