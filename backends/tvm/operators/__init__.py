"""Which operator is translated by which function, a file a family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qcompile.backends.tvm.operation import Operation
from qcompile.backends.tvm.operators import elementwise, indexing, products, quantised, rows, shapes
from qcompile.backends.tvm.scopes import Scope

Converter = Callable[[Scope, Operation], Any]

CONVERTERS: dict[str, Converter] = {
    **elementwise.TABLE, **indexing.TABLE, **products.TABLE, **quantised.TABLE, **rows.TABLE, **shapes.TABLE,
}  # fmt: skip
OWN: dict[str, Converter] = {**products.OWN, **quantised.OWN}  # of the project's own domain; others are written out
ELEMENTWISE = frozenset(elementwise.TABLE)
