"""What the code knows of README.md and the pages in docs/: ``python -m tests.house.readme_sections`` writes it anew.

A part stands between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``; whatever is there is replaced.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.summary import summary
from benchmarks.tables import all_results, committed, table
from qcompile.commands.tables import pass_options

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PASSES_PAGE = ROOT / "docs" / "passes.md"


def passes() -> str:
    """One row a pass: its name, the first line of its file's docstring, its claim and its options."""
    from qcompile.pipeline import PASSES

    return table(("pass", "what it does", "keeps", "options"), map(_pass_row, PASSES, PASSES.values()))


def _pass_row(name: str, address: str) -> tuple[str, str, str, str]:
    contract, cls = _documented(address)
    options = ", ".join(f"`{option.spelled}`" for option in pass_options(cls))
    return f"`{name}`", contract.partition("\n")[0], cls.preserves, options


def _documented(address: str) -> tuple[str, Any]:
    """The docstring of a pass's file, which is its contract, and its class."""
    module_name, _, attribute = address.partition(":")
    module = importlib.import_module(module_name)
    return module.__doc__ or "", getattr(module, attribute)


def passes_page() -> str:
    """docs/passes.md: one heading a pass, its contract as its file states it, and its options."""
    from qcompile.pipeline import PASSES

    lead = "Each pass's contract, from its file. What it does to the outputs is measured whenever it runs."
    parts = [f"# Passes\n\n{lead}"]
    for name, address in PASSES.items():
        contract, cls = _documented(address)
        first, _, rest = contract.partition("\n")
        parts.append(f"## {name}\n\n{first}\n\n```text\n{rest.strip()}\n```")
        rows = [(f"`{option.spelled}`", option.values, option.meaning) for option in pass_options(cls)]
        if rows:
            parts.append(table(("option", "values", "what for"), rows))
    return "\n\n".join(parts) + "\n"


def recipes() -> str:
    from qcompile.recipe import RECIPES

    return table(("recipe", "what it quantises"), ((f"`{name}`", text) for name, text in RECIPES.items()))


def targets() -> str:
    from qcompile.backends import TARGETS, by_name

    described = ((f"`{name}`", by_name(name).target.description) for name in TARGETS)
    return table(("target", "what it makes"), described)


def command_help() -> str:
    """The text of ``qcompile --help``, 100 columns wide."""
    command = [sys.executable, "-m", "qcompile.cli", "--help"]
    plain = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    shown = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=True)
    return f"```text\n{shown.stdout.strip()}\n```"


Parts = Mapping[str, Callable[[], str]]
PAGES: Mapping[Path, Parts] = {
    README: {"help": command_help, "recipes": recipes, "passes": passes, "targets": targets, "numbers": summary},
    ROOT / "docs" / "benchmarks.md": {"results": all_results},
    ROOT / "docs" / "integer.md": {"operators": lambda: committed("integer_operators")},
    ROOT / "docs" / "kernels.md": {
        "kernels": lambda: committed("kernels"),
        "kernels_amx": lambda: committed("kernels_amx"),
        "cuda": lambda: committed("cuda_kernels"),
    },
    ROOT / "docs" / "tvm.md": {
        "targets": lambda: committed("targets"),
        "decode": lambda: committed("smollm2_decode_tvm"),
    },
}


def filled(text: str, parts: Parts) -> str:
    """``text`` with every part in place. Raises ValueError where a part has no place in it."""
    for name, write in parts.items():
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"there is no place '{begin.strip()}' ... '{end}'")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{write()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for page, parts in PAGES.items():
        page.write_text(filled(page.read_text(), parts))
    PASSES_PAGE.write_text(passes_page())
