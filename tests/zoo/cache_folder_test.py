"""Tests of the cache on the disk: damage, full disks, several processes, planted links."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from downloads import DATA, assert_same_folder, leftovers, listing_of, make_version, one_line

import server as http
from etfzoo.errors import EtfzooError
from etfzoo.zoo import cache, download, manifest
from testing import CHECKOUT, small_disk


def test_a_damaged_copy_is_fetched_again(site, caplog):
    caplog.set_level("INFO", "etfzoo")
    for damage in (
        lambda folder: (folder / DATA).write_bytes(b"x"),
        lambda folder: (folder / manifest.NAME).unlink(),
        lambda folder: (folder / "saved_model.pb").unlink(),
        lambda folder: (folder / "variables/new.pkl").write_bytes(b"x"),
    ):
        folder = cache.fetch_url(site.version)
        damage(folder)
        caplog.clear()
        assert cache.fetch_url(site.version) == folder
        assert_same_folder(folder, site.folder)
        assert len([m for m in caplog.messages if "downloading it again" in m]) == 1
        assert leftovers() == []
    # While it cannot be had the damaged one stays where it is.
    (folder / DATA).write_bytes(b"x")
    site.faults[site.data] = [http.status(404)]
    assert "404" in one_line(cache.fetch_url, site.version)
    assert (folder / DATA).read_bytes() == b"x"


def test_a_version_of_the_index(site):
    listing = listing_of(site.folder)
    fetch = cache.fetch_version, "rn18_etf.x", 1, [f"{site.url}/none", site.version], listing
    folder = fetch[0](*fetch[1:])  # the first address has nothing
    assert folder == cache.home() / "rn18_etf.x/1"
    assert_same_folder(folder, site.folder)
    (folder / DATA).write_bytes(b"x")
    assert_same_folder(fetch[0](*fetch[1:]), site.folder)
    assert "has no address" in one_line(cache.fetch_version, "rn18_etf.y", 1, [], listing)


def test_the_hashes_of_the_index_count(site):
    """Not those that the server sends along."""
    listing = listing_of(site.folder)
    make_version(site.folder, seed=1)
    text = one_line(cache.fetch_version, "rn18_etf.x", 1, [site.version], listing)
    assert "is not the published file" in text and leftovers() == []


def test_a_model_of_the_user_is_never_replaced(site):
    """It has the name and number of one in the index."""
    own = make_version(cache.home() / "rn18_etf.x/1", seed=3)
    before = (own / DATA).read_bytes()
    text = one_line(cache.fetch_version, "rn18_etf.x", 1, [site.version], listing_of(site.folder))
    assert f"{own} is not the published rn18_etf.x@1" in text and "rename or delete" in text
    assert (own / DATA).read_bytes() == before and site.requests == []


def test_not_enough_space(site):
    document = json.loads((site.folder / manifest.NAME).read_text())
    document["files"][DATA]["size"] = 10**18
    (site.folder / manifest.NAME).write_text(json.dumps(document, indent=1) + "\n")
    text = one_line(cache.fetch_url, site.version)
    assert "the download needs 1,000,000,000,000 MB" in text and "free some space" in text
    assert site.data not in site.paths() and leftovers() == []


def test_a_disk_that_fills_up(site, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", "200k") as disk:
        monkeypatch.setenv("ETFZOO_HOME", str(disk / "cache"))
        assert "needs 0 MB" in one_line(cache.fetch_url, site.version)
        monkeypatch.setattr(download, "check_free_space", lambda *args: None)
        assert "No space left on device" in one_line(cache.fetch_url, site.version)
        assert leftovers() == []


def test_a_cache_that_cannot_be_written(site, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ETFZOO_HOME", str(tmp_path / "file"))
    assert "cannot create directory" in one_line(cache.fetch_url, site.version)


def test_what_an_earlier_download_left(site):
    """Its whole files are kept, its halves go on, and everything else goes."""
    site.faults[site.data] = [http.drop(100_000), http.status(500)]
    one_line(cache.fetch_url, site.version)
    (temporary,) = cache.home().rglob(".download-*/files")
    os.symlink("/etc/passwd", temporary / "assets/link.txt")
    (temporary / "left.pkl").write_bytes(b"x")
    (temporary / "saved_model.pb").unlink()
    os.symlink(site.folder / "saved_model.pb", temporary / "saved_model.pb")
    site.requests.clear()
    site.faults.clear()
    folder = cache.fetch_url(site.version)
    assert_same_folder(folder, site.folder)
    assert not (folder / "saved_model.pb").is_symlink() and leftovers() == []
    assert [r for p, r in site.requests if p == site.data] != [None]
    assert not [p for p in site.paths() if p.endswith("etfzoo.json")]


def test_a_part_of_another_file_starts_anew(site):
    site.faults[site.data] = [http.drop(100_000), http.status(500)]
    one_line(cache.fetch_url, site.version)
    (part,) = cache.home().rglob("variables.data*")
    part.write_bytes(bytes(len(part.read_bytes())))
    site.faults.clear()
    assert_same_folder(cache.fetch_url(site.version), site.folder)


FETCH = "import sys; from etfzoo.zoo import cache as hub; print(hub.fetch_url(sys.argv[1]))"


def start_fetch(address):
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "ETFZOO_TIMEOUT": "20"}
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_kill_in_the_middle_of_a_download(site):
    """The next one takes over at once and asks for the rest only."""
    make_version(site.folder, size=6_000_000)
    site.faults[site.data] = [http.slowly(100_000, 0.02), http.good]
    process = start_fetch(site.version)
    deadline = time.monotonic() + 60
    while sum(p.stat().st_size for p in cache.home().rglob("variables.data*")) < 2_000_000:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert_same_folder(cache.fetch_url(site.version), site.folder)
    (_, again) = [r for p, r in site.requests if p == site.data]
    assert int(again[6:-1]) >= 2_000_000
    assert leftovers() == []


def test_two_processes_at_once(site):
    make_version(site.folder, size=4_000_000)
    site.faults[site.data] = [http.slowly(50_000, 0.05)]
    processes = [start_fetch(site.version) for _ in range(2)]
    outputs = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert_same_folder(cache.fetch_url(site.version), site.folder)
    assert leftovers() == []
    assert site.paths().count(site.data) == 1
    assert sum("waiting for it" in err for _, err in outputs) == 1


def test_a_file_system_without_locks(site, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert_same_folder(cache.fetch_url(site.version), site.folder)
    assert leftovers() == []


slow = pytest.mark.slow
PLANTED = {  # what another user of a shared cache puts at a place
    "a link to a folder": lambda path, outside: path.symlink_to(outside / "folder"),
    "a link to a file": lambda path, outside: path.symlink_to(outside / "file"),
    "a link to nothing": lambda path, outside: path.symlink_to(outside / "none"),
    "another name of a file": lambda path, outside: os.link(outside / "file", path),
    "a pipe": lambda path, outside: os.mkfifo(path),
}
PLACES = [
    "urls",
    "{target}",
    "{target}/variables",
    f"{{target}}/{DATA}",
    f"{{target}}/{manifest.NAME}",
    "{download}",
    "{download}/files",
    "{download}/files/variables",
    f"{{download}}/files/{DATA}",
    "{download}/files/saved_model.pb",
    "{download}/old",
    ".locks",
    ".locks/{lock}",
]


def everything(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[path] = status.st_mode, status.st_mtime_ns, content
    return found


@pytest.mark.parametrize(
    "place, what",
    [
        pytest.param(place, what, marks=[] if "link to a folder" in what or DATA in place else slow)
        for place in PLACES
        for what in PLANTED
    ],
)
def test_nothing_outside_of_the_cache_is_touched(site, tmp_path, place, what):
    """Whatever another user of the cache has planted in it: one line, or it goes, or it stays."""
    target = cache.fetch_url(site.version)
    download_folder = f"urls/.download-{target.name}"
    part = cache.home() / f"{download_folder}/files/variables"
    part.mkdir(parents=True)
    (part.parent.parent / "old").mkdir()
    names = {"target": f"urls/{target.name}", "download": download_folder}
    names["lock"] = f"urls@{target.name}"
    outside = tmp_path / "outside"
    make_version(outside / "folder", seed=7)
    make_version(outside / "folder/files", seed=8)
    shutil.copytree(outside / "folder", outside / "folder" / target.name)
    (outside / "file").write_bytes(b"must stay" * 30)
    before = everything(outside)

    if "{target}" not in place and place != "urls":
        (target / DATA).unlink()  # so that it is downloaded again
    path = cache.home() / place.format(**names)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    PLANTED[what](path, outside)
    for _ in range(2):
        try:
            assert_same_folder(cache.fetch_url(site.version), site.folder)
        except EtfzooError as error:
            assert str(error).isprintable() and str(path.name) in str(error)
        assert everything(outside) == before
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
        path.unlink()
    assert_same_folder(cache.fetch_url(site.version), site.folder)
    assert everything(outside) == before
