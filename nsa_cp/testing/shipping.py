"""Sends functions to other processes as (module, file, name), because test modules are often not importable by name."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class FunctionReference:
    """Where a module-level function is found: its module's name and file, and its qualified name in the module."""

    module: str
    file: str
    qualname: str


def reference_to(function: Callable[..., Any]) -> FunctionReference:
    """The reference under which another process on this machine finds ``function``.

    Raises:
        ValueError: a lambda or a function defined inside another one, which no other process can look up.
    """
    qualname = getattr(function, "__qualname__", None)
    file = getattr(sys.modules.get(getattr(function, "__module__", "")), "__file__", None)
    if qualname is None or file is None or "<" in qualname:
        raise ValueError(
            f"{function!r} cannot be sent to another process: define it with def at the top level of a file and pass what it"
            " needs as arguments"
        )
    return FunctionReference(function.__module__, os.path.abspath(file), qualname)


def resolve(reference: FunctionReference) -> Callable[..., Any]:
    """The function that ``reference`` names, importing its module by name or, where that fails, by file."""
    found: Any = load_module(reference.module, reference.file)
    for part in reference.qualname.split("."):
        found = getattr(found, part)
    return found


def load_module(name: str, file: str) -> ModuleType:
    """The module ``name`` made from ``file``, registered under that name so that its classes can be unpickled.

    Args:
        name: the module's name in the sending process, ``__main__`` included.
        file: absolute path of its source.
    """
    loaded = sys.modules.get(name)
    if loaded is not None and _same_file(getattr(loaded, "__file__", None), file):
        return loaded
    if name != "__main__" and _importable(name, file):
        return importlib.import_module(name)
    # A script must not run its main part again: as in multiprocessing it is executed under another name.
    spec = importlib.util.spec_from_file_location("__mp_main__" if name == "__main__" else name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"no Python module can be loaded from {file}")
    module = importlib.util.module_from_spec(spec)
    _register_parents(name, Path(file))
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _same_file(one: str | None, other: str) -> bool:
    return one is not None and os.path.exists(one) and os.path.samefile(one, other)


def _importable(name: str, file: str) -> bool:
    """Whether ``import name`` would take this very file."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and _same_file(spec.origin, file)


def _register_parents(name: str, file: Path) -> None:
    """Stand-ins for the packages above ``name``: unpickling ``tests.ops.test_x.Case`` imports ``tests`` first."""
    parents = name.split(".")[:-1]
    for depth in range(len(parents), 0, -1):
        package = ".".join(parents[:depth])
        file = file.parent
        if package not in sys.modules:
            stand_in = ModuleType(package)
            stand_in.__path__ = [str(file)]
            sys.modules[package] = stand_in
