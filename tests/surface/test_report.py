"""report.html: self-contained, complete, the same every time, and safe with any name."""

from __future__ import annotations

import re

import pytest

from qcompile import manifest, report
from qcompile.ledger import Ledger
from qcompile.reporting import plots
from tests.surface.record import ledger, record


def rendered(book: Ledger) -> str:
    return report.render(record(book), [manifest.plain(entry) for entry in book.as_list()])


@pytest.fixture(scope="module")
def html() -> str:
    return rendered(ledger())


def test_the_page_asks_the_network_for_nothing(html: str) -> None:
    addresses = re.findall(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?([^"')\s>]+)""", html)
    assert not [a for a in addresses if not a.startswith("#")]
    assert "<script" not in html


def test_the_page_shows_every_part(html: str) -> None:
    for words in (
        "3.91x", "1 of 2", "31.5 dB", "equal to 3.1e-07 (allowed 1e-05)", "kept float by --max-drop",
        "QLinearMatMul", "/encoder/layer.0/MatMul", "Search for the threshold t", "Channel ranges",
        "0.004", "down.x",
    ):  # fmt: skip
        assert words in html, words


def test_names_are_escaped(html: str) -> None:
    assert "tiny &lt;model&gt;" in html and "<model>" not in html
    assert "share the &lt;bias&gt; of" in html and "<bias>" not in html


def test_there_is_a_plot_of_each_kind(html: str) -> None:
    ranges = min(report.MOST_RANGES, 6)
    assert html.count("<svg") == 1 + ranges + 1


def test_the_page_is_the_same_every_time(html: str) -> None:
    assert rendered(ledger()) == html


def test_without_matplotlib_the_tables_stand_and_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    page = rendered(ledger())
    assert "<svg" not in page and "qcompile-nn[report]" in page
    assert "layer.5.dense" in page and "chosen t" in page


def test_a_record_with_nothing_in_it_renders() -> None:
    empty = record() | {"kernels": [], "layers": [], "gate": None, "passes": []}
    page = report.render(empty, [])
    assert "No pass skipped a place" in page
