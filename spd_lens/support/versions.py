"""Versions of everything that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def library_versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    versions = {"python": platform.python_version()}
    for package in ("spd-lens", "torch", "transformer-lens", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
