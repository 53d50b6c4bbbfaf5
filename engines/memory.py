"""How much memory a process has held at most, and how much the machine has."""

from __future__ import annotations

import os
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


def total_bytes() -> int | None:
    """Returns the machine's memory, or what a container is allowed of it; None where the system does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):  # Windows
        return None
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return min(found, int(allowed)) if allowed.isdecimal() else found
