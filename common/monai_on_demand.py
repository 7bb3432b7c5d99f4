"""MONAI loads what is used of it: a start in tenths of a second in place of seconds.

`import monai` executes all of its modules, and with them scikit-image, matplotlib, pydicom and MLflow
wherever they are installed; a network and a sliding window need few of them. Once
`load_monai_on_demand` was called, MONAI's own `__init__` runs without its walk through all modules,
and what the `__init__` of another of its packages only hands on (`from .module import name`, not used
there itself) is loaded when it is first asked for (PEP 562). All other modules are MONAI's, untouched, so
every class and function is the same one. Packages of MONAI are found as its attributes, and names
by `import *` and `dir`, as before.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

WALK = "load_submodules"  # what MONAI's own `__init__` calls to load everything


def load_monai_on_demand() -> None:
    """For this process; without effect on what of MONAI is loaded already."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "monai":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.submodule_search_locations and type(spec.loader) is SourceFileLoader:
            spec.loader = _PackageLoader(fullname, spec.loader.path)
        return spec


class _PackageLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        self._tree = ast.parse(self.get_data(self.path), self.path)
        if module.__name__ == "monai":
            self._tree.body = [part for part in self._tree.body if not _is_walk(part)]
            module.__getattr__ = _package_of(module)  # type: ignore[method-assign]
            super().exec_module(module)
        else:
            names = _take_out(self._tree)
            _hand_on(module, names)
            super().exec_module(module)
            _all_names(module, list(names))

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._tree, self.path)  # never from or to a file that others use


def _is_walk(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(call := statement.value, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == WALK
    )


def _take_out(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """The names that the package only hands on -> (module, name there); `tree` is left without them."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    handed_on: dict[str, tuple[str, str]] = {}
    for statement in list(tree.body):
        if not isinstance(statement, ast.ImportFrom) or statement.level != 1:
            continue
        names = {alias.asname or alias.name: alias.name for alias in statement.names}
        if statement.module and "*" not in names and not used.intersection(names):
            handed_on |= {name: (statement.module, there) for name, there in names.items()}
            tree.body.remove(statement)
    return handed_on


def _hand_on(package: ModuleType, names: dict[str, tuple[str, str]]) -> None:
    def load(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        module, there = names[name]
        value = getattr(import_module(f"{package.__name__}.{module}"), there)
        setattr(package, name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(package), *names})

    package.__getattr__ = load  # type: ignore[method-assign]
    package.__dir__ = listed  # type: ignore[method-assign]


def _all_names(package: ModuleType, names: Sequence[str]) -> None:
    """What `import *` takes, where the package itself does not say."""
    if not hasattr(package, "__all__"):
        found = {*vars(package), *names}
        package.__all__ = sorted(n for n in found if not n.startswith("_"))  # type: ignore[attr-defined]


def _package_of(monai: ModuleType) -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        if not name.startswith("_"):
            full = f"{monai.__name__}.{name}"
            if find_spec(full) is not None:
                return import_module(full)
        raise AttributeError(f"module {monai.__name__!r} has no attribute {name!r}")

    return load
