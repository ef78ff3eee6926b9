"""What is installed is the whole package, works away from the checkout, and brings no package called `kernels`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
# Prints {module: file} after importing all of them from the folder in argv[1].
IMPORT_ALL = """
import importlib, json, site, sys
site.addsitedir(sys.argv[1])
sys.path.insert(0, sys.argv[1])
modules = {name: importlib.import_module(name) for name in json.loads(sys.argv[2])}
print(json.dumps({name: getattr(module, "__file__", None) or list(module.__path__)[0] for name, module in modules.items()}))
"""


def source_files() -> set[str]:
    """Paths of all modules as they must stand in a wheel: kernels/ inside nsa_cp/."""
    package = (path.relative_to(ROOT) for path in (ROOT / "nsa_cp").rglob("*.py"))
    kernels = (Path("nsa_cp") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py"))
    return {path.as_posix() for path in [*package, *kernels]}


def module_names() -> list[str]:
    """Import names of all modules and of the namespace package of the kernels (these only where there is Triton)."""
    names = {file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in source_files()}
    if importlib.util.find_spec("triton") is None:
        names = {name for name in names if not name.startswith("nsa_cp.kernels.")}
    return sorted(names | {"nsa_cp.kernels"})


def imported_files(folder: Path, cwd: Path) -> dict[str, str]:
    """Where an interpreter that knows only ``folder`` and its own packages finds every module."""
    command = [sys.executable, "-I", "-c", IMPORT_ALL, str(folder), json.dumps(module_names())]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what packaging reads, links kept: building in the checkout itself would leave files there."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("nsa_cp", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, checkout], check=True, timeout=200)
    (built,) = folder.glob("*.whl")
    return built


def test_the_link_is_relative_and_points_at_the_kernels():
    link = ROOT / "nsa_cp" / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_wheel_holds_every_module_once_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert {name for name in package if name.endswith(".py")} == source_files()
    assert {name for name in package if not name.endswith(".py")} == {"nsa_cp/py.typed"}
    assert {name.split("/")[0] for name in package} == {"nsa_cp"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "nsa-cp = nsa_cp.cli.main:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_the_installed_wheel_imports_away_from_the_checkout(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([*PIP, "install", "--no-index", "--no-deps", "--target", target, wheel], check=True, timeout=200)
    assert not (target / "kernels").exists()
    files = imported_files(target, elsewhere)
    assert set(files) == set(module_names())
    outside = {name: file for name, file in files.items() if not Path(file).is_relative_to(target)}
    assert outside == {}


def test_an_editable_install_finds_the_kernels_and_no_plain_kernels(checkout, tmp_path):
    prefix = tmp_path / "prefix"
    command = [*PIP, "install", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", "--prefix", prefix]
    subprocess.run([*command, "-e", checkout], check=True, timeout=200)
    (site_packages,) = prefix.glob("lib*/python*/site-packages")
    code = (
        "import site, sys; site.addsitedir(sys.argv[1]); import nsa_cp.config, nsa_cp.kernels;"
        "print(nsa_cp.config.__file__, list(nsa_cp.kernels.__path__)[0], sys.argv[2] in sys.path)"
    )
    # -S: without this environment's own packages, among which the project may be installed a second time
    command = [sys.executable, "-I", "-S", "-c", code, str(site_packages), str(checkout)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    config, kernels, checkout_on_path = done.stdout.split()
    assert Path(config) == checkout / "nsa_cp" / "config.py"
    assert Path(kernels).resolve() == (checkout / "kernels").resolve()
    assert checkout_on_path == "False"  # it would make the folder kernels/ importable by its plain name


def test_a_plain_clone_finds_the_kernels(checkout):
    code = "import nsa_cp.kernels; print(list(nsa_cp.kernels.__path__)[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == (checkout / "kernels").resolve()
