"""Progress: quick work is silent, long work says so, and everything goes to stderr."""

from __future__ import annotations

import time

import pytest

from qcompile import progress


def test_quick_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track([1, 2, 3], "counting")) == [1, 2, 3]
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == ""


def test_long_work_says_when_it_starts_and_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 0.01)
    with progress.step("thinking"):
        time.sleep(0.2)
    shown = capsys.readouterr()
    first, last = shown.err.splitlines()
    assert shown.out == "" and first == "thinking ..." and last.startswith("thinking: done in 0.")


def test_a_bar_is_shown_on_a_terminal_and_taken_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 0.01)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    for _ in progress.track(range(2), "bars [of] gold"):
        time.sleep(0.2)
    shown = capsys.readouterr()
    assert shown.out == "" and "bars [of] gold" in shown.err
    assert progress._SCREEN._display is None
