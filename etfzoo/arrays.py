"""Arrays in npz files, checked before any memory is taken for them."""

import math
import os
import zipfile
import zlib

import numpy as np

from etfzoo import files
from etfzoo.errors import EtfzooError, first_line

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npz(path, names=None) -> dict[str, np.ndarray]:
    """Arrays of a file that np.savez has written; nothing in it is unpickled or unfolded.

    Args:
        path: of the file.
        names: of the arrays that are read; None is all.

    Returns:
        The arrays by name; they cannot be written into.

    Raises:
        EtfzooError: missing, no npz, damaged, without one of the arrays, or one that declares more
            than it holds.
    """
    try:
        with files.open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
            declared = sum(member.file_size for member in members.values())
            stored = all(m.compress_type == zipfile.ZIP_STORED for m in members.values())
            if not stored or declared > os.fstat(file.fileno()).st_size:
                raise ValueError("it declares more than it holds")
            lacking = [name for name in names or () if name not in members]
            if lacking:
                raise ValueError(f"it has no {', '.join(lacking)}")
            return {name: _read(archive, members[name]) for name in names or members}
    except (
        EOFError,
        NotImplementedError,  # of zipfile: encrypted, or by a later version
        OSError,
        RuntimeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise EtfzooError(f"{path} is damaged: {first_line(error)}") from error


def _read(archive, member) -> np.ndarray:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{member.filename} has an unknown version of the npy format")
        shape, fortran, dtype = _HEADERS[version](file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or min(shape, default=0) < 0 or size != member.file_size - file.tell():
            raise ValueError(f"{member.filename} does not hold what it declares")
        array = np.frombuffer(file.read(), dtype)  # whose checksum is compared at its end
    return array.reshape(shape, order="F" if fortran else "C")
