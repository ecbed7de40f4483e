"""``python -m qcompile.models minilm|smollm2``: export a packaged model, cached, and print its folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qcompile.errors import QCompileError
from qcompile.models.packaged import PACKAGES, exported


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qcompile.models", description=__doc__)
    parser.add_argument("model", choices=sorted(PACKAGES))
    parser.add_argument("--opset", type=int, default=21)
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--with-past", action="store_true")
    options = parser.parse_args(arguments)
    try:
        print(exported(options.model, opset=options.opset, attention=options.attention, with_past=options.with_past))
    except QCompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
