"""Tests that a publication is one transaction: killed or failing anywhere, all parts agree."""

import json
import os
import random
import shutil
import sys

import pytest

import etfzoo
from etfzoo.zoo import card, index, manifest, publication, publish
from testing import held_by_another_process, leftovers, make_classifier

NAME = "rn18_etf.x"
REQUEST = {"source": "a run"}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


class Hook:
    """Counts what this process changes in file systems, and acts before the n-th change."""

    def __init__(self, number, act):
        self.left, self.act = number, act
        sys.addaudithook(self.heard)

    def heard(self, event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE
        if writes or event in CHANGES:
            self.left -= 1
            if self.left == 0:
                self.act()


def in_a_child(number, act, work) -> int:
    """Does work in a forked process, whose n-th change of files is preceded by `act`.

    Returns 0 where there were fewer changes, 2 where an error ended it, 4 where it went well.
    """
    child = os.fork()
    if child == 0:
        code = 3
        try:
            hook = Hook(number, act)
            work()
            code = 0 if hook.left > 0 else 4
        except etfzoo.EtfzooError:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed():
    os._exit(9)


def failing():
    raise OSError(5, "Input/output error")


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    from testing import small_rn18

    with small_rn18():
        return etfzoo.publish(make_classifier(), tmp_path_factory.mktemp("models") / NAME)


@pytest.fixture
def zoo(version, tmp_path, monkeypatch):
    """Models with a published version; what is published from now on is a copy of it."""

    def copy(model, directory, number, **details):
        folder = directory / str(number)
        shutil.copytree(version, folder)
        text = card.text(NAME, number, publish.read_metadata(folder))
        (folder / card.NAME).write_text(text)
        (folder / manifest.NAME).unlink()
        manifest.write(folder)
        return folder

    monkeypatch.setattr(publication, "publish", copy)
    root = tmp_path / "zoo"
    make(root)
    return root


def make(root, name=NAME, **changes):
    entry = {"index_path": root / "index.json", "url": "https://example.org/zoo"}
    return publication.make(None, name, root, **({"request": REQUEST} | entry | changes))


def state(root, name=NAME) -> set:
    """The versions; they, the card and the index must agree, and nothing else may be there."""
    versions = publish.version_folders(root / name)
    row = index.load(root / "index.json").models[name]
    assert row.versions.keys() == versions.keys()
    for number, folder in versions.items():
        assert manifest.verify(folder, row.versions[number].files)
        assert row.versions[number].urls == (f"https://example.org/zoo/{name}/{number}",)
    assert (root / name / card.NAME).read_text() == card.read(versions[max(versions)])
    assert sorted(leftovers(root / name)) == sorted([*map(str, versions), card.NAME])
    return set(versions)


def changes_of_a_publication(zoo, tmp_path, act, first):
    """Copies of the zoo, in each of which `act` came before every third change of a publication."""
    number, ended = first - 3, None
    while ended != 0:
        number += 3
        assert number < 200
        root = tmp_path / f"at_{number}"
        shutil.copytree(zoo, root)
        ended = in_a_child(number, act, lambda root=root: make(root))
        yield root, ended
    assert number > 20


FIRST = pytest.mark.parametrize(
    "first", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))]
)


@FIRST
def test_killed_at_any_point_the_same_command_finishes_it(first, zoo, tmp_path):
    for root, ended in changes_of_a_publication(zoo, tmp_path, killed, first):
        if ended == 0:
            assert state(root) == {1, 2}
            break
        assert ended == 9
        staging = root / f".publish-{NAME}"
        done = not (staging / "pending.json").exists() and (root / NAME / "2").exists()
        folder = make(root)
        # Where only tidying up was left, it was finished, and this is another one.
        assert folder == root / NAME / ("3" if done else "2")
        assert state(root) == ({1, 2, 3} if done else {1, 2})
        assert sorted(leftovers(root)) == ["index.json", NAME]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_killed_again_while_it_is_finished(seed, zoo, tmp_path):
    rng = random.Random(seed)
    for attempt in range(8):
        root = tmp_path / f"attempt_{attempt}"
        shutil.copytree(zoo, root)
        for _ in range(4):
            in_a_child(rng.randint(1, 45), killed, lambda root=root: make(root))
        make(root)
        state(root)
        assert sorted(leftovers(root)) == ["index.json", NAME]


@FIRST
def test_failing_at_any_point_it_is_undone_or_done(first, zoo, tmp_path):
    """An error of one operation: all is as before or as wanted, at the latest after the next."""
    for root, ended in changes_of_a_publication(zoo, tmp_path, failing, first):
        if not (root / f".publish-{NAME}").exists():
            assert state(root) in ({1}, {1, 2}) and (ended == 2 or state(root) == {1, 2})
        make(root, "rn18_etf.other")
        assert state(root) in ({1}, {1, 2}) and state(root, "rn18_etf.other") == {1}
        assert sorted(leftovers(root)) == ["index.json", "rn18_etf.other", NAME]


def killed_before_its_card(zoo):
    def at_the_card():
        real = publication.files.write_text

        def write(path, text):
            if path.name == card.NAME:
                os._exit(9)
            real(path, text)

        publication.files.write_text = write
        make(zoo)

    assert in_a_child(10**9, killed, at_the_card) == 9
    assert (zoo / NAME / "2").exists() and (zoo / f".publish-{NAME}").exists()


def test_another_request_finishes_it_and_then_makes_its_own(zoo, caplog):
    killed_before_its_card(zoo)
    assert make(zoo, request={"source": "another run"}) == zoo / NAME / "3"
    assert state(zoo) == {1, 2, 3}


def test_publishing_another_name_finishes_it(zoo):
    killed_before_its_card(zoo)
    (zoo / ".publish-0123abcd").mkdir()  # as earlier versions of etfzoo left them
    make(zoo, "rn18_etf.other")
    assert state(zoo) == {1, 2}
    assert sorted(leftovers(zoo)) == ["index.json", "rn18_etf.other", NAME]


def test_two_processes(zoo):
    killed_before_its_card(zoo)
    with held_by_another_process(zoo / f".publish-{NAME}"):
        with pytest.raises(etfzoo.EtfzooError, match="a publication is at work in .*publish-rn18"):
            make(zoo)
        make(zoo, "rn18_etf.other")  # which does not touch the other process's
        assert (zoo / f".publish-{NAME}" / "pending.json").exists()
    assert make(zoo) == zoo / NAME / "2" and state(zoo) == {1, 2}


def test_an_index_that_is_written_by_another_process(zoo):
    with (
        held_by_another_process(zoo / ".index.json.lock"),
        pytest.raises(etfzoo.EtfzooError, match="a publication is at work in .*index.json.lock"),
    ):
        make(zoo)
    assert not (zoo / NAME / "2").exists()
    assert make(zoo) == zoo / NAME / "2" and state(zoo) == {1, 2}


def test_versions_of_the_index_are_taken(zoo):
    """A version of which only the index knows is another model: its number is not used again."""
    document = json.loads((zoo / "index.json").read_text())
    row = document["models"][NAME]
    row["versions"][str(2**62)] = row["versions"]["1"]
    (zoo / "index.json").write_text(json.dumps(document))
    with pytest.raises(etfzoo.EtfzooError, match=f"index.json has a version {2**62} of {NAME}"):
        make(zoo, version=2**62)
    assert make(zoo) == zoo / NAME / str(2**62 + 1)


@pytest.mark.parametrize(
    "url, message",
    [
        ("ftp://example.org", "begin with"),
        ("https://me:secret@example.org", "netrc"),
        ("https://example.org/a b", "not the address of a folder"),
        ("https://example.org:x", "is no address"),
        ("https://example.org/zoo#sha256=" + "0" * 64, "it has a #"),
        ("hf://owner", None),
        ("hf://owner/repo/zoo?x", "not the address of a folder"),
        ("gs://bucket/zoo/", None),
    ],
)
def test_addresses_are_those_that_load_takes(zoo, url, message):
    if message is None:
        publication.check_url(url, NAME)
        return
    with pytest.raises(etfzoo.EtfzooError, match=message):
        make(zoo, url=url)
    assert state(zoo) == {1} and sorted(leftovers(zoo)) == ["index.json", NAME]
