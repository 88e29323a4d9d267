"""Every Python block of the README runs, in order, and its commands are those that CI runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from inductor_moe.config import Options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "moe_experts" in done.stdout


def test_usage_comes_first_and_is_short():
    first = blocks("python")[0]
    assert README.index(first) < README.index("## ")
    statements = [line for line in first.splitlines() if line and not line.startswith("import")]
    assert len([line for line in statements if not line.startswith("from")]) <= 6


def test_two_commands():
    demo, tests = blocks("sh")[:2]
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
