"""An OpenCL platform for the tests that run programs: this machine's, or PoCL, installed where that is allowed."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from qcompile.backends.opencl import driver

PACKAGES = ("pocl-opencl-icd", "ocl-icd-libopencl1")


@pytest.fixture(scope="session")
def platform() -> str:
    """The name of the device."""
    os.environ.setdefault("POCL_MAX_PTHREAD_COUNT", "1")
    if not driver.present() and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", "--quiet", *command], capture_output=True, check=False)
    found = driver.present()
    if not found:
        pytest.skip(f"there is no OpenCL: {driver.INSTALL}")
    return found
