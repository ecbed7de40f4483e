"""An ARM processor computes the same bits as this machine's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.emulated import aarch64
from tests.emulated.digests import digest, outputs
from tests.integer.programs import exposed, texts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("recipe", ("w8a8_static", "w8a8"))
@pytest.mark.parametrize("name", ("bert", "llama"))
def test_an_integer_program_gives_the_same_bits(name: str, recipe: str, tmp_path: Path) -> None:
    program, feeds = exposed(name, recipe), texts(2, 13)
    feeds["attention_mask"][1, 9:] = 0
    np.savez(tmp_path / "feeds.npz", allow_pickle=False, **feeds)
    script = Path(aarch64.__file__).with_name("digests.py")
    try:
        printed = aarch64.run(script, str(program), str(tmp_path / "feeds.npz"))
    except aarch64.Missing as error:
        pytest.skip(str(error))
    expected = {output: digest([array]) for output, array in outputs(program, feeds).items()}
    assert dict(line.split() for line in printed.splitlines()) == expected
    assert len(expected) == 2  # the integers and their floats
