"""What is inside a package, and whether it would need Python."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from inductor_moe import compat
from inductor_moe.aoti.archive import METADATA, Archive, Metadata
from inductor_moe.errors import PackageError

FOLDER = "data/aotinductor/"
_CONSTANT = re.compile(r'constants_info_\[(\d+)\]\.(original_fqn|data_size) = "?([^";]*)"?;')
_CPU_KERNEL = re.compile(r'extern "C"\s+void\s+(\w+)\(')


@dataclasses.dataclass(frozen=True)
class Call:
    """An op that the compiled code calls by name. needs_python: its kernels are in Python."""

    op: str
    needs_python: bool


@dataclasses.dataclass(frozen=True)
class Method:
    """One compiled method of a package."""

    name: str
    device: str
    architecture: str
    kernels: tuple[str, ...]
    constants: dict[str, int]
    calls: tuple[Call, ...]


@dataclasses.dataclass(frozen=True)
class Contents:
    """What `inspect` found."""

    path: str
    methods: tuple[Method, ...]
    metadata: Metadata | None

    @property
    def python_ops(self) -> tuple[str, ...]:
        """The ops that cannot run without Python."""
        return tuple(
            sorted({c.op for method in self.methods for c in method.calls if c.needs_python})
        )

    def __str__(self) -> str:
        lines = [self.path]
        if self.metadata is not None:
            m = self.metadata
            lines.append(
                f"  generation, format {m.format}: {m.model_type}, batch {m.batch_size}, up to "
                f"{m.max_seq_len} tokens; {len(m.states)} states, {len(m.weight_bytes)} weights "
                f"of {sum(m.weight_bytes):,} bytes, stored once; sampling {m.sampling}"
            )
        for method in self.methods:
            size = sum(method.constants.values())
            lines += [
                f"  {method.name}",
                f"    device        {method.device}"
                + (f", compute capability {method.architecture}" if method.architecture else ""),
                f"    constants     {len(method.constants)}, {size:,} bytes",
                f"    kernels       {len(method.kernels)}: {', '.join(method.kernels)}",
            ]
            lines += [
                f"    calls         {call.op}" + (", which needs Python" * call.needs_python)
                for call in method.calls
            ]
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str]) -> Contents:
    """Read a package, of export_generation or of any AOTInductor compile.

    Raises PackageError if the file is no package, or not whole.
    """
    archive = Archive(path)
    methods: dict[str, list[str]] = {}
    for name in archive.names:
        if name.startswith(FOLDER):
            methods.setdefault(name.removeprefix(FOLDER).split("/")[0], []).append(name)
    if not methods:
        raise PackageError(f"{archive.path} holds no methods compiled by AOTInductor")
    return Contents(
        str(archive.path),
        tuple(_method(archive, name, records) for name, records in sorted(methods.items())),
        archive.metadata() if METADATA in archive.names else None,
    )


def _method(archive: Archive, name: str, records: list[str]) -> Method:
    text = {
        record: archive.read(record).decode(errors="replace")
        for record in records
        if record.endswith((".json", ".cpp"))
    }
    about: dict[str, str] = {}
    for record, content in text.items():
        if record.endswith("_metadata.json"):
            about |= json.loads(content)
    sources = "\n".join(content for record, content in text.items() if record.endswith(".cpp"))
    fields: dict[str, dict[str, str]] = {}
    for number, field, value in _CONSTANT.findall(sources):
        fields.setdefault(number, {})[field] = value
    kernels = {Path(record).stem for record in records if record.endswith((".cubin", ".fatbin"))}
    return Method(
        name,
        about.get("AOTI_DEVICE_KEY", "unknown"),
        about.get("AOTI_COMPUTE_CAPABILITY", ""),
        tuple(sorted(kernels | set(_CPU_KERNEL.findall(sources)))),
        {f["original_fqn"]: int(f["data_size"]) for f in fields.values() if len(f) == 2},
        _calls(content for record, content in text.items() if _is_call_list(record)),
    )


def _is_call_list(name: str) -> bool:
    return name.endswith(".json") and not name.endswith("_metadata.json")


def _calls(texts: Iterable[str]) -> tuple[Call, ...]:
    found: dict[str, bool] = {}
    for text in texts:
        listing: Any = json.loads(text)
        for entry in listing.get("nodes", ()) if isinstance(listing, dict) else ():
            node = entry["node"]
            op = node["target"].split(".")[0]
            flagged = (node.get("metadata") or {}).get("torch_library_custom_op") == "1"
            found[op] = found.get(op, False) or flagged or compat.is_python_op(op)
    return tuple(Call(op, python) for op, python in sorted(found.items()))


def check_files(files: Iterable[str], origins: Mapping[str, str], method: str) -> None:
    """Raise PackageError if compiled files call an op whose kernels are in Python."""
    texts = (Path(file).read_text() for file in files if _is_call_list(file))
    _refuse((call.op for call in _calls(texts) if call.needs_python), origins, method)


def check_package(path: str, origins: Mapping[str, str]) -> None:
    """The same for a package that was written; it is removed before the error."""
    try:
        _refuse(inspect(path).python_ops, origins, "the package")
    except PackageError:
        Path(path).unlink(missing_ok=True)
        raise


def _refuse(ops: Iterable[str], origins: Mapping[str, str], where: str) -> None:
    named = [f"{op} ({origins.get(op) or 'of unknown origin'})" for op in ops]
    if named:
        raise PackageError(
            f"{where} would need Python for {', '.join(named)}: the op is implemented in Python "
            "and no lowering replaced it. Give it a lowering or a C++ kernel, or let a dynamic "
            "dimension have a maximum if the op is inductor_moe::delta_rule"
        )
