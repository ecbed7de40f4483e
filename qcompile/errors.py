"""Errors that a user can act on: what went wrong, where, and a hint.

Exit codes (a contract): 1 a gate failed, 2 the user's mistake, 3 a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QCompileError(Exception):
    """Base of every error that qcompile raises on purpose."""

    exit_code = 3

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class UserError(QCompileError):
    """The input, an option or the environment is not what the command needs."""

    exit_code = 2


class GateError(QCompileError):
    """A measured figure missed the bound that the user set."""

    exit_code = 1


class ContractError(QCompileError):
    """A pass broke the contract that it declares: a bug, never the user's fault."""

    exit_code = 3


def unknown_name(kind: str, word: str, known: Iterable[str]) -> UserError:
    """The error for a misspelt pass, recipe, target or option, with the nearest known names."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
    return UserError(f"unknown {kind} '{word}'", hint=hint)
