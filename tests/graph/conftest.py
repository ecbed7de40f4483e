"""Fixtures of the graph tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompile.graph.workspace import Workspace
from tests.graph.models import Library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("canonical"))


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    with Workspace(tmp_path) as held:
        yield held
