"""How much memory this process has held at most."""

from __future__ import annotations

import sys


def peak_rss_bytes() -> int | None:
    """Returns the peak resident set size in bytes; None where the system does not count it (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
