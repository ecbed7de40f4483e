"""Options that several verbs share, spelled once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

COUNT, BOUND = click.IntRange(min=1), click.FloatRange(min=0)
COUNT.name, BOUND.name = "whole number", "number"  # what an error calls them

_CALIBRATION = (
    click.option("--calib", type=click.Path(path_type=Path), metavar="PATH",
                 help="Calibration data: .npz, a folder of them, .txt or .jsonl."),
    click.option("--tokenizer", type=click.Path(path_type=Path), metavar="DIR",
                 help="Folder with tokenizer.json; one beside the model is found."),
    click.option("--samples", type=COUNT, default=128, show_default=True, metavar="N",
                 help="Calibration samples at most."),
    click.option("--length", type=COUNT, default=512, show_default=True, metavar="N",
                 help="Tokens per sample at most."),
)  # fmt: skip


def calibration(command: Command) -> Command:
    """--calib, --tokenizer, --samples, --length."""
    for option in reversed(_CALIBRATION):
        command = option(command)
    return command


def debug(command: Command) -> Command:
    """--debug; read by ``main``, which is where errors are printed."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")(command)


def with_past(command: Command) -> Command:
    return click.option(
        "--with-past", is_flag=True, help="Export a Hugging Face decoder with its key/value cache."
    )(command)


def allow_pickle(command: Command) -> Command:
    return click.option(
        "--allow-pickle", is_flag=True, help="Load .bin weights, which can run code of whoever made them."
    )(command)
