"""Hashes, and files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import BinaryIO

from configs.errors import ConfigError


def hashed(*parts: object) -> str:
    """128 bits of a hash of the parts, in hexadecimal digits."""
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def checksum(path: str | Path) -> str:
    """The same hash of a file's content."""
    try:
        with open(path, "rb") as file:
            return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; check the file and its permissions"
        ) from error


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def remedy(error: OSError) -> str:
    """What to do about a file that could not be written."""
    return f"{'free space' if error.errno in FULL else 'mend it'}, then go on with resume=auto"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an OSError that does not, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def sealed(path: Path) -> Iterator[BinaryIO]:
    """Write a file: whatever happens, even a power cut, `path` holds all of it or does not change.
    ConfigError when the disk is full."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ConfigError(
            f"{path.parent} is full ({error.strerror}): free space, then go on with the same command;"
            " what is done stays"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)
