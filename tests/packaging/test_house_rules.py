"""Rules of the house that a parser can check: size of files and functions, docstrings, annotations, oldest syntax."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_LINE_LENGTH = 500, 80, 130
SELF = Path(__file__).resolve()


def python_files(*folders: str) -> list[Path]:
    """Source files below ``folders``, links not followed."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if path.is_relative_to(ROOT / "kernels") or "kernels" not in _inside_package(path))


def _inside_package(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).parts
    return parts[1:2] if parts[0] == "nsa_cp" else ()


def public_functions(tree: ast.Module):
    """``(function, is_method)`` for the functions and methods that others may call; those inside functions are private."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield member, True
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield node, False


def is_triton_kernel(function: ast.FunctionDef) -> bool:
    """Triton's and Gluon's functions take pointers and compile-time constants: their parameters have no useful type."""
    names = [ast.unparse(decorator) for decorator in function.decorator_list]
    return any("triton." in name or "gluon." in name or name == "jit" for name in names)


def faults(source: str, in_kernels: bool = False) -> list[str]:
    """What the rules forbid in a file of the package, one line each."""
    tree = ast.parse(source, feature_version=(3, 10))
    found = [] if ast.get_docstring(tree) or not tree.body else ["the module has no docstring"]
    for function, is_method in public_functions(tree):
        name, special = function.name, function.name.startswith("__") and function.name.endswith("__")
        if is_method and (name.startswith("_") and not special or _serves_autograd(function)):
            continue
        if not special and ast.get_docstring(function) is None:
            found.append(f"{name} (line {function.lineno}) has no docstring")
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        bare = [a.arg for a in [*named, arguments.vararg, arguments.kwarg] if a is not None and a.annotation is None]
        static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
        if is_method and not static and named and named[0].arg in bare:
            bare.remove(named[0].arg)
        if bare and not is_triton_kernel(function):
            found.append(f"{name} (line {function.lineno}): no annotation of {', '.join(bare)}")
        if function.returns is None and not is_triton_kernel(function):
            found.append(f"{name} (line {function.lineno}): no annotation of the result")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not in_kernels:
            if (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                found.append(f"{node.name} (line {node.lineno}) is {length} lines long, limit {MAX_FUNCTION_LINES}")
        if isinstance(node, ast.ExceptHandler) and _swallows(node):
            found.append(f"line {node.lineno} swallows every error")
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            found.append(f"line {node.lineno} is not implemented")
    return found


def _serves_autograd(function: ast.FunctionDef) -> bool:
    """The static methods of a torch.autograd.Function: its apply calls them, nobody else, and it has the docstring."""
    names = [argument.arg for argument in function.args.args]
    return function.name in ("forward", "backward", "setup_context") and names[:1] == ["ctx"]


def _swallows(handler: ast.ExceptHandler) -> bool:
    broad = handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException")
    return broad and all(isinstance(statement, ast.Pass) for statement in handler.body)


def text_faults(source: str) -> list[str]:
    """What the rules forbid in any Python file, tests included."""
    lines = source.splitlines()
    found = [f"{len(lines)} lines, limit {MAX_FILE_LINES}"] if len(lines) > MAX_FILE_LINES else []
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE_LENGTH:
            found.append(f"line {number} has {len(line)} characters, limit {MAX_LINE_LENGTH}")
        if re.search(r"\b(TODO|FIXME|XXX)\b", line):
            found.append(f"line {number} leaves work undone: {line.strip()}")
    return found


@pytest.mark.parametrize("path", python_files("nsa_cp", "kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_keeps_the_rules(path):
    found = faults(path.read_text(encoding="utf-8"), path.is_relative_to(ROOT / "kernels"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", python_files("nsa_cp", "kernels", "tests", "launch"), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_keeps_the_rules(path):
    if path.resolve() == SELF:
        return  # it spells out what it looks for
    source = path.read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 10))
    found = text_faults(source)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("x = 1", "no docstring"),
        ('"""m"""\ndef f() -> None:\n    pass', "f (line 2) has no docstring"),
        ('"""m"""\ndef f(a, b: int) -> None:\n    """d"""', "no annotation of a"),
        ('"""m"""\ndef f(*, a) -> None:\n    """d"""', "no annotation of a"),
        ('"""m"""\ndef f(a: int):\n    """d"""', "no annotation of the result"),
        ('"""m"""\nclass A:\n    def f(self, a) -> None:\n        """d"""', "no annotation of a"),
        ('"""m"""\nclass A:\n    def __init__(self, a) -> None: ...', "no annotation of a"),
        ('"""m"""\ntry:\n    f()\nexcept Exception:\n    pass', "line 4 swallows"),
        ('"""m"""\nraise NotImplementedError', "not implemented"),
        ('"""m"""\ndef _f():\n' + "    x = 1\n" * 80, "81 lines long"),
    ],
)
def test_the_checker_catches(source, fault):
    found = faults(source)
    assert len(found) == 1 and fault in found[0]


def test_the_checker_catches_text_and_syntax():
    assert len(text_faults("x = 1\n" * 501)) == 1
    assert len(text_faults("x" * 131)) == 1
    assert len(text_faults("# TODO: later")) == 1
    with pytest.raises(SyntaxError):
        faults("type X = int")
