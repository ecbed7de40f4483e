"""README.md says what the code says."""

import re
import tomllib

import pytest

from benchmarks.tables import table
from tests.house.readme_sections import (
    PAGES,
    PARTS,
    PASSES_PAGE,
    README,
    ROOT,
    filled,
    page,
    passes_page,
)


@pytest.mark.parametrize("part", PARTS)
def test_a_generated_part_is_up_to_date(part: str) -> None:
    text = README.read_text()
    assert filled(text, {part: PARTS[part]}) == text, "run: python -m tests.house.readme_sections"


def test_the_page_of_passes_is_up_to_date() -> None:
    assert PASSES_PAGE.read_text() == passes_page(), "run: python -m tests.house.readme_sections"


@pytest.mark.parametrize("name", PAGES)
def test_the_parts_of_a_page_are_up_to_date(name: str) -> None:
    text = page(name).read_text()
    assert filled(text, PAGES[name]) == text, "run: python -m tests.house.readme_sections"


def test_a_stale_part_is_replaced_and_the_rest_is_kept() -> None:
    text = "a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb\n"
    expected = "a\n<!-- begin: x -->\nnew \\1\n<!-- end: x -->\nb\n"
    assert filled(text, {"x": lambda: "new \\1"}) == expected
    assert filled(expected, {"x": lambda: "new \\1"}) == expected
    with pytest.raises(ValueError, match="no place"):
        filled("a", {"x": lambda: "new"})


def test_a_bar_in_a_cell_is_escaped() -> None:
    assert table("ab", [("x|y", "z")]) == "| a | b |\n| --- | --- |\n| x\\|y | z |"


def test_the_two_commands_of_the_first_screen_are_make_targets_and_ci_runs_both() -> None:
    block = re.search(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    commands = [line.split("#")[0].strip() for line in block[1].splitlines()]
    assert commands == ["make demo", "make test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    run_by_ci = {line.partition("#")[0].strip() for line in (ROOT / ".ci/run").read_text().splitlines()}
    assert set(commands) <= run_by_ci


def test_every_extra_is_explained() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| (`.*?) \|", README.read_text().partition("## Install only")[2], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == extras.keys() - {"dev"}
