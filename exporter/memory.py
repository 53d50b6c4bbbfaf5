"""How much memory this process has held at most."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_rss_bytes() -> int | None:
    """Returns the peak resident set size in bytes; None where the system does not count it (Windows)."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would not do: across exec it keeps the peak of the process that forked this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
