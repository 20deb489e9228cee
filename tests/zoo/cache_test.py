"""Tests of downloads: real HTTP on this machine, well-behaved and not."""

import hashlib
import os
import ssl
import subprocess
import sys
import time
import tracemalloc

import pytest
from downloads import DATA, assert_same_folder, leftovers, listing_of, make_version, one_line

import server as http
from etfzoo.zoo import cache, download, manifest, transport


def test_an_address(site):
    folder = cache.fetch_url(site.version)
    assert_same_folder(folder, site.folder)
    assert folder.parent == cache.home() / "urls" and leftovers() == []
    assert folder.name.startswith("127.0.0.1_") and "rn18_etf.x_1-" in folder.name
    asked = len(site.requests)
    assert cache.fetch_url(site.version + "/") == folder
    assert len(site.requests) == asked  # it is in the cache and is not asked again
    make_version(site.root / "rn18_etf.x/2", seed=1)
    assert cache.fetch_url(f"{site.url}/rn18_etf.x/2") != folder


def test_a_pinned_address(site):
    pin = hashlib.sha256((site.folder / manifest.NAME).read_bytes()).hexdigest()
    bad = f"{site.version}#sha256={'0' * 64}"
    assert "the handle pins another one: refused" in one_line(cache.fetch_url, bad)
    assert list(cache.home().rglob("*.pb")) == leftovers() == []
    folder = cache.fetch_url(f"{site.version}#sha256={pin.upper()}")
    assert cache.fetch_url(site.version) == folder
    # The good copy stays when a pin asks for another one.
    assert "pins another one" in one_line(cache.fetch_url, bad)
    assert cache.fetch_url(site.version) == folder


@pytest.mark.parametrize(
    "handle, message",
    [
        ("ftp://host/x", "begin with https://, http://, gs://, hf://"),
        ("file:///etc", "begin with https://"),
        ("https://user:secret@host/x", "into ~/.netrc"),
        ("https://host/x#md5=1", "only #sha256="),
        ("https://host/x?token=1", "is not the address of a folder"),
        ("https://host/a b", "is not the address of a folder"),
        ("https://host:port/x", "is no address"),
        ("https://", "is not the address of a folder"),
        ("hf://repo", "is not the address of a folder"),
        ("hf://owner/re po", "is not the address of a folder"),
        ("https://[::1/x", "is no address"),
    ],
)
def test_bad_handles(site, handle, message):
    text = one_line(cache.fetch_url, handle)
    assert message in text and "secret" not in text
    assert not cache.home().exists()


FAULTS = {  # what happens at first; then the server is good
    "dropped": [http.drop(100_000)],
    "dropped twice": [http.drop(70_000), http.drop(70_000)],
    "stalls in the middle": [http.stall(100_000)],
    "stalls before headers": [http.stall(headers=False)],
    "500 and 503": [http.status(500), http.status(503)],
    "too many requests": [http.status(429)],
    "dropped, ignores Range": [http.drop(100_000), http.ignore_range],
    "dropped, 416": [http.drop(100_000), http.status(416)],
    "claims too little": [http.claim(200_000)],
    "claims too much": [http.claim(400_000)],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_faults(site, fault):
    site.faults[site.data] = [*FAULTS[fault], http.good]
    assert_same_folder(cache.fetch_url(site.version), site.folder)
    assert leftovers() == []
    ranges = [r for path, r in site.requests if path == site.data]
    if fault.startswith("dropped") and "416" not in fault:
        # Only what is missing is asked for: the first 64 KiB at least had come.
        assert int(ranges[1][6:-1]) >= 65536


@pytest.mark.parametrize(
    "fault, message, attempts",
    [
        (http.status(404), "404 Not Found; check the address", 1),
        (http.status(403), "403 Forbidden; you may not read it", 1),
        (http.status(500), "the server answers 500", 3),
        (http.status(418), "418 I'm a Teapot; check", 1),
        (http.stall(10), "no byte came for 0.4 s; gave up after 3", 3),
        (http.drop(0), "the connection was dropped; gave up", 3),
        (http.redirect("file:///etc/passwd"), "redirects from http to file: refused", 1),
        (http.redirect("ftp://127.0.0.1/x"), "redirects from http to ftp: refused", 1),
        (http.redirect("data:text/plain,x"), "redirects from http to data: refused", 1),
        (http.redirect(f"/rn18_etf.x/1/{DATA}"), "its redirects lead nowhere", 1),
        (http.status(200, Content_Encoding="gzip"), "sends it compressed", 1),
        (
            http.other(b"short"),
            "is not the published file: it ends after 5 of 300000",
            5,
        ),  # again without a Range
        (http.other(b"x" * 300_000), "is not the published file: its sha256 is", 1),
        (http.other(b"x" * 300_001), "sends more than the 300000 bytes", 1),
        (http.endless, "sends more than the 300000 bytes", 1),
        (http.claim(300_005, b"12345"), "sends more than the 300000 bytes", 1),
    ],
)
def test_lasting_faults(site, fault, message, attempts):
    site.faults[site.data] = [fault]
    text = one_line(cache.fetch_url, site.version)
    assert message in text and f"{site.version}/{DATA}" in text
    assert site.paths().count(site.data) == attempts
    assert not (cache.home() / "urls").exists() or leftovers()
    assert (leftovers() != []) == ("gave up" in text)  # only what may be right may stay
    site.faults.clear()
    assert_same_folder(cache.fetch_url(site.version), site.folder)
    assert leftovers() == []


@pytest.mark.parametrize("where", ["data", "list"])
@pytest.mark.parametrize("headers", [True, False])
def test_a_server_that_drips(site, monkeypatch, where, headers):
    """Some bytes come before any timeout, and the whole never would."""
    monkeypatch.setenv("ETFZOO_TIMEOUT", "0.1")
    monkeypatch.setattr(download, "_SLOWEST", 10**6)
    path = site.data if where == "data" else f"/rn18_etf.x/1/{manifest.NAME}"
    site.faults[path] = [http.drip(headers=headers)]
    start = time.monotonic()
    text = one_line(cache.fetch_url, site.version)
    assert "comes too slowly, less than 1,000,000 bytes a second; try again later" in text
    limit = download.time_limit(300_000 if where == "data" else manifest.MAX_BYTES)
    assert 1 < limit < time.monotonic() - start < limit + 5
    assert (where == "data") == (leftovers() != [])
    site.faults.clear()
    assert_same_folder(cache.fetch_url(site.version), site.folder)


@pytest.mark.parametrize(
    "sizes", [b"-1", b"-ffffffff", b"ffffffffffffffff", b"x", b"1;" + b"x" * 99]
)
def test_chunks_of_wrong_sizes(site, sizes):
    """Endless ones: no more is taken, or kept in memory, than was announced."""
    site.faults[site.data] = [http.chunked(sizes, b"x" * 70_000)]
    tracemalloc.start()
    text = one_line(cache.fetch_url, site.version)
    assert "sends more than the 300000 bytes" in text or "the connection was dropped" in text
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_nothing_that_a_server_says_is_obeyed_by_the_terminal(site):
    evil = "\x1b]0;title\x07\x1b[2J\u202e\x9b1m" + "x" * 500
    site.faults[site.data] = [http.reason(404, evil.encode("latin-1", "ignore").decode("latin-1"))]
    text = one_line(cache.fetch_url, site.version)
    assert text.isprintable() and "404 \\x1b]0;title\\x07\\x1b[2J" in text


def test_a_circle_of_two_addresses(site):
    site.faults[site.data] = [http.redirect("/other")]
    site.faults["/other"] = [http.redirect(site.data)]
    assert "its redirects lead nowhere" in one_line(cache.fetch_url, site.version)
    assert len([p for p in site.paths() if p in (site.data, "/other")]) == 2


def test_redirects_are_followed(site, tmp_path):
    with http.serve(tmp_path / "site") as mirror:
        for name in listing_of(site.folder):
            path = f"/rn18_etf.x/1/{name}"
            site.faults[path] = [http.redirect(mirror.url + path, 307)]
        assert_same_folder(cache.fetch_url(site.version), site.folder)
        # The empty file needs no request; files.json is read first, and then downloaded.
        assert len(mirror.requests) == len(listing_of(site.folder))


def test_a_login_goes_to_its_own_host_alone(site, tmp_path, monkeypatch):
    """As that of Hugging Face, whose files lie at another host."""
    path, sent = "/rn18_etf.x/1/saved_model.pb", []

    def noting(name, fault):
        def note(handler, content):
            sent.append((name, handler.headers["Authorization"]))
            fault(handler, content)

        return [note]

    with http.serve(tmp_path / "site") as other:
        site.faults[path] = noting("its own", http.redirect("/moved"))
        site.faults["/moved"] = noting("its own", http.redirect(other.url + path))
        other.faults[path] = noting("another", http.good)
        login = {"Authorization": "Bearer secret"}
        monkeypatch.setattr(transport, "_hugging_face", lambda url: (site.url + path, login))
        content = download.fetch_bytes("hf://owner/repo/saved_model.pb", 10_000)
    assert content == (site.folder / "saved_model.pb").read_bytes()
    assert sent == [("its own", "Bearer secret")] * 2 + [("another", None)]


def test_never_from_https_to_http(site, tmp_path, monkeypatch):
    """Over real TLS, and without its certificate not at all."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        + ["-keyout", str(key), "-out", str(certificate)],
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("no openssl here")
    with http.serve(tmp_path / "site") as secure:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        address = f"https://localhost:{secure.server_port}/rn18_etf.x/1"
        text = one_line(cache.fetch_url, address)
        assert "no secure connection (" in text and "self-signed" in text and address in text
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        secure.faults[site.data] = [http.redirect(site.url + site.data)]
        assert "redirects from https to http: refused" in one_line(cache.fetch_url, address)
        assert site.requests == []
        secure.faults.clear()
        assert_same_folder(cache.fetch_url(address), site.folder)


def test_no_server_and_no_such_host(site):
    port = site.server_port
    for address, message in [
        ("http://127.0.0.1:1/x/1", "no connection (Connection refused)"),
        ("http://nowhere.invalid/x/1", "no connection (Failed to resolve 'nowhere.invalid'"),
        (f"https://127.0.0.1:{port}/x/1", "no secure connection ("),
    ]:
        text = one_line(cache.fetch_url, address)
        assert message in text and address in text
    assert list(cache.home().rglob("*.json")) == leftovers() == []


@pytest.mark.parametrize("wrong", ["-1", "nan", "soon", "0"])
def test_a_bad_timeout(site, monkeypatch, wrong):
    monkeypatch.setenv("ETFZOO_TIMEOUT", wrong)
    assert "ETFZOO_TIMEOUT must be a number" in one_line(cache.fetch_url, site.version)


def test_what_is_no_version_folder(site):
    text = one_line(cache.fetch_url, f"{site.url}/rn18_etf.x")
    assert "404 Not Found; check the address: the folder of a version, such as .../1" in text
    site.faults["/rn18_etf.x/1/" + manifest.NAME] = [http.endless]
    assert "is larger than 1048576 bytes" in one_line(cache.fetch_url, site.version)
    site.faults["/rn18_etf.x/1/" + manifest.NAME] = [http.other(b"<html>")]
    assert "files.json is damaged" in one_line(cache.fetch_url, site.version)
    assert leftovers() == []


def test_offline(site, monkeypatch):
    for value in ("1", "true", "True"):
        monkeypatch.setenv("ETFZOO_OFFLINE", value)
        text = one_line(cache.fetch_url, site.version)
        assert site.version in text and "ETFZOO_OFFLINE forbids to download" in text
    assert site.requests == [] and not cache.home().exists()
    monkeypatch.setenv("ETFZOO_OFFLINE", "0")
    folder = cache.fetch_url(site.version)
    monkeypatch.setenv("ETFZOO_OFFLINE", "1")
    assert cache.fetch_url(site.version) == folder
    (folder / DATA).write_bytes(b"x")
    text = one_line(cache.fetch_url, site.version)
    assert f"{DATA} is damaged" in text and "ETFZOO_OFFLINE" in text
    assert (folder / DATA).read_bytes() == b"x"


def test_tensorflows_file_systems(site, monkeypatch):
    """The code of gs:// on TensorFlow's file system in memory; Google's was never asked."""
    import tensorflow as tf

    base = "ram://bucket/rn18_etf.x/1"
    for name in listing_of(site.folder):
        tf.io.gfile.makedirs(os.path.dirname(f"{base}/{name}"))
        with tf.io.gfile.GFile(f"{base}/{name}", "wb") as file:
            file.write((site.folder / name).read_bytes())
    monkeypatch.setattr(transport, "_open_http", None)
    open_gfile = transport._open_gfile
    to_ram = lambda url, start: open_gfile(url.replace("gs://", "ram://"), start)  # noqa: E731
    monkeypatch.setattr(transport, "_open_gfile", to_ram)
    assert_same_folder(cache.fetch_url("gs://bucket/rn18_etf.x/1"), site.folder)
    text = one_line(cache.fetch_url, "gs://bucket/none/1")
    assert "//bucket/none/1/assets.extra/files.json: NotFoundError" in text and leftovers() == []


def test_hugging_face(site, tmp_path, monkeypatch):
    """huggingface_hub's addresses at a server of this machine; Hugging Face was never asked."""
    pytest.importorskip("huggingface_hub")
    folder = site.root / "owner/repo/resolve/v1/models/1"
    folder.parent.mkdir(parents=True)
    os.rename(site.folder, folder)
    code = "import sys; from etfzoo.zoo import cache as hub; print(hub.fetch_url('hf://owner/repo/models/1@v1'))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_ENDPOINT": site.url, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert_same_folder(cache.home() / "urls" / os.path.basename(run.stdout.strip()), folder)


def test_hugging_face_without_its_package(site, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    text = one_line(cache.fetch_url, "hf://owner/repo/1")
    assert "pip install 'etfzoo[hf]'" in text and leftovers() == []
