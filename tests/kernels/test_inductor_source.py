"""Every kernel survives what Inductor does to its source: a copy inside a string of Python."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil

import pytest
from triton.runtime.jit import JITFunction

from inductor_moe import kernels

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels"
)

MODULES = [
    importlib.import_module(f"{kernels.__name__}.{module.name}")
    for module in pkgutil.iter_modules(kernels.__path__)
]
KERNELS = {
    name: value
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel")
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_source_parses_inside_a_string(name):
    from torch._inductor.codegen import wrapper

    source = wrapper.user_defined_triton_kernel_transitive_closure_source_code(KERNELS[name])
    held = ast.literal_eval(f"'''\n{source}\n'''")
    functions = {n.name for n in ast.walk(ast.parse(held)) if isinstance(n, ast.FunctionDef)}
    assert name in functions
