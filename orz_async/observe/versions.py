"""What was running: versions for event logs, summaries and bug reports. No host names, no paths."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

import orz_async

PACKAGES = {"torch": "torch", "transformers": "transformers", "numpy": "numpy", "msgspec": "msgspec", "zmq": "pyzmq"}
"""Our short name, and the distribution that is asked: importing torch for its version would cost seconds."""


def versions() -> dict[str, str]:
    """Versions of this package, Python, the libraries that decide results, and the kernel. Absent ones say so."""
    found = {"orz_async": orz_async.__version__, "python": platform.python_version()}
    for name, distribution in PACKAGES.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found | {"os": f"{platform.system()} {platform.release()}", "machine": platform.machine()}


def boot() -> str | None:
    """The same for all processes that share a monotonic clock, and says nothing else about the machine."""
    try:
        return hashlib.sha256(Path("/proc/sys/kernel/random/boot_id").read_bytes()).hexdigest()[:12]
    except OSError:
        return None
