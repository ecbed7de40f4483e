"""Packages of the system that some tests need, installed by one process after the other where that is allowed."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def install(*packages: str) -> bool:
    """Ask apt for ``packages``; False where it cannot be asked: no root, no apt."""
    if os.geteuid() or shutil.which("apt-get") is None:
        return False
    with (Path(tempfile.gettempdir()) / "qcompile-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers at once, and the second would be refused
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            subprocess.run(["apt-get", "--quiet", *command], capture_output=True, check=False)
    return True
