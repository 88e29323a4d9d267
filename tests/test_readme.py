"""Every block of the README runs, in order: those that need time as a slow test.

The two commands are what CI runs: the second as it is, the first as its install and the tests of
the demo.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from inductor_moe.config import Options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


FENCE = re.compile(r"^```(python|sh)( needs=\"time\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(language, bool(time), body) for language, time, body in FENCE.findall(README)]
COMMANDS = 2  # install and demo, install and tests


def blocks(language: str, time: bool = False) -> list[str]:
    """The bodies of a language's blocks, with `time` also those that need it."""
    return [body for name, slow, body in BLOCKS if name == language and (time or not slow)]


def run(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # has inductor-moe
    env = {**os.environ, "PATH": path}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_no_block_is_passed_over():
    assert README.count("```") == 2 * len(BLOCKS)
    assert len(blocks("sh")) == COMMANDS


def test_python_blocks_run(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")))
    assert "moe_experts" in run([sys.executable, str(script)], tmp_path)


@pytest.mark.slow
def test_all_blocks_run(tmp_path):
    """The shell's find a script with a model, and the package that the Python blocks left."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python", time=True)))
    run([sys.executable, str(script)], tmp_path)
    (tmp_path / "my_package").mkdir()
    for name in ("my_model.py", "my_package/models.py"):
        (tmp_path / name).write_text(
            blocks("python")[0].partition("compiled =")[0]
            + "def build():\n    return model, (torch.arange(16)[None],)\n"
        )
    for body in blocks("sh", time=True)[COMMANDS:]:
        run(["bash", "-euo", "pipefail", "-c", body], tmp_path)
    assert (tmp_path / "report.html").exists() and (tmp_path / "report.json").exists()


def test_usage_comes_first_and_is_short():
    first = blocks("python")[0]
    assert README.index(first) < README.index("## ")
    statements = [line for line in first.splitlines() if line and not line.startswith("import")]
    assert len([line for line in statements if not line.startswith("from")]) <= 6


def test_two_commands():
    demo, tests = blocks("sh")
    assert demo.endswith("&& inductor-moe demo\n") and "[demo]" in demo
    assert tests.endswith("&& pytest -n 2\n") and "[test]" in tests
    matches = [line for line in README.splitlines() if "&& pytest" in line]
    assert matches == [tests.strip()]  # what .ci/run looks for


def test_every_option_is_in_the_table():
    listed = re.findall(r"^\| `inductor_moe\.(\w+)` \|", README, re.MULTILINE)
    assert listed == list(Options.__dataclass_fields__)


def test_files_it_names_exist():
    for name in re.findall(r"^\| `([\w./]+)`", README, re.MULTILINE):
        assert (ROOT / name).exists() or name.startswith("inductor_moe."), name
    for name in ("CHANGELOG.md", "constraints.txt", ".ci/run", ".ci/mypy"):
        assert name in README and (ROOT / name).exists()
