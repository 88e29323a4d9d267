"""What may import what, what importing costs, and where PyTorch's private modules are used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each layer and the layers that it may import besides its own modules and the leaves.
ALLOWED = {
    "aoti": {"backend", "capture"},
    "backend": {"passes", "capture", "verification"},
    "passes": {"capture", "costs", "patterns", "lowerings", "tiles"},
    "capture": {"backend", "ops"},
    "patterns": {"ops"},
    "lowerings": {"ops", "kernels"},
    "ops": {"reference", "kernels", "attention_tiles", "tiles", "quant_tiles"},
    "quant": {"ops", "reference"},
    "costs": set(),
    "tiles": set(),
    "attention_tiles": {"tiles"},
    "quant_tiles": {"tiles"},
    "verification": set(),
    "kernels": set(),
    "reference": set(),
}
LEAVES = {"advice", "compat", "config", "errors", "files", "report"}
ALONE = {"kernels", "reference"}  # these import nothing of ours, leaves included
ROUTES = {
    ("config", "patterns"): "names of rewrites, to reject unknown ones",
    ("lowerings", "reference"): "what Inductor's C++ compiles on a CPU",
    ("passes", "kernels"): "hashed for the cache key",
    ("passes", "ops"): "hashed for the cache key",
    ("passes", "reference"): "hashed for the cache key",
    ("report", "report_html"): "to_html()",
}
# Above the layers: what a user calls. No layer imports these, and they may import anything.
SURFACE = {
    "__init__", "bench", "bisection", "cli", "compiling", "demo", "doctor", "explanation",
    "parallel", "parallel_exchange", "parallel_heads", "parallel_memory", "parallel_shared",
    "parallel_store", "report_html", "targets", "testing",
}  # fmt: skip

PRIVATE = ("functorch", "torch.fx.experimental")  # no underscore, yet no public API
COMPAT_ONLY = "private APIs of PyTorch are used in inductor_moe/compat/ alone"


def modules():
    """(dotted name, file) of every module of the package."""
    for folder, package in (
        ("inductor_moe", "inductor_moe"),
        ("patterns", "inductor_moe.patterns"),
        ("lowerings", "inductor_moe.lowerings"),
    ):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *parts)).removesuffix(".__init__"), file


MODULES = dict(modules())


def layer_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(name: str) -> set[str]:
    """The modules that a module's import statements name, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                package = node.module in {"inductor_moe", "torch"}
                found.add(full if package or full in MODULES else node.module)
    return found


def our_layers(name: str) -> set[str]:
    return {layer_of(target) for target in imported(name) if target.startswith("inductor_moe")}


@pytest.mark.parametrize("name", MODULES)
def test_imports_flow_one_way(name):
    layer = layer_of(name)
    if layer in SURFACE:
        return
    assert layer in ALLOWED or layer in LEAVES, f"{layer}: a new layer; say what it may import"
    leaves = set() if layer in ALONE else LEAVES
    for target in our_layers(name) - {layer, "__version__"} - leaves - ALLOWED.get(layer, set()):
        assert (layer, target) in ROUTES, f"{name} imports {target}, which {layer} may not"


def test_every_exception_is_used():
    used = {(layer_of(name), target) for name in MODULES for target in our_layers(name)}
    assert set(ROUTES) <= used


def is_private(dotted: str) -> bool:
    """Whether a dotted name of PyTorch or Triton has a part with a leading underscore."""
    package, *parts = dotted.split(".")
    if dotted.startswith(PRIVATE):
        return True
    if package not in {"torch", "triton"} or parts[:1] == ["ops"]:
        return False
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


def private_uses(source: str) -> list[str]:
    """Private names of PyTorch that a source imports or reaches as attributes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
        found += [f"line {node.lineno}: {name}" for name in names if is_private(name)]
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if layer_of(name) != "compat"])
def test_private_apis_stay_in_compat(name):
    assert private_uses(MODULES[name].read_text()) == [], COMPAT_ONLY


@pytest.mark.parametrize(
    "source",
    [
        "import torch._inductor.config",
        "from torch import _dynamo",
        "from torch._higher_order_ops import wrap",
        "from torch.utils import _pytree",
        "import torch.fx.experimental.symbolic_shapes",
        "from functorch.compile import make_boxed_func",
        "torch._dynamo.config.x = True",
        "torch.library._impls.clear()",
    ],
)
def test_a_private_use_is_seen(source):
    assert private_uses(source)
    assert not private_uses("torch.ops.aten._grouped_mm; torch.library.wrap_triton; x._private")


def run_python(source: str, cwd: Path = ROOT.parent) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", textwrap.dedent(source)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["inductor_moe", "inductor_moe.backend"])
def test_import_is_cheap(module, tmp_path):
    source = f"""
        import json, sys, time
        import torch
        before = set(sys.modules)
        start = time.perf_counter()
        import {module}
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
    """
    runs = [json.loads(run_python(source, tmp_path)) for _ in range(3)]
    new = runs[0][1]
    heavy = [
        name for name in new if name.startswith(("triton", "torch._inductor", "transformers"))
    ]
    assert heavy == []
    assert min(seconds for seconds, _ in runs) < 0.05


def test_command_line_does_not_import_torch(tmp_path):
    source = "import sys, inductor_moe.cli; print('torch' in sys.modules)"
    assert run_python(source, tmp_path).strip() == "False"


def test_dynamo_lists_the_backend(tmp_path):
    source = "import torch; print('inductor_moe' in torch._dynamo.list_backends())"
    assert run_python(source, tmp_path).strip() == "True"


@pytest.mark.parametrize("folder", ["patterns", "lowerings"])
def test_folders_are_no_packages_of_their_own(folder):
    source = f"""
        try:
            import {folder}
        except ImportError as error:
            print(error)
    """
    assert f"import inductor_moe.{folder}, not {folder}" in run_python(source, ROOT)


def test_public_names_resolve():
    source = """
        import inductor_moe
        print([name for name in inductor_moe.__all__ if not hasattr(inductor_moe, name)])
    """
    assert run_python(source).strip() == "[]"
