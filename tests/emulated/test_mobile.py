"""What phones are given, run on an emulated ARM processor: the same bits as here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcompile.backends.mobile import ort_format
from tests.emulated import aarch64
from tests.emulated.digests import digest, outputs
from tests.integer.programs import exposed, texts

pytestmark = pytest.mark.slow
DIGESTS = Path(aarch64.__file__).with_name("digests.py")


@pytest.mark.parametrize("name", ("bert", "llama"))
def test_an_ort_file_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    program, feeds = exposed(name, "w8a8"), texts(2, 13)
    (tmp_path / "model.onnx").write_bytes(program.read_bytes())
    ort_format.convert(tmp_path)
    np.savez(tmp_path / "feeds.npz", allow_pickle=False, **feeds)
    try:
        printed = aarch64.run(DIGESTS, str(tmp_path / "model.ort"), str(tmp_path / "feeds.npz"))
    except aarch64.Missing as error:
        pytest.skip(str(error))
    expected = {output: digest([array]) for output, array in outputs(program, feeds).items()}
    assert dict(line.split() for line in printed.splitlines()) == expected
