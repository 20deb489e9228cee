"""Tests of the list of files: strict names, one form, and what it finds in a folder."""

import json
import os

import pytest

import mutations
from etfzoo.errors import EtfzooError
from etfzoo.zoo import manifest

NAMES = (
    "saved_model.pb",
    "fingerprint.pb",
    "README.md",
    "variables/variables.index",
    "variables/variables.data-00000-of-00002",
    "variables/variables.data-00001-of-00002",
    "assets/vocabulary.txt",
    "assets.extra/etfzoo.json",
    "assets.extra/tf_serving_warmup_requests",
)


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(NAMES):
        path = tmp_path / "1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * number * 10)
    manifest.write(tmp_path / "1")
    return tmp_path / "1"


def refused(call, *args):
    with pytest.raises(EtfzooError) as error:
        call(*args)
    message = str(error.value)
    assert message.isprintable() and len(message) < 900
    return message


def test_write_read_verify(folder):
    listing = manifest.read(folder)
    assert listing.keys() == set(NAMES)
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert listing["saved_model.pb"] == (empty, 0)  # the sha256 of nothing, from its standard
    assert [e.size for e in map(listing.get, NAMES)] == list(range(0, 90, 10))
    assert manifest.verify(folder) is True
    own = {manifest.NAME: manifest.entry_of(folder / manifest.NAME)}
    assert manifest.verify(folder, listing | own) is True
    assert "holds files that were not published" in refused(manifest.verify, folder, listing)
    document = json.loads((folder / manifest.NAME).read_text())
    assert document == {"format": 1, "files": manifest.as_json(listing)}


def test_writing_again_gives_the_same(folder):
    before = (folder / manifest.NAME).read_bytes()
    manifest.write(folder)
    assert (folder / manifest.NAME).read_bytes() == before


def test_a_folder_without_a_list(folder):
    (folder / manifest.NAME).unlink()
    assert manifest.read(folder) is None
    assert manifest.verify(folder) is False


def test_every_changed_bit_of_the_list_is_noticed(folder):
    """All of them: no byte is without a meaning."""
    path = folder / manifest.NAME
    content = path.read_bytes()

    def assert_noticed(changed):
        with pytest.raises(EtfzooError):
            manifest.parse(changed, path)
            path.write_bytes(changed)  # a name, a hash or a size that could be right
            manifest.verify(folder)

    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            assert_noticed(bytes(changed))
        for more in (b" ", b"\n", b"0"):
            assert_noticed(content[:place] + more + content[place:])
        assert_noticed(content[:place])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_damaged_is_named(folder, name):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content + b"x")
    size = f"it has {len(content) + 1} bytes instead of {len(content)}"
    message = refused(manifest.verify, folder)
    assert f"{path} is damaged: {size}" in message and "again" in message
    if content:
        path.write_bytes(content[:-1] + b"\xff")
        assert f"{path} is damaged: its sha256" in refused(manifest.verify, folder)
    path.unlink()
    assert f"is damaged: it lacks {name}" in refused(manifest.verify, folder)


@pytest.mark.parametrize("name", ["evil.pkl", "variables/evil.pkl", ".hidden", "a/b/c", "assets/x"])
def test_additional_files(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    message = refused(manifest.verify, folder)
    assert f"holds files that were not published: {name}" in message


@pytest.mark.parametrize("name", ["evil.pkl", "variables/evil.pkl", ".hidden", "a/b/c"])
def test_foreign_files_are_not_published(folder, name):
    before = (folder / manifest.NAME).read_bytes()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    assert f"lists {name!r}, which is no file of a model" in refused(manifest.write, folder)
    assert (folder / manifest.NAME).read_bytes() == before


def test_links_and_pipes(folder, tmp_path):
    for make in (os.symlink, lambda _, path: os.mkfifo(path)):
        for name in ("saved_model.pb", manifest.NAME, "assets/new"):
            path, kept = folder / name, tmp_path / "kept"
            if path.exists():
                os.rename(path, kept)
            make(kept, path)
            assert f"{path} is " in refused(manifest.verify, folder)
            path.unlink()
            if kept.exists():
                os.rename(kept, path)
    os.rename(folder / "variables", tmp_path / "variables")
    os.symlink(tmp_path / "variables", folder / "variables")
    assert "variables is a symbolic link" in refused(manifest.verify, folder)


@pytest.mark.parametrize("path", mutations.PATHS)
def test_paths_that_no_list_may_have(folder, path):
    listing = manifest.as_json(manifest.read(folder))
    listing[path] = listing["README.md"]
    message = refused(manifest.check_listing, listing, "https://host/files.json")
    assert "https://host/files.json" in message and "refused" in message


@pytest.mark.parametrize("name", mutations.DOCUMENTS)
def test_what_is_no_list(folder, name):
    message = refused(manifest.parse, mutations.DOCUMENTS[name], "here")
    assert message.startswith("here ")


def test_a_later_format(folder):
    content = (folder / manifest.NAME).read_bytes().replace(b'"format": 1', b'"format": 2')
    assert "has format 2, and this etfzoo reads up to 1: upgrade" in refused(
        manifest.parse, content, "x"
    )
