"""LLVM's linker for the tests that link."""

from __future__ import annotations

import pytest

from tests.emulated import aarch64, tools


@pytest.fixture(scope="session", autouse=True)
def linker() -> None:
    try:
        tools.put_linker_on_path()
    except aarch64.Missing as error:
        pytest.skip(f"LLVM's linker is not at hand: {error}")
