"""The text of the language study, which every machine with Python has: sources of the installed packages, split by package."""

from __future__ import annotations

import hashlib
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from nsa_cp.training.errors import UserError
from nsa_cp.training.files import write_atomically

PARTS = ("test", "valid", "train")
# Most bytes taken of one file, since a table of data could otherwise fill a whole package's share.
_FILE_BYTES = 1 << 18
_SEPARATOR = b"\n\n"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Describes a text; the bytes themselves come from :func:`read_part`.

    Args:
        digest: hash of all bytes, sixteen hexadecimal digits.
        num_packages, num_bytes: of the parts test, valid, train.
    """

    digest: str
    num_packages: tuple[int, int, int]
    num_bytes: tuple[int, int, int]


def installed_packages() -> Path:
    """The folder that this interpreter's packages are installed in."""
    return Path(sysconfig.get_paths()["purelib"])


def build_corpus(folder: Path, max_bytes: int, held_out: float = 0.04) -> Corpus:
    """Read packages' ``.py`` files until there are ``max_bytes``, and store them where :func:`read_part` finds them.

    Packages are ordered by a hash of their names. The first ones are the test part, until they make up ``held_out`` of
    ``max_bytes``; as many bytes of the next ones are the validation part, all others the training part. No package gives more
    than a quarter of a held-out part. Copies of other packages inside a package (``_vendor``) are left out.

    Args:
        folder: each folder or ``.py`` file in it is a package.

    Raises:
        UserError: too few packages to fill three parts.
    """
    texts: dict[str, list[bytes]] = {part: [] for part in PARTS}
    sizes = dict.fromkeys(PARTS, 0)
    for text in _packages(folder, int(held_out * max_bytes / 4)):
        part = next((p for p in PARTS[:2] if sizes[p] < held_out * max_bytes), "train")
        texts[part].append(text)
        sizes[part] += len(text) + len(_SEPARATOR)
        if sum(sizes.values()) >= max_bytes:
            break
    if not texts["train"]:
        raise UserError(f"{folder} has {sum(map(len, texts.values()))} packages with Python sources; at least 3 are needed")
    joined = {part: _SEPARATOR.join(texts[part]) for part in PARTS}
    digest = hashlib.sha256(b"\0".join(joined[part] for part in PARTS)).hexdigest()[:16]
    for part in PARTS:
        _write_once(_part_file(digest, part), joined[part])
    counts, lengths = (tuple(len(each[part]) for part in PARTS) for each in (texts, joined))
    return Corpus(digest=digest, num_packages=counts, num_bytes=lengths)


@lru_cache(maxsize=8)
def read_part(digest: str, part: str) -> np.ndarray:
    """The bytes of one part of a corpus built on this machine, uint8, read from disk as they are used.

    Raises:
        UserError: there is no such corpus here.
    """
    path = _part_file(digest, part)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; the text {digest} has to be built on this machine first: run nsa-cp study language"
        )
    return np.memmap(path, dtype=np.uint8, mode="r")


def _packages(folder: Path, limit: int) -> Iterator[bytes]:
    """The text of one package after the other, at most ``limit`` bytes each."""
    entries = [entry for entry in folder.iterdir() if entry.is_dir() or entry.suffix == ".py"]
    for entry in sorted(entries, key=lambda e: (zlib.crc32(e.stem.encode()), e.name)):
        files = sorted(entry.rglob("*.py")) if entry.is_dir() else [entry]
        text = _SEPARATOR.join(_contents(files, limit))
        if text:
            yield text[:limit]


def _contents(files: list[Path], limit: int) -> Iterator[bytes]:
    total = 0
    for file in files:
        if any("vendor" in part for part in file.parts) or total >= limit:
            continue
        content = file.read_bytes()[:_FILE_BYTES]
        total += len(content)
        if content.strip():
            yield content


def _part_file(digest: str, part: str) -> Path:
    return Path(tempfile.gettempdir()) / f"nsa_cp_corpus_{digest}" / part


def _write_once(path: Path, content: bytes) -> None:
    if path.is_file() and path.stat().st_size == len(content):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
