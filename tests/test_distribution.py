"""What the wheel holds, and that it works installed, away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("seqzoo-*.whl"))


def test_the_wheel_holds_the_tree(wheel: Path):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, prefix in (
        ("seqzoo", ""),
        ("kernels", "seqzoo/"),
        ("train", "seqzoo/"),
        ("eval", "seqzoo/"),
        ("configs", "seqzoo/"),
    ):
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT)
            linked = (
                folder == "seqzoo"
                and relative.parts[1:2]
                and relative.parts[1] in ("kernels", "train", "eval", "configs")
            )
            if path.is_file() and path.suffix in (".py", ".yaml", ".typed") and not linked:
                expected.add(prefix + relative.as_posix())
    assert held == expected


def test_it_works_unpacked_elsewhere(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import pathlib, torch, seqzoo
from importlib.resources import files
assert pathlib.Path(seqzoo.__file__).is_relative_to(pathlib.Path.cwd()), seqzoo.__file__
y, _ = seqzoo.create("min_gru", d_model=16)(torch.zeros(1, 3, 16))
assert any(path.name == "task" for path in files("seqzoo.configs").iterdir())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_checkout_whose_links_were_lost_still_imports(tmp_path: Path):
    import shutil

    for folder in ("kernels", "train", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    links = shutil.ignore_patterns("kernels", "train", "eval", "configs", "__pycache__")
    shutil.copytree(ROOT / "seqzoo", tmp_path / "seqzoo", ignore=links)
    code = "import seqzoo.ops, seqzoo.kernels.linear_scan; print(seqzoo.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
