"""What a report of a fault should say of the machine."""

from __future__ import annotations

import platform
from typing import Any

import jax

from rlhfjax import checkpoint


def environment() -> dict[str, Any]:
    """Versions and devices, as JSON."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": checkpoint.versions(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
    }
