"""A function that runs once a module has been imported, whoever imports it and whenever.

transformers has no entry point for plugins: a quantizer is registered by a call into it, and importing it takes
seconds. So a finder stands first in `sys.meta_path`. It finds nothing by itself. For its one module it takes the spec
that the other finders give, and has the loader call the function after the module's own code has run. Then it leaves.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def call_after_import(module: str, function: Callable[[], None]) -> None:
    """Call `function` now where `module` has been imported, else right after its first import."""
    if module in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Finder(module, function))


class _Finder(MetaPathFinder):
    def __init__(self, module: str, function: Callable[[], None]) -> None:
        self._module, self._function = module, function

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._function)
        return spec


class _Loader(Loader):
    """The module's own loader, and the function after it."""

    def __init__(self, loader: Loader, function: Callable[[], None]) -> None:
        self._loader, self._function = loader, function

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Later readers of the spec, such as importlib.resources, see the module's own loader.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._function()
