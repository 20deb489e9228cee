"""A folder that others may write to, too: no link in it is ever followed.

All goes by descriptors of folders, so that none of them can become a link on the way.
"""

import contextlib
import errno
import os
import shutil
import stat

from etfzoo import files
from etfzoo.errors import EtfzooError

# Windows has neither, nor descriptors of folders.
_FOLDER = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)


@contextlib.contextmanager
def folder(root, *names: str, make: bool = False):
    """Yields the descriptor of the folder `root/name/...`.

    Args:
        root: path or descriptor of the folder that is trusted; it may be a link itself.
        *names: of the folders in it, one in the other.
        make: whether folders that are missing are made.

    Raises:
        EtfzooError: one of the names is a link, or no folder.
        OSError: it cannot be made or opened.
    """
    if os.open not in os.supports_dir_fd:
        raise EtfzooError(
            "this system cannot download safely: copy the model's folder, load its path"
        )
    with contextlib.ExitStack() as stack:
        opened = os.dup(root) if isinstance(root, int) else os.open(root, os.O_RDONLY)
        stack.callback(os.close, opened)
        for name in names:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=opened)
            try:
                opened = os.open(name, _FOLDER, dir_fd=opened)
            except OSError as error:
                if error.errno in (errno.ENOTDIR, errno.ELOOP):
                    raise linked(
                        os.path.join("" if isinstance(root, int) else root, *names)
                    ) from error
                raise
            stack.callback(os.close, opened)
        yield opened


def linked(path) -> EtfzooError:
    """The error for a path of the cache that is no folder of it."""
    return EtfzooError(
        f"{path} in the cache is a link, or no folder: nothing out of the cache is read or "
        "changed; delete it"
    )


def open_file(name: str, dir_fd: int):
    """Opens a file in a folder to read and write, unbuffered; makes it if need be.

    Raises:
        OSError: it cannot be made, it is no regular file, or it has another name elsewhere.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666, dir_fd=dir_fd))
    file = files.open_regular(name, "r+b", 0, follow=False, dir_fd=dir_fd)
    if os.fstat(file.fileno()).st_nlink > 1:
        file.close()
        raise OSError(errno.EMLINK, "it is a file of another folder, too")
    return file


def remove(name: str, dir_fd: int) -> None:
    """Removes what has a name in a folder, if anything: a link itself, a folder with all in it."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError):  # POSIX lets systems say either of a folder
        shutil.rmtree(name, ignore_errors=True, dir_fd=dir_fd)


def tidy(dir_fd: int, keep) -> int:
    """Removes all from a folder but some files of its own, and folders with nothing in them.

    Args:
        dir_fd: the folder.
        keep: relative names, with `/`; links and what has another name elsewhere go as well.

    Returns:
        The bytes of the files that are left.
    """
    total = 0
    for path, folders, names, opened in os.fwalk(".", topdown=False, dir_fd=dir_fd):
        for name in folders + names:
            status = os.lstat(name, dir_fd=opened)
            if stat.S_ISDIR(status.st_mode):
                with contextlib.suppress(OSError):  # not empty
                    os.rmdir(name, dir_fd=opened)
                continue
            own = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            if own and os.path.normpath(os.path.join(path, name)) in keep:
                total += status.st_size
            else:
                os.unlink(name, dir_fd=opened)
    return total
