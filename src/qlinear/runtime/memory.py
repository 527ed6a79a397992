"""Memory use of this process."""

import os
import resource
import sys
from pathlib import Path


def peak_rss() -> int:
    """Peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident() -> int:
    """Resident memory of this process, in bytes; the peak where the system does not report the current value."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return peak_rss()
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
