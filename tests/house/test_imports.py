"""Imports run one way, and the heavy packages stay behind the doors that lead to them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A module may import its own layer and those below it.
LAYERS: list[set[str]] = [
    {"", "environment", "errors", "progress"},  # "" is the package itself: who imports it gets its version
    {"graph", "quant"},
    {"pipeline", "ledger", "manifest", "recipe"},
    {"block", "calibration", "capture", "difference", "instruments", "integer", "proof", "training"},
    {"passes"},
    {"backends", "models"},
    {"acceptance", "intake", "planning", "publish", "report", "reporting"},
    {"driver", "generation", "roofline", "verification"},
    {"__main__", "cli", "commands"},
]
LAYER_OF = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}

# Package -> where it may be imported, as prefixes of a path below qcompile/.
CONFINED: dict[str, tuple[str, ...]] = {
    "torch": ("block/", "models/", "training/", "capture/torch_", "capture/hf_folder.py"),
    "tvm": ("backends/",),
    "tvm_ffi": ("backends/",),
}


def sources() -> list[Path]:
    """Every module of the package, as a path below qcompile/; the links are followed."""
    package = ROOT / "qcompile"
    folders = [package, *(path for path in package.iterdir() if path.is_dir())]
    found = {path for folder in folders for path in folder.glob("*.py" if folder == package else "**/*.py")}
    return sorted(path.relative_to(package) for path in found)


def part_of(module: str) -> str:
    """``qcompile.graph.sites`` -> ``graph``; ``qcompile`` -> the empty name."""
    return [*module.split("."), ""][1]


def imported(tree: ast.AST, package: list[str]) -> Iterator[tuple[str, int]]:
    """Absolute names that the code imports anywhere, but under ``if TYPE_CHECKING``, with their lines."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        for node in tree.orelse:
            yield from imported(node, package)
        return
    if isinstance(tree, ast.Import):
        yield from ((alias.name, tree.lineno) for alias in tree.names)
    elif isinstance(tree, ast.ImportFrom):
        base = package[: len(package) - tree.level + 1] if tree.level else []
        source = ".".join([*base, *filter(None, [tree.module])])
        yield from ((f"{source}.{alias.name}", tree.lineno) for alias in tree.names)
    elif isinstance(tree, ast.Call) and ast.unparse(tree.func).endswith(("import_module", "__import__")):
        literal = (arg.value for arg in tree.args[:1] if isinstance(arg, ast.Constant))
        yield from ((name, tree.lineno) for name in literal if isinstance(name, str))
    for child in ast.iter_child_nodes(tree):
        yield from imported(child, package)


def complaints(path: Path, text: str) -> list[str]:
    """What the file at ``path`` (below qcompile/) imports against the rules."""
    package = ["qcompile", *path.parts[:-1]]
    here = path.parts[0].removesuffix(".py")
    if here == "__init__":  # the face of the package: its lazy names come from the top layers
        here = "cli"
    if here not in LAYER_OF:
        return [f"{path}: '{here}' has no layer; give it one in {Path(__file__).name}"]
    found = []
    for name, line in imported(ast.parse(text), package):
        reason = _against_order(name, here) if name.split(".")[0] == "qcompile" else _confined(name, path)
        if reason:
            found.append(f"{path}:{line}: imports {name}: {reason}")
    return found


def _against_order(name: str, here: str) -> str:
    there = part_of(name)
    if there not in LAYER_OF:
        there = ""  # from qcompile import __version__
    if LAYER_OF[there] > LAYER_OF[here]:
        return f"'{there}' is above '{here}'"
    if here == there == "passes":
        return "a pass never imports a pass"
    return ""


def _confined(name: str, path: Path) -> str:
    top = name.split(".")[0]
    allowed = CONFINED.get(top)
    if allowed is None or path.as_posix().startswith(allowed):
        return ""
    return f"{top} belongs in {', '.join(allowed)}"


@pytest.mark.parametrize("path", sources(), ids=str)
def test_a_module_keeps_the_rules(path: Path) -> None:
    assert not complaints(path, (ROOT / "qcompile" / path).read_text())


def test_the_links_are_followed() -> None:
    for link in ("passes", "backends", "models"):
        inside = {path.name for path in sources() if path.parts[0] == link}
        assert inside == {path.name for path in (ROOT / link).rglob("*.py")}


@pytest.mark.parametrize(
    ("path", "code", "expected"),
    [
        ("graph/a.py", "from qcompile.passes import b", "above"),
        ("graph/a.py", "from ..pipeline import Pass", "above"),
        ("graph/a.py", "def f():\n    import qcompile.cli", "above"),
        ("passes/a.py", "from qcompile import backends", "above"),
        ("passes/a.py", "from qcompile.passes.b import B", "never imports a pass"),
        ("passes/a.py", "from .b import B", "never imports a pass"),
        ("passes/a.py", "import torch.nn as nn", "torch belongs"),
        ("passes/a.py", "import importlib\nimportlib.import_module('torch')", "torch belongs"),
        ("models/a.py", "from tvm import relax", "tvm belongs"),
        ("novel/a.py", "", "no layer"),
    ],
)
def test_a_breach_is_seen(path: str, code: str, expected: str) -> None:
    assert expected in "\n".join(complaints(Path(path), code))


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("passes/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("passes/a.py", "from qcompile.graph import sites\nfrom qcompile.block.learn import fit"),
        ("capture/torch_model.py", "import torch"),
        ("backends/tvm_cuda.py", "import tvm"),
        ("cli.py", "from qcompile import __version__, driver"),
    ],
)
def test_what_is_allowed_passes(path: str, code: str) -> None:
    assert complaints(Path(path), code) == []


def heavy_after(statement: str) -> str:
    """Which of the heavy packages a fresh interpreter has loaded after ``statement``."""
    heavy = {"torch", "onnxruntime", "tvm", "transformers", "matplotlib"}
    code = f"import sys; {statement}; print(*sorted({heavy!r} & sys.modules.keys()))"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_importing_the_package_is_light() -> None:
    assert heavy_after("import qcompile") == ""
    assert heavy_after("import qcompile.pipeline; qcompile.pipeline.known_passes()") == ""


def test_importing_the_command_is_light() -> None:
    assert heavy_after("import qcompile.cli") == ""
