"""Rules of the house that a tool can hold: import direction, cold import, names, no path of a machine."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import seqzoo
from seqzoo import ops

ROOT = Path(seqzoo.__file__).resolve().parents[1]
# from the bottom to the top: a module may import from its own line and from those above it
LAYERS = (
    ("seqzoo.version", "seqzoo.folders", "seqzoo.packing"),
    ("seqzoo.kernels", "seqzoo.ops"),
    ("seqzoo.mixer", "seqzoo.modules", "seqzoo.parameters"),
    ("seqzoo.layers",),
    ("seqzoo.testing", "seqzoo.zoo", "seqzoo.doctor"),
    ("seqzoo.models",),
    ("seqzoo.parallel", "seqzoo.hub"),
    ("seqzoo.train", "seqzoo.eval"),
    ("seqzoo.cli", "seqzoo.models.command"),
)
HEAVY = {
    "lightning",
    "transformers",
    "datasets",
    "huggingface_hub",
    "numba",
    "triton",
    "matplotlib",
    "rich",
    "jsonargparse",
}
MAY_IMPORT_HEAVY = ("seqzoo.train", "seqzoo.eval", "seqzoo.hub.causal_lm")
# loaded when an op is first called (the cold import below holds that)
KERNELS = ("cpu", "gpu", "numba_", "aot")


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, prefix in (
        (ROOT / "seqzoo", "seqzoo"),
        *((ROOT / n, f"seqzoo.{n}") for n in ("kernels", "train", "eval")),
    ):
        for path in sorted(folder.rglob("*.py")):
            if any(part in ("kernels", "train", "eval", "configs") for part in path.relative_to(folder).parts[:-1]):
                continue  # the links inside seqzoo/
            name = ".".join([prefix, *path.relative_to(folder).with_suffix("").parts])
            found.append((name.removesuffix(".__init__"), path))
    return found


def level(name: str) -> int | None:
    """Place of a module in the order; the longest prefix counts."""
    matches = [
        (len(prefix), index)
        for index, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if name == prefix or name.startswith(prefix + ".")
    ]
    return max(matches)[1] if matches else None


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return []


def at_import(tree: ast.Module) -> list[str]:
    """Modules imported when the module is, not inside functions or for type checkers."""
    found, pending = [], list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found += imported(node)
        pending += list(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way(name: str, path: Path):
    if name == "seqzoo":
        return
    own = level(name)
    assert own is not None, f"{name} has no place in the order of imports; add it to LAYERS"
    for target in at_import(ast.parse(path.read_text())):
        if target == "seqzoo":
            assert own >= level("seqzoo.testing"), f"{name} imports seqzoo itself, which imports the layers"
        elif target.startswith("seqzoo"):
            other = level(target)
            assert other is not None, f"{name} imports {target}, which has no place in the order"
            assert other <= own, f"{name} imports {target}, which stands above it"


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_heavy_packages_are_imported_when_used(name: str, path: Path):
    if name.startswith(MAY_IMPORT_HEAVY) or path.name.startswith(KERNELS):
        return
    for target in at_import(ast.parse(path.read_text())):
        assert target.split(".")[0] not in HEAVY, f"{name} imports {target} when it is imported"


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_no_module_of_a_sibling_folder_carries_a_name_of_the_standard_library(name: str, path: Path):
    if path.parent.name in ("train", "eval", "kernels"):
        assert path.stem not in sys.stdlib_module_names


def test_the_four_folders_stay_namespace_packages():
    for folder in ("kernels", "train", "eval", "configs"):
        assert not (ROOT / folder / "__init__.py").exists()
        assert (ROOT / "seqzoo" / folder).resolve() == ROOT / folder


COLD = """
import sys, time
for name in {blocked}:
    sys.modules[name] = None
import torch
before = time.process_time()
import seqzoo, seqzoo.models, seqzoo.ops
spent = time.process_time() - before
mixer = seqzoo.create("min_gru", d_model=16)
with seqzoo.ops.backend("chunked"):
    mixer(torch.zeros(1, 3, 16))
print(spent)
"""


def test_a_cold_import_is_quick_and_pulls_nothing_heavy():
    spent = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", COLD.format(blocked=sorted(HEAVY))],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        spent.append(float(done.stdout))
    assert min(spent) < 0.3


# what the vocabulary calls otherwise
OFF_LIST = {
    "h0",
    "ht",
    "hidden",
    "seqlen",
    "seq_len",
    "n_layer",
    "n_head",
    "num_heads",
    "num_layers",
    "dim",
    "hidden_size",
}


def test_public_signatures_use_the_vocabulary():
    from seqzoo.mixer import _registry

    public = [getattr(ops, name) for name in dir(ops) if callable(getattr(ops, name)) and not name.startswith("_")]
    public += [entry.mixer.__init__ for entry in _registry.values()]
    for function in public:
        for parameter in inspect.signature(function).parameters.values():
            assert parameter.name not in OFF_LIST, f"{function.__qualname__}({parameter.name})"
            kinds = (parameter.VAR_KEYWORD,) if function.__module__ != "torch" else ()
            assert parameter.kind not in kinds, f"{function.__qualname__} swallows unknown arguments"


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_the_project_speaks_of_itself_alone():
    words = ["/wo" + "rk/", "/ro" + "ot/", "TO" + "DO", "FIX" + "ME", "http://local" + "host"]
    for path in tracked():
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", "") and path.name != "LICENSE":
            text = path.read_text(errors="ignore")
            for word in words:
                assert word not in text, f"{path.relative_to(ROOT)} says {word}"
