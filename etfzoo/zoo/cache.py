"""Published versions from elsewhere, in a folder of this machine.

The cache is the folder of the environment variable `ETFZOO_HOME`, by default `~/.cache/etfzoo`:

    <name>/<version>/            models of the index, and what the user puts there
    urls/<host_path>-<hash>/     models of an address
    .../.download-<version>/     a download that goes on, or that can be resumed
    .locks/                      an empty file for each download that there was

Every file is checked against a size and a sha256: those of the index for its models; for an
address those of its own `assets.extra/files.json`, which the handle can pin in turn:
`https://host/rn18_etf.mine/1#sha256=<sha256 of files.json>`. Without the pin it is only sure that
nothing was damaged on the way; see `etfzoo.zoo.manifest`.

A version appears in the cache whole or not at all and never changes, so that an address in the
cache is not asked again. `ETFZOO_OFFLINE=1` means no network at all. Nothing from a download is
executed or unpickled, and nothing is written outside of the folder of its download. The cache may
be one that others write to, too: no link in it is followed, so that nothing out of it is read,
written or deleted; only `ETFZOO_HOME` itself may be a link.
"""

import contextlib
import errno
import hashlib
import os
import re
import stat
import sys
from pathlib import Path
from urllib.parse import urlsplit

import filelock

from etfzoo import files
from etfzoo.errors import EtfzooError
from etfzoo.progress import Progress, notify
from etfzoo.zoo import beneath, download, manifest, transport

_METADATA = "assets.extra/etfzoo.json"


class _NotOurs(EtfzooError):
    """A folder in the cache that is no download and must stay."""


home = files.cache_home


def check_not_linked(folder) -> None:
    """Raises EtfzooError where a link leads to a folder of the cache."""
    path = home()
    for name in Path(folder).relative_to(path).parts:
        path = path / name
        with contextlib.suppress(OSError):  # what is not there, or cannot be entered
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise beneath.linked(path)


def is_offline() -> bool:
    """Whether ETFZOO_OFFLINE forbids the network."""
    return os.environ.get("ETFZOO_OFFLINE", "").lower() not in ("", "0", "false", "no")


def fetch_version(name: str, version: int, urls, listing: dict[str, manifest.Entry]) -> Path:
    """The folder of a version of the index, downloaded unless it is there.

    Args:
        name: full name.
        version: its number.
        urls: addresses of the version folder; one after the other is tried.
        listing: hash and size of every file, files.json included.

    Raises:
        EtfzooError: offline, no address gives the listed files, no space, or another model of that
            name is in the cache.
    """
    target = home() / name / str(version)
    what = f"{name}@{version}"

    def check():
        try:
            manifest.verify(target, listing)
        except EtfzooError as e:
            if _is_download(target, listing):
                raise
            raise _NotOurs(
                f"{target} is not the published {what} ({e}); rename or delete it, or load your "
                "own by its path"
            ) from e

    return _fetch(target, what, urls, lambda url: listing, check, lambda folder: None)


def fetch_url(handle: str, try_out=lambda folder: None) -> Path:
    """The folder of the version at an address, downloaded unless it is there.

    Args:
        handle: `https://`, `http://` or `gs://` address of a version folder, or
            `hf://owner/repo[/folder][@revision]`; `#sha256=` and the hash of its files.json may
            follow.
        try_out: called with the downloaded folder before it gets its place; an EtfzooError that it
            raises refuses it. Good hashes alone don't make a model.

    Raises:
        EtfzooError: a bad address, offline, nothing to download there, or files that are not what
            files.json or the pin says.
    """
    url, pin = parse_handle(handle)
    scheme, place = url.split("://")
    slug = re.sub(r"[^A-Za-z0-9.-]+", "_", place).strip("._-")[:100]
    digest = hashlib.sha256(f"{scheme}://{place}".encode()).hexdigest()[:10]
    target = home() / "urls" / f"{slug}-{digest}"

    def check():
        if not manifest.verify(target):
            raise EtfzooError(f"{target / manifest.NAME} is missing")
        if pin and manifest.sha256(target / manifest.NAME) != pin:
            raise EtfzooError(f"{target} is not what the handle pins")

    def listing_at(url):
        address = download.join(url, manifest.NAME)
        content = download.fetch_bytes(address, manifest.MAX_BYTES)
        digest = hashlib.sha256(content).hexdigest()
        if pin and digest != pin:
            raise download.WrongContent(
                f"{address} has the sha256 {digest}, and the handle pins another one: refused"
            )
        listing = manifest.parse(content, address)
        return listing | {manifest.NAME: manifest.Entry(digest, len(content))}

    return _fetch(target, url, [url], listing_at, check, try_out)


def parse_handle(handle: str) -> tuple[str, str | None]:
    """The address in a handle, and the sha256 that it pins.

    Raises:
        EtfzooError: another scheme, or an address that cannot be meant.
    """
    url, _, fragment = handle.strip().partition("#")
    scheme, _, place = url.partition("://")
    url = f"{scheme.lower()}://{place.rstrip('/')}"
    pin = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises where it is no number
    except ValueError as e:
        raise EtfzooError(f"{handle[:200]!r} is no address: {e}") from e
    if parts.scheme not in transport.SCHEMES:
        known = ", ".join(f"{s}://" for s in transport.SCHEMES)
        raise EtfzooError(f"{handle[:200]}: addresses that can be loaded begin with {known}")
    if fragment and not pin:
        raise EtfzooError(f"{handle[:200]}: only #sha256= and 64 hex digits may follow #")
    if parts.scheme != "hf" and "@" in parts.netloc:
        raise EtfzooError("put the login of an address into ~/.netrc, not into the address")
    pattern = {"hf": r"[\w.-]+(/[\w.-]+)+(@[\w.-]+)?", "gs": r"[\w./-]+"}
    if not re.fullmatch(pattern.get(parts.scheme, r"[^\s?\\@]+"), url.partition("://")[2]):
        raise EtfzooError(f"{handle[:200]!r} is not the address of a folder")
    return url, pin[1].lower() if pin else None


def _fetch(target, what, urls, listing_at, check, try_out) -> Path:
    """Fills `target` unless it is there and `check()` finds no fault in it.

    Args:
        target: the folder.
        what: name of the model for people.
        urls: addresses of its version folder.
        listing_at: gives the files that belong to it, by address.
        check: raises EtfzooError where the folder is damaged.
        try_out: raises EtfzooError where a download is to be refused.
    """
    check_not_linked(target)
    fault = _fault(target, check)
    if fault is None:
        return target
    if not urls:
        raise EtfzooError(
            f"{fault or f'the weights of {what} are not in {target}'}, and the index has no "
            "address of them; those of etfzoo lie in saved_models/ of its source repository and in "
            f"no wheel: copy saved_models/{target.parent.name}/{target.name} to that place (below "
            "ETFZOO_HOME), or load that folder by its path"
        )
    if is_offline():
        raise EtfzooError(
            f"{fault or f'{what} is not in {target}'}, and ETFZOO_OFFLINE forbids to download it: "
            "unset ETFZOO_OFFLINE, or copy the folder there"
        )
    if fault:
        notify("%s: downloading it again", fault)
    with _locked(target) as temporary:
        if _fault(target, check) is None:  # another process was faster
            beneath.remove("files", temporary)
            return target
        error = None
        for url in urls:
            try:
                _download(temporary, _place_of(target), what, url, listing_at(url), try_out)
                _place(temporary, target)
                return target
            except (download.NetworkError, download.WrongContent) as e:
                if error is not None:
                    notify("%s", e)
                error = error or e
        raise error


def _fault(target, check) -> str | None:
    """What is wrong with a folder; None if nothing is, empty if there is none."""
    if not target.exists():
        return ""
    try:
        check()
    except _NotOurs:
        raise
    except EtfzooError as e:
        return str(e).partition(";")[0]
    return None


def _download(temporary, place, what, url, listing, try_out):
    """Brings all listed files, and nothing else, into `files` of a folder.

    Args:
        temporary, place: descriptor and path of the folder.
        what, url, listing, try_out: as in `_fetch`.
    """
    folder = place / "files"
    check_not_linked(folder)
    try:
        with beneath.folder(temporary, "files", make=True) as opened:
            have = beneath.tidy(opened, listing)
            total = sum(entry.size for entry in listing.values())
            download.check_free_space(place, total - have)
            notify("downloading %s (%.1f MB) from %s", what, total / 1e6, url)
            progress = Progress(what, -(-total // 10**6), quiet=not sys.stdout.isatty(), unit="MB")
            done = 0
            for name, entry in sorted(listing.items()):
                *parents, last = name.split("/")

                def show(count, done=done):
                    progress.update((done + count) // 10**6)

                with (
                    beneath.folder(opened, *parents, make=True) as parent,
                    beneath.open_file(last, parent) as file,
                ):
                    address = download.join(url, name)
                    download.fetch_file(address, file, entry.size, entry.sha256, show)
                done += entry.size
            progress.finish()
        own = manifest.read(folder)
        if own != {name: e for name, e in listing.items() if name != manifest.NAME}:
            raise download.WrongContent(f"{url}: its files.json and the index differ: refused")
        try:
            try_out(folder)
        except EtfzooError as e:
            raise download.WrongContent(f"{url} is no model that can be loaded: {e}") from e
    except download.NetworkError:
        raise  # what has come is kept, to be resumed
    except EtfzooError:
        beneath.remove("files", temporary)
        raise
    except OSError as e:
        beneath.remove("files", temporary)
        raise EtfzooError(f"cannot write {folder}: {e.strerror or e}") from e


def _place(temporary, target):
    """Moves the files to their place; a damaged copy there makes room."""
    try:
        beneath.remove("old", temporary)
        with beneath.folder(home(), target.parent.name) as parent:
            with contextlib.suppress(FileNotFoundError):
                os.rename(target.name, "old", src_dir_fd=parent, dst_dir_fd=temporary)
            os.rename("files", target.name, src_dir_fd=temporary, dst_dir_fd=parent)
        beneath.remove("old", temporary)
    except OSError as e:
        raise EtfzooError(f"cannot write {target}: {e.strerror or e}") from e


def _place_of(target):
    """The folder in which `target` is downloaded."""
    return target.parent / f".download-{target.name}"


def _is_download(target, listing):
    """Whether a folder that differs from the listing once was what it lists, and nobody's own."""
    for name in (manifest.NAME, _METADATA):
        with contextlib.suppress(EtfzooError):
            if name in listing and manifest.sha256(target / name) == listing[name].sha256:
                return True
    return False


@contextlib.contextmanager
def _locked(target):
    """Yields the descriptor of the folder in which `target` is downloaded by this process alone.

    Another process that wants it waits; one that was killed holds nothing. At the end the folder
    goes, unless files are left in it. The file of the lock is elsewhere and stays: who removes one
    lets another process in beside the one that waits for it.
    """
    files.make_directory(home())
    path = home() / ".locks" / f"{target.parent.name}@{target.name}"
    lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        with beneath.folder(home(), ".locks", make=True):  # else it is a link
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                notify("another process downloads into %s: waiting for it", target.parent)
                lock.acquire()
    except OSError as e:
        # A file system without locks, as on some clusters: one process at a time works there too.
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise EtfzooError(f"cannot write {path}: {e.strerror or e}") from e
    folder = _place_of(target)
    try:
        with contextlib.ExitStack() as stack:
            place = beneath.folder(home(), target.parent.name, folder.name, make=True)
            try:
                opened = stack.enter_context(place)
            except OSError as e:
                raise EtfzooError(f"cannot write {folder}: {e.strerror or e}") from e
            yield opened
    finally:
        with contextlib.suppress(OSError, EtfzooError):
            with beneath.folder(home(), target.parent.name) as parent:
                os.rmdir(folder.name, dir_fd=parent)
            target.parent.rmdir()
        lock.release()
