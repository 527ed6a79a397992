"""What a block is made of, found by running it: no table of architectures, no names.

`observe` sees every multiplication of an activation by a weight. `experiment` runs a block with one thing changed and
writes down what happens. `find` reads off who feeds whom. `proof` decides which of that may be used.
"""

from .experiment import Product, Trace, observe
from .folds import Fold, InputGroup, Producer, Reader, find_groups
from .observe import Weight, watching
from .proof import examine, prove, proved, reversible, run_in_float32
from .runnable import blamed
from .sketch import consulted, sketch

__all__ = [
    "Fold",
    "InputGroup",
    "Producer",
    "Product",
    "Reader",
    "Trace",
    "Weight",
    "blamed",
    "consulted",
    "examine",
    "find_groups",
    "observe",
    "prove",
    "proved",
    "reversible",
    "run_in_float32",
    "sketch",
    "watching",
]
