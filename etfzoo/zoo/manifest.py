"""`assets.extra/files.json`: the hash and size of every other file of a published version.

    {"format": 1, "files": {"saved_model.pb": {"sha256": "<64 hex digits>", "size": 123}, ...}}

What it guarantees: the folder holds the listed files and nothing else, each with the bytes that
were published, all of them plain files below the folder. files.json itself is read only in exactly
the bytes that `write` would give its content, so that no byte of it can change unnoticed either:
each is part of a name, a size or a hash, which is compared, or of the form, which is fixed.

What it cannot guarantee: who wrote it. Whoever can write files and files.json together can publish
another model; the index (`etfzoo.zoo.index`) and the pin of a URL (`#sha256=`) are there against
that.
"""

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from etfzoo import files, internals
from etfzoo.errors import EtfzooError, first_line

FORMAT = 1
NAME = "assets.extra/files.json"
MAX_BYTES = 1 << 20

# TensorFlow's names, what belongs to a version, and nothing that is hidden or spells otherwise on
# another system.
_ALLOWED = re.compile(
    r"saved_model\.pb|fingerprint\.pb|README\.md"
    r"|variables/variables\.(index|data-[0-9]{5}-of-[0-9]{5})"
    r"|assets(\.extra)?(/[A-Za-z0-9_]([A-Za-z0-9_.-]{0,98}[A-Za-z0-9_-])?){1,3}"
)
_REQUIRED = ("saved_model.pb", "variables/variables.index", "assets.extra/etfzoo.json")
# Of what is read as a whole before it is known to be a model.
_LARGEST = {
    "assets.extra/etfzoo.json": files.MAX_DOCUMENT,
    "README.md": files.MAX_DOCUMENT,
    "variables/variables.index": internals.MAX_INDEX,
}
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Entry(NamedTuple):
    """What is known of a file beforehand."""

    sha256: str
    size: int


def write(folder) -> None:
    """Writes files.json for all files that are in a version folder; its last file.

    Raises:
        EtfzooError: a file that does not belong into a version folder.
    """
    folder = Path(folder)
    listing = {
        name: Entry(sha256(folder / name), (folder / name).stat().st_size)
        for name in sorted(_walk(folder))
        if name != NAME
    }
    content = _text(check_listing(as_json(listing), folder))
    files.write_text(folder / NAME, content)


def read(folder) -> dict[str, Entry] | None:
    """The listing of a version folder; None where it has none (older than files.json).

    Raises:
        EtfzooError: see `parse`.
    """
    path = Path(folder) / NAME
    if not os.path.lexists(path):
        return None
    try:
        with files.open_regular(path, follow=False) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise EtfzooError(f"{path} cannot be read: {e.strerror or e}") from e
    return parse(content, path)


def parse(content: bytes, where) -> dict[str, Entry]:
    """The listing in the bytes of a files.json.

    Args:
        content: the file.
        where: its path or address, for errors.

    Raises:
        EtfzooError: not exactly what `write` writes, a later format, or names that are not allowed.
    """
    if len(content) > MAX_BYTES:
        raise EtfzooError(f"{where} is larger than {MAX_BYTES} bytes: not a list of files")
    try:
        document = files.parse_json(content)
    except ValueError as e:
        raise EtfzooError(f"{where} is damaged: {first_line(e)}") from e
    if not isinstance(document, dict) or type(document.get("format")) is not int:
        raise EtfzooError(f"{where} is no list of files: it has no format number")
    if document["format"] > FORMAT:
        raise EtfzooError(
            f"{where} has format {document['format']}, and this etfzoo reads up to {FORMAT}: "
            "upgrade etfzoo"
        )
    listing = check_listing(document.get("files"), where)
    if NAME in listing or _text(listing).encode() != content:
        raise EtfzooError(f"{where} is damaged: it is not as etfzoo writes it")
    return listing


def check_listing(document, where) -> dict[str, Entry]:
    """A listing from its JSON form, with names, hashes and sizes checked.

    Raises:
        EtfzooError: says what is wrong.
    """
    if not isinstance(document, dict):
        raise EtfzooError(f"{where} has no list of files")
    listing = {}
    for name, entry in document.items():
        if not _ALLOWED.fullmatch(name):
            raise EtfzooError(f"{where} lists {name[:200]!r}, which is no file of a model: refused")
        if not isinstance(entry, dict) or entry.keys() != {"sha256", "size"}:
            raise EtfzooError(f"{where} lists {name} without sha256 and size")
        digest, size = entry["sha256"], entry["size"]
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise EtfzooError(f"{where} has no sha256 for {name}")
        if type(size) is not int or size < 0:
            raise EtfzooError(f"{where} has no size for {name}")
        if size > _LARGEST.get(name, size):
            raise EtfzooError(f"{where} lists {name} with {size} bytes: refused")
        listing[name] = Entry(digest, size)
    missing = [name for name in _REQUIRED if name not in listing]
    if missing:
        raise EtfzooError(f"{where} lacks {', '.join(missing)}: not a complete model")
    folded = {name.casefold() for name in listing}
    parents = {parent for name in folded for parent in _parents(name)}
    if len(folded) < len(listing) or folded & parents:
        raise EtfzooError(f"{where} lists two files that would be one: refused")
    return listing


def check_index_listing(document, where) -> dict[str, Entry]:
    """As `check_listing`, for a listing that has files.json among its files."""
    listing = check_listing(document, where)
    if NAME not in listing:
        raise EtfzooError(f"{where} lacks {NAME}: not a complete model")
    return listing


def verify(folder, listing: dict[str, Entry] | None = None) -> bool:
    """Compares a version folder with its listing: names, kinds, sizes and hashes of all files.

    Reading 180 MB for it takes some 0.3 s.

    Args:
        folder: the version folder.
        listing: what to compare with, files.json included; None is the folder's own files.json.

    Returns:
        False where the folder has no files.json, so that nothing could be compared.

    Raises:
        EtfzooError: what differs first.
    """
    folder = Path(folder)
    found = _walk(folder)  # also where nothing can be compared: what is loaded are plain files
    if listing is None and NAME not in found:
        return False
    if listing is None:
        listing = read(folder)
        found -= {NAME}
    for what, names in (
        ("lacks", listing.keys() - found),
        ("holds files that were not published:", found - listing.keys()),
    ):
        if names:
            shown = ", ".join(sorted(n[:200] for n in names)[:3])
            raise EtfzooError(f"{folder} is damaged: it {what} {shown}; copy or publish it again")
    for name, entry in listing.items():
        size = (folder / name).stat().st_size
        if size != entry.size:
            raise _damaged(folder / name, f"it has {size} bytes instead of {entry.size}")
        if sha256(folder / name) != entry.sha256:
            raise _damaged(folder / name, "its sha256 is not the published one")
    return True


def sha256(path) -> str:
    """The hash of a file in hex digits.

    Raises:
        EtfzooError: it cannot be read.
    """
    try:
        with files.open_regular(path, follow=False) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise EtfzooError(f"{path} cannot be read: {e.strerror or e}") from e


def entry_of(path) -> Entry:
    """Hash and size of a file."""
    return Entry(sha256(path), Path(path).stat().st_size)


def as_json(listing: dict[str, Entry]) -> dict:
    """The JSON form of a listing, sorted by name."""
    return {name: listing[name]._asdict() for name in sorted(listing)}


def _text(listing) -> str:
    return json.dumps({"format": FORMAT, "files": as_json(listing)}, indent=1) + "\n"


def _walk(folder) -> set[str]:
    """Relative names of all plain files below a folder."""
    found = set()
    try:
        pending = [folder]
        while pending:
            for item in os.scandir(pending.pop()):
                mode = item.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    pending.append(item.path)
                elif stat.S_ISREG(mode):
                    found.add(Path(item.path).relative_to(folder).as_posix())
                else:
                    kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a plain file"
                    raise EtfzooError(f"{item.path} is {kind}: refused; copy the files themselves")
    except OSError as e:
        raise EtfzooError(f"{folder} cannot be read: {e.strerror or e}") from e
    return found


def _parents(name):
    parts = name.split("/")
    return ("/".join(parts[:i]) for i in range(1, len(parts)))


def _damaged(path, how):
    return EtfzooError(f"{path} is damaged: {how}; copy or publish the folder again")
