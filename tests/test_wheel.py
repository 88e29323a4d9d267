"""The wheel holds the package as the tree has it, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {
    "inductor_moe": "inductor_moe",
    "patterns": "inductor_moe/patterns",
    "lowerings": "inductor_moe/lowerings",
}
SHIPPED = {".py", ".json", ".typed"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the tree keeps no build folder."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for folder in (*HOMES, "tests"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                target = copy / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def in_tree():
    found = set()
    for folder, home in HOMES.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix in SHIPPED:
                found.add(f"{home}/{file.relative_to(ROOT / folder).as_posix()}")
    return found


def test_files_are_those_of_the_tree(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    missing, stray = in_tree() - files, files - in_tree()
    assert not missing, f"list their packages under [tool.setuptools] packages: {sorted(missing)}"
    assert not stray, sorted(stray)


def test_top_level_is_the_one_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert tops == {"inductor_moe"}


def test_entry_points_license_and_marker(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "inductor_moe = inductor_moe.backend:inductor_moe" in points
    assert "inductor-moe = inductor_moe.cli:main" in points
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "inductor_moe/py.typed" in wheel.namelist()


def test_unpacked_wheel_imports(wheel, tmp_path):
    wheel.extractall(tmp_path)
    source = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r});"
        "import inductor_moe, inductor_moe.patterns as p, inductor_moe.lowerings as l;"
        "print(inductor_moe.__file__, p.__file__, l.__file__)"
    )
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(tmp_path)) == 3, done.stdout
