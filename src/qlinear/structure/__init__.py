"""What a block is made of, found by running it: no table of architectures, no names.

`observe` runs a block and writes down every multiplication of an activation by a weight. `find` makes such runs
with one thing changed and reads off who feeds whom. `proof` decides which of that may be used.
"""

from .folds import Fold, InputGroup, Producer, Reader, find_groups
from .observe import Product, Trace, Weight, observe, watching
from .proof import examine, prove, proved, run_in_float32
from .sketch import sketch

__all__ = [
    "Fold",
    "InputGroup",
    "Producer",
    "Product",
    "Reader",
    "Trace",
    "Weight",
    "examine",
    "find_groups",
    "observe",
    "prove",
    "proved",
    "run_in_float32",
    "sketch",
    "watching",
]
