"""Reading of npz files: what they hold, and never more memory than they are long."""

import io
import random
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from etfzoo import arrays
from etfzoo.errors import EtfzooError


def written(path, **values):
    np.savez(path, **values)
    return path


def test_arrays_come_back_as_numpy_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    values = {
        "plain": rng.normal(size=(3, 4)).astype("float32"),
        "fortran": np.asfortranarray(rng.normal(size=(3, 4, 2))),
        "scalar": np.float64(3),
        "empty": np.zeros((0, 5), "int16"),
        "text": np.array(["a", "ü"]),
        "big endian": np.arange(5, dtype=">i4"),
        "a/path.with.dots": np.array([True, False]),
    }
    path = written(tmp_path / "a.npz", **values)
    found = arrays.read_npz(path)
    with np.load(path) as there:
        assert found.keys() == set(there.files) == values.keys()
        for name in values:
            np.testing.assert_array_equal(found[name], there[name])
            assert found[name].dtype == there[name].dtype
    assert arrays.read_npz(path, ["scalar"]) == {"scalar": 3}
    with pytest.raises(EtfzooError, match="a.npz is damaged: it has no other, none"):
        arrays.read_npz(path, ["scalar", "other", "none"])


def member(header, data=b""):
    """A file in an archive whose npy header is given."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def archive(path, content, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("state.npy", content)
    return path


@pytest.mark.parametrize(
    "shape",
    ["(1000000000000,)", "(10**6,)", "(-1, -8)", "(2**63, 4)", "(4000, 4000, 4000, 40)", "5"],
)
def test_headers_that_declare_terabytes(tmp_path, shape):
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}"
    path = archive(tmp_path / "a.npz", member(header, bytes(64)))
    tracemalloc.start()
    with pytest.raises(EtfzooError, match="a.npz is damaged: "):
        arrays.read_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_nothing_is_unfolded_or_unpickled(tmp_path):
    zeros = io.BytesIO()
    np.save(zeros, np.zeros(10**7))
    bomb = archive(tmp_path / "bomb.npz", zeros.getvalue(), zipfile.ZIP_DEFLATED)
    with pytest.raises(EtfzooError, match="declares more than it holds"):
        arrays.read_npz(bomb)
    pickled = written(tmp_path / "pickled.npz", state=np.array([{"a": 1}], dtype=object))
    with pytest.raises(EtfzooError, match="does not hold what it declares"):
        arrays.read_npz(pickled)


def test_members_that_share_their_bytes(tmp_path):
    path = written(tmp_path / "a.npz", x=np.zeros(1000), y=np.zeros(1000))
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        second = file.infolist()[1].header_offset
        count = len(file.infolist())
    start = content.rindex(b"PK\x01\x02", 0, content.rindex(b"PK\x01\x02"))
    entry = content[start : content.index(b"PK\x01\x02", start + 4)]
    entries = b"".join(entry[:46] + b"%c" % (97 + i) + entry[47:] for i in range(20))
    assert count == 2 and second < start
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 20, 20, len(entries), start, 0)
    (tmp_path / "b.npz").write_bytes(content[:start] + entries + end)
    with pytest.raises(EtfzooError, match="declares more than it holds"):
        arrays.read_npz(tmp_path / "b.npz")


def test_any_damage_is_one_line(tmp_path):
    """Drawn: bytes that change, pieces that are missing, doubled, or of another file."""
    values = {"state": np.arange(40, dtype=np.uint8), "x": np.linspace(0, 1, 30)}
    good = written(tmp_path / "a.npz", **values).read_bytes()
    rng = random.Random(1)
    path, refused = tmp_path / "b.npz", 0
    for _ in range(1500):
        content = bytearray(good)
        for _ in range(rng.choice([1, 1, 1, 3, 10])):
            at, length = rng.randrange(len(content)), rng.randrange(1, 20)
            kind = rng.randrange(4)
            if kind == 0:
                content[at] = rng.randrange(256)
            elif kind == 1:
                del content[at : at + length]
            elif kind == 2:
                content[at:at] = content[at : at + length]
            else:
                content[at : at + length] = rng.randbytes(length)
        path.write_bytes(content)
        try:
            found = arrays.read_npz(path)
        except EtfzooError as error:
            refused += 1
            assert str(error).startswith(f"{path} is damaged: ") and "\n" not in str(error)
        else:  # names and dates have no checksum
            for value in found.values():
                assert value.nbytes <= len(content)
    assert refused > 1000


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x05\x06" + bytes(18), b"\x93NUMPY"])
def test_what_is_no_archive(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    if content.startswith(b"PK"):
        assert arrays.read_npz(tmp_path / "a.npz") == {}
        return
    with pytest.raises(EtfzooError, match="a.npz is damaged: "):
        arrays.read_npz(tmp_path / "a.npz")
    with pytest.raises(EtfzooError, match="none.npz is damaged: .*No such file"):
        arrays.read_npz(tmp_path / "none.npz")
