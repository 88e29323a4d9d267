"""What is wrong with the environment, and what to do about it."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from inductor_moe.errors import InductorMoeError

OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 15)
OLDEST_PYTHON = (3, 11)
FREE_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; `remedy` is empty where all is well."""

    what: str
    status: Literal["ok", "warning", "error"]
    found: str
    remedy: str = ""


def diagnose() -> Iterator[Finding]:
    """Every finding, one check after the other."""
    for check in CHECKS:
        try:
            yield check()
        except Exception as error:
            name = check.__name__.strip("_").replace("_", " ")
            text = f"the check failed: {type(error).__name__}: {error}"
            yield Finding(name, "error", text, "report this as a bug, with this line")


def _python() -> Finding:
    found = sys.version.split()[0]
    if sys.version_info < OLDEST_PYTHON:
        return Finding("python", "error", found, f"use Python {_dotted(OLDEST_PYTHON)} or later")
    return Finding("python", "ok", found)


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", "error", str(error), "pip install torch")
    version = _release(torch.__version__)
    span = f"{_dotted(OLDEST_TORCH)} to {_dotted(NEWEST_TORCH)}"
    if version < OLDEST_TORCH:
        remedy = f"pip install 'torch>={_dotted(OLDEST_TORCH)}'"
        return Finding("torch", "error", f"{torch.__version__}, older than supported", remedy)
    if version > NEWEST_TORCH:
        remedy = f"private APIs may have moved; if something fails, use torch {span}"
        return Finding("torch", "warning", f"{torch.__version__}, newer than supported", remedy)
    return Finding("torch", "ok", torch.__version__)


def _triton() -> Finding:
    found = _version("triton")
    if found is None:
        remedy = "pip install triton (Linux); without it every op runs its reference on a GPU"
        return Finding("triton", "warning", "not installed", remedy)
    wanted = _pinned_triton()
    if wanted and _release(wanted) != _release(found):
        text = f"{found}, but torch {_version('torch')} was built for {wanted}"
        return Finding("triton", "error", text, f"pip install triton=={wanted}")
    import triton  # noqa: F401

    return Finding("triton", "ok", found)


def _pinned_triton() -> str | None:
    """The version that the installed torch asks for, where it asks for one."""
    for requirement in metadata.requires("torch") or ():
        match = re.match(r"triton\s*==\s*([\d.]+)", requirement)
        if match:
            return match[1]
    return None


def _gpu() -> Finding:
    import torch

    from inductor_moe import compat

    if not torch.cuda.is_available():
        if torch.version.cuda and shutil.which("nvidia-smi"):
            text = f"torch is built for CUDA {torch.version.cuda} but sees no GPU"
            return Finding("gpu", "error", text, "check the driver with `nvidia-smi`")
        return Finding("gpu", "ok", "none; ops are compiled by Inductor's C++ backend")
    names = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)} (sm_{capability[0]}{capability[1]})"
        reason = compat.no_kernels_reason(torch.device("cuda", index))
        if reason is not None:
            return Finding("gpu", "warning", name, f"{reason}; PyTorch's own ops run instead")
        names.append(name)
    return Finding("gpu", "ok", ", ".join(names))


def _compiler() -> Finding:
    compiler = os.environ.get("CXX", "g++")
    path = shutil.which(compiler)
    install = "install g++ (Debian: apt-get install g++), or name another compiler in CXX"
    if path is None:
        return Finding("C++ compiler", "error", f"{compiler} is not on the PATH", install)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [path, "-std=c++20", "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if built.returncode:
        problem = (built.stderr.strip().splitlines() or ["no message"])[-1]
        text = f"{path} cannot build C++20 with OpenMP: {problem}"
        return Finding("C++ compiler", "error", text, install)
    banner = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    return Finding("C++ compiler", "ok", banner.stdout.splitlines()[0])


def _headers() -> Finding:
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        remedy = (
            f"install the headers (Debian: apt-get install python{_dotted(sys.version_info)}-dev)"
        )
        return Finding("Python headers", "error", f"{header} is missing", remedy)
    return Finding("Python headers", "ok", str(header.parent))


def _cache() -> Finding:
    from inductor_moe import compat

    folder = compat.cache_folder()
    remedy = "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("cache folder", "error", str(error), remedy)
    free = shutil.disk_usage(folder).free
    text = f"{folder}, {free / (1 << 30):.1f} GiB free"
    if free < FREE_BYTES:
        return Finding("cache folder", "warning", text, "free some space, or move it: " + remedy)
    return Finding("cache folder", "ok", text)


def _backend() -> Finding:
    names = {point.name for point in metadata.entry_points(group="torch_dynamo_backends")}
    if "inductor_moe" not in names:
        text = "the entry point inductor_moe is not registered"
        return Finding("backend", "error", text, "install the package with pip, -e or not")
    from inductor_moe import __version__
    from inductor_moe.patterns import ALL

    return Finding("backend", "ok", f"inductor_moe {__version__}, {len(ALL)} rewrites")


def _transformers() -> Finding:
    found = _version("transformers")
    remedy = "pip install 'inductor-moe[demo]', for `inductor-moe demo`"
    if found is None:
        return Finding("transformers", "warning", "not installed", remedy)
    if _release(found) < (5, 0):
        return Finding("transformers", "warning", f"{found}, older than 5", remedy)
    return Finding("transformers", "ok", found)


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _torch,
    _triton,
    _gpu,
    _compiler,
    _headers,
    _cache,
    _backend,
    _transformers,
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if not match:
        raise InductorMoeError(f"version {version!r} does not begin with two numbers")
    return int(match[1]), int(match[2])


def _dotted(version: Sequence[Any]) -> str:
    return f"{version[0]}.{version[1]}"
