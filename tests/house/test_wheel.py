"""The wheel holds the package once, under one name, with its data."""

import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's files: building writes beside the sources."""
    copy = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        _copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def names(tree: Path) -> list[str]:
    """What the wheel contains."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", str(tree)]
    subprocess.run(build, capture_output=True, text=True, check=True)
    (wheel,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_file():
        target.write_bytes(source.read_bytes())


def test_the_only_top_level_name_is_qcompile(names: list[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qcompile"}


def sources(tree: Path) -> set[str]:
    """Every file of the package, as the wheel should name it; the links are followed."""
    package = tree / "qcompile"
    folders = [package, *(path for path in package.iterdir() if path.is_dir())]
    found = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    return {path.relative_to(tree).as_posix() for path in found if path.suffix != ".pyc"}


def test_every_file_is_in_once(tree: Path, names: list[str]) -> None:
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert {name for name in names if name.startswith("qcompile/")} == sources(tree)


def test_the_type_marker_is_in(names: list[str]) -> None:
    assert "qcompile/py.typed" in names
