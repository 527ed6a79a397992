"""How much memory the process holds."""

import os
import resource
import sys
from pathlib import Path


def peak_rss() -> int:
    """The most memory that this process has had resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident() -> int:
    """The memory that this process has resident, in bytes; the most that it had where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return peak_rss()
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
