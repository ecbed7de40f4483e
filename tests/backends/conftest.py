"""An OpenCL platform for the tests that run programs: this machine's, or PoCL, installed where that is allowed."""

from __future__ import annotations

import os

import pytest

from qcompile.backends.opencl import driver
from tests.backends.system import install

PACKAGES = ("pocl-opencl-icd", "ocl-icd-libopencl1")


@pytest.fixture(scope="session")
def platform() -> str:
    """The name of the device."""
    os.environ.setdefault("POCL_MAX_PTHREAD_COUNT", "1")
    found = driver.present() or (install(*PACKAGES) and driver.present())
    if not found:
        pytest.skip(f"there is no OpenCL: {driver.INSTALL}")
    return found
