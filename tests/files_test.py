"""Files that are written and read by the paths that users and strangers give."""

import os
import random

import pytest

from etfzoo import files
from etfzoo.errors import EtfzooError, printable


def special(path, kind):
    """What stands where a file is to be written."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/null")
    elif kind == "link to a pipe":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    elif kind == "circle of links":
        path.symlink_to(path.name)
    return path


KINDS = ["pipe", "folder", "device", "link to a pipe", "circle of links"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_neither_written_nor_replaced(tmp_path, kind):
    path = special(tmp_path / "output", kind)
    before = {p: os.lstat(p) for p in tmp_path.iterdir()}
    with pytest.raises(EtfzooError, match=f"cannot write {path}: ") as caught:
        files.write_text(path, "text")
    assert "\n" not in str(caught.value)
    with pytest.raises(EtfzooError, match=f"cannot write {path}: "):
        files.destination(path)  # what a command asks before it computes
    after = {p: os.lstat(p) for p in tmp_path.iterdir()}
    assert {p: (s.st_ino, s.st_mode) for p, s in before.items()} == {
        p: (s.st_ino, s.st_mode) for p, s in after.items()
    }


def test_devices_by_their_own_name():
    for path in ("/dev/null", "/dev/full", "/dev/zero"):
        with pytest.raises(EtfzooError, match=f"cannot write {path}: it is no regular file"):
            files.write_text(path, "text")
        with pytest.raises(EtfzooError, match=f"{path} cannot be read: it is no regular file"):
            files.read_bytes(path)


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("old")
    for number, target in enumerate(("there/file", "there/none", "link0")):
        link = tmp_path / f"link{number}"
        link.symlink_to(target)
        files.write_text(link, f"new {number}")
        assert link.is_symlink() and os.readlink(link) == target
        assert link.read_text() == f"new {number}"
    assert (tmp_path / "there/file").read_text() == "new 2"
    assert sorted(os.listdir(tmp_path / "there")) == ["file", "none"]
    (tmp_path / "lost").symlink_to("no/such/folder")
    with pytest.raises(EtfzooError, match="cannot write .*No such file or directory"):
        files.write_text(tmp_path / "lost", "text")


def test_a_link_that_is_not_followed_is_replaced(tmp_path):
    (tmp_path / "there").write_text("must stay")
    for target in ("there", "none", "link"):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with files.atomic(link, follow=False) as file:
            file.write(b"new")
        assert not link.is_symlink() and link.read_text() == "new"
    assert (tmp_path / "there").read_text() == "must stay"
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "circle of links"])
def test_reading_waits_for_nothing(tmp_path, kind):
    path = special(tmp_path / "input", kind)
    for read in (files.read_bytes, files.read_json):
        with pytest.raises(EtfzooError, match=f"{path} cannot be read: "):
            read(path)


def test_documents_have_a_largest_size(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))
    assert files.read_bytes(tmp_path / "file", 100) == bytes(100)
    with pytest.raises(EtfzooError, match="cannot be read: it is larger than 99 bytes"):
        files.read_bytes(tmp_path / "file", 99)
    with open(tmp_path / "sparse.json", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(EtfzooError, match="larger than"):
        files.read_json(tmp_path / "sparse.json")


def test_errors_hold_nothing_that_a_terminal_obeys():
    rng = random.Random(0)
    for _ in range(200):
        letters = [
            chr(rng.choice([rng.randrange(32), rng.randrange(127, 160), 0x202E, 0xDCE9, 65]))
        ]
        letters += [chr(rng.randrange(0x300)) for _ in range(9)]
        shown = str(EtfzooError(f"name {''.join(letters)}"))
        assert shown.replace("\n", "").replace("\t", "").isprintable()
        shown.encode()  # also to a file
    assert printable("Zürich, 東京, \U0001f600\nnext") == "Zürich, 東京, \U0001f600\nnext"
    assert printable("\x1b[2J\x07\x9b\u202e\udce9") == r"\x1b[2J\x07\x9b\u202e\udce9"
