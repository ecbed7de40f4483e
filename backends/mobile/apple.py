"""The folders around a library that Apple's tools want: a framework in an xcframework."""

from __future__ import annotations

import plistlib
from pathlib import Path
from typing import Any

from qcompile.backends.mobile.link import System


def write_framework(folder: Path, system: System) -> None:
    """Write what stands around the library of ``system`` in ``folder``: the two lists of properties."""
    assert system.platform is not None
    simulator = system.platform[0] == "ios-simulator"
    library: dict[str, Any] = {
        "BinaryPath": "Kernels.framework/Kernels",
        "LibraryIdentifier": system.slice,
        "LibraryPath": "Kernels.framework",
        "SupportedArchitectures": ["arm64"],
        "SupportedPlatform": "ios",
    }
    if simulator:
        library["SupportedPlatformVariant"] = "simulator"
    outer = {"AvailableLibraries": [library], "CFBundlePackageType": "XFWK", "XCFrameworkFormatVersion": "1.0"}
    inner = {
        "CFBundleExecutable": "Kernels",
        "CFBundleIdentifier": "nn.qcompile.kernels",
        "CFBundleInfoDictionaryVersion": "6.0",
        "CFBundleName": "Kernels",
        "CFBundlePackageType": "FMWK",
        "CFBundleShortVersionString": "1.0",
        "CFBundleSupportedPlatforms": ["iPhoneSimulator" if simulator else "iPhoneOS"],
        "CFBundleVersion": "1",
        "MinimumOSVersion": system.platform[1],
    }
    place = (folder / system.library).parent
    for path, content in ((place.parents[1] / "Info.plist", outer), (place / "Info.plist", inner)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plistlib.dumps(content))
