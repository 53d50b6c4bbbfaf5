"""Bundles as one uncompressed zip, sealed by a digest of the file in its comment; docs/bundle.md is the format."""

from __future__ import annotations

import errno
import hashlib
import shutil
import stat
import zipfile
from pathlib import Path

from engines import artifacts
from engines.artifacts import MANIFEST, MAX_MANIFEST_BYTES
from engines.errors import UserError

MARK = b"export-engine sha256 "  # of a zip's comment, before the digest of all that comes before it
DIGEST_CHARACTERS = 64
CHUNK = 1 << 20
UNREADABLE = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError)  # the second: of features we do not write
NO_SUCH_PLACE = (errno.EINVAL, errno.EEXIST, errno.ENOTDIR)  # before the file's start; of a name both file and folder


def is_packed(path: Path) -> bool:
    """Whether a file ends as a bundle's zip does."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - DIGEST_CHARACTERS - len(MARK)))
        return file.read(len(MARK)) == MARK


def pack(folder: Path, path: Path) -> None:
    """Writes a bundle's folder as one uncompressed zip, sealed by the digest in its comment, always the same bytes."""
    with artifacts.replacing(path) as temporary:
        _write_zip(folder, temporary)


def _write_zip(folder: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(file.relative_to(folder).as_posix())  # its time is 1980's first day
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            entry.file_size = file.stat().st_size
            with file.open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, CHUNK)
        archive.comment = MARK + artifacts.NO_DIGEST.encode()
    digest = digest_of_zip(path)
    with path.open("r+b") as written:
        written.seek(-DIGEST_CHARACTERS, 2)
        written.write(digest.encode())


def digest_of_zip(path: Path) -> str:
    """Returns the sha256 of a file but for its last 64 bytes."""
    left = path.stat().st_size - DIGEST_CHARACTERS
    found = hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(CHUNK, left))):
            found.update(part)
            left -= len(part)
    return found.hexdigest()


def unpack(path: Path, folder: Path) -> None:
    """Unpacks a sealed zip of plain, uncompressed files; nothing of it is written outside `folder`."""
    try:
        with artifacts.writing_errors(folder), zipfile.ZipFile(path) as archive:
            if archive.comment[:-DIGEST_CHARACTERS] != MARK:
                raise UserError(f"{path}: is a zip, but no bundle of ours", fix="give what `bundle --zip` wrote")
            if digest_of_zip(path).encode() != archive.comment[-DIGEST_CHARACTERS:]:
                raise UserError(f"{path}: was changed after it was written", fix="get it, or make it, again")
            entries = archive.infolist()
            _check_entries(path, entries)
            for entry in entries:
                target = artifacts.inside(folder, entry.filename)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("xb") as written:
                    shutil.copyfileobj(source, written, CHUNK)
    except (OSError, *UNREADABLE) as error:
        if isinstance(error, OSError) and error.errno not in NO_SUCH_PLACE:
            raise
        raise UserError(f"{path}: no zip that can be read ({error})", fix="get it, or make it, again") from error


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if MANIFEST not in names:
        raise UserError(f"{path}: holds no {MANIFEST}", fix="give what `bundle --zip` wrote")
    total, twice = sum(entry.file_size for entry in entries), len(set(names)) < len(names)
    for entry in entries:
        plain = stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG) and entry.filename[-1:] not in ("", "/")
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        if not plain or not stored or entry.flag_bits & 1 or twice:
            raise UserError(
                f"{path}: {entry.filename!r} is a folder, a link, packed or locked, has no name, or names occur twice",
                fix="do not use this file: it was damaged or tampered with; get it, or make it, again",
            )
        if entry.filename == MANIFEST and entry.file_size > MAX_MANIFEST_BYTES:
            raise UserError(f"{path}: its {MANIFEST} has {entry.file_size} bytes", fix="this is no bundle of ours")
    if total > path.stat().st_size:
        raise UserError(
            f"{path}: declares {total} bytes, more than it holds", fix="do not use this file: it was tampered with"
        )
