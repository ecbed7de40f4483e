"""``python -m qcompile``: the command, where its script is not on PATH."""

import sys

from qcompile.cli import main

sys.exit(main())
