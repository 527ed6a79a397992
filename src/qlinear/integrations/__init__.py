"""What makes other libraries load a quantized checkpoint: a file for each, and `connect`, which registers them.

`import qlinear` imports none of these libraries. `connect` waits until one is imported, then registers with it.
"""

from .on_import import call_after_import


def connect() -> None:
    """Register with transformers: now where it has been imported already, else once it is."""
    call_after_import("transformers.quantizers.auto", _connect_transformers)


def _connect_transformers() -> None:
    from .transformers import register

    register()
