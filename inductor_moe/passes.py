"""The one composite pass: the user's own pass, canonical form, the rewrites, the report."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import re
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import fx

from inductor_moe import compat, lowerings
from inductor_moe.capture.canonical import canonicalise
from inductor_moe.config import Options
from inductor_moe.costs import Costs, costs_of, joined_calls
from inductor_moe.errors import RewriteFailedWarning, StrictError
from inductor_moe.ops.all_reduce import shared_groups
from inductor_moe.patterns import ALL, Refusal, Rewrite
from inductor_moe.patterns.all_reduce import left_to_backends
from inductor_moe.patterns.delta_rule import convolution
from inductor_moe.patterns.int8_activations import mark_int8_activations
from inductor_moe.report import Report, Site
from inductor_moe.tiles import user_folder

log = logging.getLogger("inductor_moe")


class FusionPass(compat.graph_pass_base()):  # type: ignore[misc]
    """Inductor's post_grad_custom_pre_pass: rewrites the sites it finds and keeps a report.

    A pass object belongs to one compile. `user_pass` (the setting that ours replaces) runs first.
    """

    def __init__(self, options: Options, user_pass: Any = None) -> None:
        self.options = options
        self.user_passes = compat.graph_passes(user_pass)
        self.reports: list[Report] = []
        self.origins: dict[str, str] = {}
        self._lock = threading.Lock()

    def __call__(self, graph: fx.Graph) -> None:
        for user_pass in self.user_passes:
            user_pass(graph)
        lowerings.install()
        sites = rewrite(graph, self._remaining())
        with self._lock:
            self.reports.append(Report(sites=tuple(sites), notes=left_to_backends(graph)))
            self.origins.update(_origins(graph))

    def _remaining(self) -> Options:
        """The options with the limit less the sites that earlier graphs of this compile took."""
        if self.options.limit is None:
            return self.options
        taken = sum(len(report.matched) for report in self.reports)
        return dataclasses.replace(self.options, limit=max(0, self.options.limit - taken))

    def __deepcopy__(self, memo: Any) -> FusionPass:
        # AOTInductor copies its config patches; the reports must come back to the caller's pass.
        return self

    def uuid(self) -> Any:
        """Changes with all that decides what a compile yields.

        None, so no caching, if a user's pass has none.
        """
        user = [getattr(user_pass, "uuid", lambda: None)() for user_pass in self.user_passes]
        if any(value is None for value in user):
            return None
        text = f"{source_hash()} {self.options!r} {user!r} {shared_groups()}"
        return hashlib.sha256(text.encode()).digest()


def _origins(graph: fx.Graph) -> dict[str, str]:
    """Where the first call of each op from outside PyTorch came from."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        if isinstance(node.target, compat.op_overload_type()) and node.target.namespace != "aten":
            where = " at ".join(part for part in (module_of(node), source_of(node)) if part)
            found.setdefault(node.target.name().split(".")[0], where)
    return found


def rewrite(graph: fx.Graph, options: Options) -> list[Site]:
    """Rewrite every site of a graph in place and return what was found, in graph order."""
    try:
        canonicalise(graph)
    except Exception as error:
        _failed("canonical form", error, options)
    found: list[tuple[fx.Node, Site]] = []
    taken: set[fx.Node] = set()
    produced: dict[fx.Node, fx.Node] = {}
    made: dict[fx.Node, fx.Node] = {}
    for form in ALL:
        if not options.enabled(form.name):
            continue
        for anchor in list(form.anchors(graph)):
            if options.limit is not None and sum(s.matched for _, s in found) >= options.limit:
                break
            if anchor not in taken:
                found.append(
                    (anchor, _rewrite_site(graph, form, anchor, taken, produced, made, options))
                )
        # What a rewrite replaced must not count as a user of what the next one reads, nor stay
        # for being random, as attention is to PyTorch.
        graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=node not in taken))
    rules = any(site.matched and site.op == "delta_rule" for _, site in found)
    if rules and options.limit is None and options.enabled(convolution.NAME):
        _spread_convolutions(graph, options)
    # One form's refusal says nothing where another form fused the same site, and what a form
    # makes of another's op is one site with it.
    if options.int8_activations:
        found = _with_int8_activations(graph, found, made, options)
    optional = {form.name for form in ALL if form.optional}
    history = {anchor: site for anchor, site in found if site.matched}
    refined = {produced[anchor] for anchor in history if anchor in produced}
    return [
        _joined(anchor, site, produced, history)
        for anchor, site in found
        if (site.matched and anchor not in refined)
        or not (site.matched or anchor in taken or site.rewrite in optional)
    ]


def _spread_convolutions(graph: fx.Graph, options: Options) -> None:
    try:
        convolution.spread_convolutions(graph)
    except Exception as error:
        _failed("spreading convolutions", error, options)


def _with_int8_activations(
    graph: fx.Graph,
    found: list[tuple[fx.Node, Site]],
    made: dict[fx.Node, fx.Node],
    options: Options,
) -> list[tuple[fx.Node, Site]]:
    """The sites and what their ops multiply with, now that no form takes an op any more.

    made  the anchor of the site that each new node is of
    """
    try:
        said = mark_int8_activations(graph)
    except Exception as error:
        _failed("int8 activations", error, options)
        return found
    notes: dict[fx.Node | None, dict[str, None]] = {}
    for node, text in said.items():
        notes.setdefault(made.get(node), {})[text] = None
    return [
        (anchor, dataclasses.replace(site, detail="; ".join([site.detail, *notes[anchor]])))
        if site.matched and anchor in notes
        else (anchor, site)
        for anchor, site in found
    ]


def _joined(
    anchor: fx.Node, site: Site, produced: dict[fx.Node, fx.Node], history: dict[fx.Node, Site]
) -> Site:
    """A site with what an earlier form recognised of it."""
    if not site.matched or anchor not in produced:
        return site
    earlier = history[produced[anchor]]
    before = joined_calls(
        Costs(before=earlier.before, after=earlier.after), Costs(before=site.before)
    )
    return dataclasses.replace(site, detail=f"{earlier.detail}; {site.detail}", before=before)


def _rewrite_site(
    graph: fx.Graph,
    form: Rewrite,
    anchor: fx.Node,
    taken: set[fx.Node],
    produced: dict[fx.Node, fx.Node],
    made: dict[fx.Node, fx.Node],
    options: Options,
) -> Site:
    describe = functools.partial(
        Site, op=form.op, rewrite=form.name, module=module_of(anchor), source=source_of(anchor)
    )
    before = set(graph.nodes)
    used = [node for node in graph.nodes if node.users]
    detail = ""
    try:
        site = form.walk(anchor)
        detail = form.describe(site)
        with _undone_on_error(graph, before):
            result = form.replace(graph, site)
            after = list(graph.nodes)
            new = [node for node in after if node not in before]
            if len(after) == len(before) + len(new):  # what a rewrite erases cannot be put back
                _check_order(new)
    except Refusal as refusal:
        log.debug("%s left at %s: %s", form.name, anchor, refusal)
        return describe(detail=detail, reason=str(refusal))
    except Exception as error:
        _failed(form.name, error, options)
        return describe(detail=detail, reason=f"the rewrite failed: {_brief(error)}")
    taken.add(anchor)
    if result is not anchor:
        produced[result] = anchor
    added = [*new, result]
    made.update(dict.fromkeys(added, anchor))
    orphans = [node for node in reversed(used) if not node.users]
    if form.origin is not None:
        origin = form.origin(site)
        describe = functools.partial(describe, module=module_of(origin), source=source_of(origin))
    costs = _costs(anchor, added, orphans, options)
    return describe(detail=detail, **dataclasses.asdict(costs))


def _check_order(new: list[fx.Node]) -> None:
    """Raise where a new node reads what comes after it, or is read before it."""
    for node in new:
        for source, reader in (
            *((source, node) for source in node.all_input_nodes),
            *((node, user) for user in node.users),
        ):
            if not source < reader:
                raise RuntimeError(f"{reader.name} reads {source.name}, which comes after it")


def _costs(
    anchor: fx.Node, added: list[fx.Node], orphans: list[fx.Node], options: Options
) -> Costs:
    try:
        return costs_of(anchor, added, orphans)
    except Exception as error:
        _failed("counting what a rewrite did", error, options)
        return Costs()


class _undone_on_error:
    """Leave the graph as it was if the block raises: redirect users back, drop what was added."""

    def __init__(self, graph: fx.Graph, before: set[fx.Node]) -> None:
        self.graph, self.before = graph, before

    def __enter__(self) -> None:
        # Both are immutable: a change puts others in their place. Kept as lists: a pair for every
        # node of a model, for every site, keeps the garbage collector busy.
        self.nodes = list(self.before)
        self.args = [node.args for node in self.nodes]
        self.kwargs = [node.kwargs for node in self.nodes]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            return
        for node, args, kwargs in zip(self.nodes, self.args, self.kwargs, strict=True):
            if node.args is not args or node.kwargs is not kwargs:
                node.args, node.kwargs = args, kwargs
        added = [node for node in self.graph.nodes if node not in self.before]
        for node in added:
            node.args, node.kwargs = (), {}
        for node in added:
            self.graph.erase_node(node)


def _failed(what: str, error: Exception, options: Options) -> None:
    if options.strict:
        raise StrictError(f"{what} failed: {type(error).__name__}: {error}") from error
    log.debug("%s failed; the graph is left as it was", what, exc_info=error)
    warnings.warn(
        f"inductor_moe: {what} failed and left the graph as it was ({_brief(error)}); "
        'please report it with the output of TORCH_LOGS="+inductor_moe"',
        RewriteFailedWarning,
        stacklevel=3,
    )


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def module_of(node: fx.Node) -> str:
    """The dotted path of the innermost nn.Module that a node came from, or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['(\w+)'\]\.?", "", path)
    path = re.sub(r"(?:\._modules)?\['(\w+)'\]", r".\1", path)
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    return path.removeprefix("self.").strip(".")


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]+\n\s*(?P<code>[^\n]+)')


def source_of(node: fx.Node) -> str:
    """The line of the model that a node came from, as "file:line: code", or ""."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    file, line, code = next(
        (frame for frame in reversed(frames) if not frame[0].startswith(libraries)), frames[-1]
    )
    parts = Path(file).parts
    shown = os.path.join(*parts[-3:]) if len(parts) > 3 else file
    return f"{shown}:{line}: {code.strip()}"


@functools.cache
def source_hash() -> str:
    """A hash of every file that decides what a compile yields, tuned tables included."""
    from inductor_moe import kernels, ops, patterns, reference

    roots = {Path(__file__).parent, user_folder()}
    for package in (patterns, lowerings, kernels, ops, reference):
        roots |= {Path(path) for path in package.__path__}
    files = sorted(
        {file for root in roots for kind in ("*.py", "*.json") for file in root.rglob(kind)}
    )
    digest = hashlib.sha256(torch.__version__.encode())
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
