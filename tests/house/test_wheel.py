"""The wheel holds the package once, under one name, with its data."""

import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a wheel built from a copy of the tree contains (a copy: building writes beside the sources)."""
    work = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        _copy(ROOT / name, work / "tree" / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", work, work / "tree"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (wheel,) = work.glob("*.whl")
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


def sources() -> set[str]:
    """Every file of the package, as the wheel should name it; the links are followed."""
    package = ROOT / "qcompile"
    folders = [package, *(path for path in package.iterdir() if path.is_dir())]
    found = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    return {path.relative_to(ROOT).as_posix() for path in found if path.suffix != ".pyc"}


def test_every_file_is_in_once(names: list[str]) -> None:
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert {name for name in names if name.startswith("qcompile/")} == sources()


def test_the_type_marker_is_in(names: list[str]) -> None:
    assert "qcompile/py.typed" in names
