"""An error that a user can mend says what to do next."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.house.test_imports import ROOT, sources


def hintless(text: str) -> list[int]:
    """The lines where ``UserError`` or ``GateError`` is made without a hint."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func).endswith(("UserError", "GateError"))]
    return [call.lineno for call in made if not any(word.arg == "hint" for word in call.keywords)]


@pytest.mark.parametrize("path", sources(), ids=str)
def test_an_error_has_a_hint(path: Path) -> None:
    assert hintless((ROOT / "qcompile" / path).read_text()) == []


def test_a_missing_hint_is_seen() -> None:
    text = "raise UserError('a')\nraise errors.GateError('b', where='c')\nraise UserError('d', hint='e')"
    assert hintless(text) == [1, 2]
