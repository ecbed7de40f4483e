"""Options that the benchmarks share, and how they spell a compilation."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.protocol import PROTOCOLS, Protocol

TARGET = "cpu"
_TARGET = re.compile(r"=(\w+(?:\{[^}]*\})?)$")  # an option of a pass has its "=" inside braces
PLAIN = "plain"  # the calibration of the protocol, without padding
_DATA = {"minilm": "stsb", "smollm2": "wikitext"}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One compilation: RECIPE[:PASS+PASS][@MAX_DROP][=TARGET]. ``passes`` None takes the recipe's default."""

    recipe: str
    passes: str | None
    max_drop: float | None
    target: str = TARGET

    @staticmethod
    def parse(text: str, max_drop: float | None = None) -> Wanted:
        text, target = _TARGET.sub("", text), _TARGET.search(text)
        text, at, drop = text.partition("@")
        recipe, colon, passes = text.partition(":")
        chosen = {"none": ""}.get(passes, passes.replace("+", ",")) if colon else None
        return Wanted(recipe, chosen, float(drop) if at else max_drop, target.group(1) if target else TARGET)

    @property
    def name(self) -> str:
        """As a table shows it."""
        passes = {None: "", "": ", no transform"}.get(self.passes, f", {self.passes}")
        gate = "" if self.max_drop is None else f", --max-drop {self.max_drop:g}"
        target = "" if self.target == TARGET else f", `{self.target}`"
        return f"`{self.recipe}`{passes}{gate}{target}"

    @property
    def settings(self) -> dict[str, Any]:
        """For ``qcompile.compile``."""
        return dataclasses.asdict(self)

    def file(self, model: str) -> str:
        """The folder of its program."""
        parts = (model, self.recipe, self.passes, self.max_drop, self.target)
        return "-".join(str(part) for part in parts if part not in (None, "", TARGET))


def common(parser: argparse.ArgumentParser) -> None:
    """The model, its data, where programs are kept and where results go."""
    parser.add_argument("--model", required=True, choices=PROTOCOLS)
    parser.add_argument("--stsb", type=Path, metavar="DIR", help="of stsb-en-{train,test}.csv (minilm)")
    parser.add_argument("--wikitext", type=Path, metavar="DIR", help="of {valid,test}.txt (smollm2)")
    parser.add_argument("--programs", type=Path, metavar="DIR", help="keep the compiled programs here")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="NAME", help="NAME.json and NAME.md; rows are added to it"
    )


def model(name: str, with_past: bool = False) -> Path:
    """The float export; made in a process of its own, because torch is large."""
    command = [sys.executable, "-m", "qcompile.models", name, *(["--with-past"] if with_past else [])]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return Path(printed.strip().splitlines()[-1]) / "model.onnx"


def data(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Protocol:
    """The protocol of the model; a usage error where its data are not given."""
    option = _DATA[given.model]
    folder = getattr(given, option)
    if folder is None or not folder.is_dir():
        parser.error(f"--model {given.model} needs --{option} DIR, a folder that exists")
    return PROTOCOLS[given.model](folder, model(given.model).parent / "tokenizer.json")


def programs(given: argparse.Namespace, scratch: Path) -> Path:
    """Where programs are written: the folder asked for, or a temporary one."""
    folder: Path = given.programs or scratch / "programs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def shown(module: str, given: argparse.Namespace) -> str:
    """The command to repeat a run: what differs from the defaults, without the folders of this machine."""
    words = [f"python -m benchmarks.{module}"]
    for name, value in vars(given).items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, Path):
            words.append(f"{option} {'NAME' if name == 'out' else 'DIR'}")
        elif value is True:
            words.append(option)
        elif value not in (None, False, ""):
            words.append(f"{option} {value}")
    return " ".join(words)


def load() -> float:
    """Processes that wanted a CPU in the last minute: above 1, times are not to be trusted."""
    return os.getloadavg()[0]
