"""What a program with a quantised key/value cache is fed in place of an empty float one."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompile.calibration.inputs import Arrays
from qcompile.errors import UserError
from qcompile.graph.caches import SCALE, ZERO_POINT


def fed(session: Any, feeds: Arrays) -> Arrays:
    """Those of ``feeds`` that ``session`` takes; an empty float past becomes empty codes, scales and zero points.

    Raises UserError for a float past of any tokens: only the program itself can make its codes.
    """
    inputs = {item.name: item for item in session.get_inputs()}
    given = {name: array for name, array in feeds.items() if name in inputs}
    for name in [name for name in inputs if name + SCALE in inputs and name + SCALE not in given and name in given]:
        sides = given[name].shape[:3]
        if 0 not in sides:
            hint = "start from an empty past, or from what an earlier run of this program gave as the present"
            raise UserError(f"'{name}' is a float past of {sides[2]} tokens, and the cache is quantised", hint=hint)
        given[name] = np.zeros([*sides, inputs[name].shape[3]], np.uint8)
        given[name + SCALE] = np.zeros([*sides, 1], np.float32)
        given[name + ZERO_POINT] = np.zeros([*sides, 1], np.uint8)
    return given
