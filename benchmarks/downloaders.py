"""Whether pooch and huggingface_hub could stand for our own downloads: hostile servers for each.

  pip install pooch huggingface_hub; python benchmarks/downloaders.py --log=downloaders.log

Each case runs in a process of its own. It ends well if the download fails, within LIMIT seconds at
a timeout of one second, with a printable message, no more bytes on the disk than were announced,
no 100 MB of memory and nothing changed outside of its folder; or if it succeeds with right bytes.
"""

import argparse
import gzip
import hashlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"ETFZOO_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
os.environ |= {"HF_TOKEN": "secret", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}

import server as http  # noqa: E402

SIZE, LIMIT = 300_000, 15
CONTENT = os.urandom(SIZE)
DIGEST, COMMIT = hashlib.sha256(CONTENT).hexdigest(), "1" * 40
NAME = "variables/data"  # of the only file


def ours(url, place):
    from etfzoo.zoo import beneath, download, transport

    download._SLOWEST, transport.TIMEOUT = 10**6, 1.0  # shorter than a user has them
    place.mkdir(exist_ok=True)
    with beneath.folder(place, "variables", make=True) as folder:
        with beneath.open_file("data", folder) as file:
            download.fetch_file(f"{url}/{NAME}", file, SIZE, DIGEST)


def pooch(url, place):
    import pooch

    pooch.get_logger().setLevel("ERROR")
    known = pooch.create(place, f"{url}/", registry={NAME: f"sha256:{DIGEST}"}, retry_if_failed=2)
    known.fetch(NAME, downloader=pooch.HTTPDownloader(timeout=1))


def huggingface_hub(url, place):
    import huggingface_hub

    huggingface_hub.snapshot_download("o/r", local_dir=place, endpoint=url)


def of_hugging_face(handler):
    """What its server says of a repository, and of a file in it before that is asked for."""
    body = b""
    if handler.path.startswith("/api/"):
        tree = [{"type": "file", "path": NAME, "size": SIZE, "oid": "2" * 40}]
        info = {"id": "o/r", "sha": COMMIT, "siblings": [{"rfilename": NAME}]}
        body = json.dumps(tree if "/tree/" in handler.path else info).encode()
    handler.start(200, len(body) or SIZE, ETag=f'"{DIGEST}"', X_Repo_Commit=COMMIT)
    if handler.command == "GET":
        handler.wfile.write(body)


def to_another_host(handler, content):
    http.redirect(f"http://localhost:{handler.server.server_port}/elsewhere")(handler, content)


def elsewhere(handler, content):
    if handler.headers.get("Authorization"):
        Path(handler.server.root, "..", "login was sent").touch()
    http.good(handler, CONTENT)


def link(where):
    def plant(place, outside):
        path = place / where
        path.parent.mkdir(parents=True)
        path.symlink_to(outside if where == "variables" else outside / "file")

    return plant


BOMB = gzip.compress(bytes(300 * 10**6))
CASES = {  # what the server does, or what is planted
    "good": http.good,
    "drops, then good": [http.drop(100_000), http.good],
    "stalls": http.stall(1000),
    "drips": http.drip(0.2),
    "drips its headers": http.drip(0.2, headers=False),
    "another file": http.other(bytes(SIZE)),
    "sends more than announced": http.claim(SIZE + 10**6, bytes(10**6)),
    "without end": http.endless,
    "announces 10^15 bytes": http.claim(10**15),
    "negative size of a chunk": http.chunked(b"-1", b"x" * 70_000),
    "a compressed bomb": lambda h, c: (
        h.start(200, len(BOMB), Content_Encoding="gzip") or h.wfile.write(BOMB)
    ),
    "escape sequences in the reason": http.reason(404, "\x1b]0;title\x07\x1b[2J"),
    "redirects to a file": http.redirect("file:///etc/passwd"),
    "redirects without end": lambda h, c: http.redirect(h.path + "x")(h, c),
    "redirects with a login": to_another_host,
    "a link in place of the file": link(NAME),
    "a link in place of the folder": link("variables"),
    "a pipe in place of the file": lambda p, o: (
        (p / "variables").mkdir(parents=True) or os.mkfifo(p / NAME)
    ),
    "killed in the middle": [http.slowly(30_000, 0.2), http.good],
}


def attempt(downloader, case, base):
    """What happened, and what is wrong with it."""
    site, place, outside = base / "site", base / "place", base / "outside"
    (site / "variables").mkdir(parents=True)
    outside.mkdir()
    (outside / "file").write_text("must stay")
    (site / NAME).write_bytes(CONTENT)
    with http.serve(site) as server:
        handler, faults = server.RequestHandlerClass, CASES[case]
        planted = faults if "in place" in case else None
        if planted:
            planted(place, outside)
            faults = http.good
        faults = faults if isinstance(faults, list) else [faults]
        get = handler.do_GET

        def answer(self):  # the file is where each downloader looks for it
            if self.path.startswith("/api/"):
                return of_hugging_face(self)
            return get(self)

        handler.do_GET, handler.do_HEAD = answer, of_hugging_face
        for path in (f"/{NAME}", f"/o/r/resolve/{COMMIT}/{NAME}"):
            (site / path[1:]).parent.mkdir(parents=True, exist_ok=True)
            (site / path[1:]).write_bytes(CONTENT)
            server.faults[path] = list(faults)
        server.faults["/elsewhere"] = [elsewhere]
        try:
            if case.startswith("killed"):
                _child(downloader, server.url, place, base, kill=1.0)
            code, seconds, message, megabytes = _child(downloader, server.url, place, base)
        finally:
            handler.do_GET = get
    wrong = []
    found = [p for p in place.rglob("*") if p.is_file() and not p.is_symlink()]
    if code is None:
        wrong.append(f"not ended after {LIMIT} s")
    if code == 0 and (not (place / NAME).is_file() or (place / NAME).read_bytes() != CONTENT):
        wrong.append("succeeds with wrong bytes")
    if code == 1 and case in ("good", "drops, then good", "killed in the middle"):
        wrong.append("fails")
    if (size := sum(p.stat().st_size for p in found)) > 5 * SIZE:
        wrong.append(f"{size / 1e6:.0f} MB on the disk")
    if megabytes > 100:
        wrong.append(f"{megabytes:.0f} MB of memory")
    if (base / "login was sent").exists():
        wrong.append("sends the login to another host")
    if (outside / "file").read_text() != "must stay" or len(list(outside.iterdir())) > 1:
        wrong.append("writes through the link")
    if not message.replace("\n", "").isprintable():
        wrong.append("a message that a terminal obeys")
    if len(found) > 1 and not (place / ".cache").exists():  # the Hub keeps its notes there
        wrong.append("leaves a part that is never used again")
    end = "does not end" if code is None else "succeeds" if code == 0 else "fails"
    return f"{end} in {seconds:.1f} s", wrong


def _child(downloader, url, place, base, kill=None):
    """Exit code (None: had to be killed), seconds, message, and MB of memory that it took."""
    start, child = time.monotonic(), os.fork()
    if not child:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code, message = 0, ""
        try:
            downloader(url, place)
        except Exception as error:
            code, message = 1, str(error)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (base / "message").write_text(json.dumps([message, (peak - before) / 1000]))
        os._exit(code)
    while time.monotonic() - start < (kill or LIMIT):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            message, megabytes = json.loads((base / "message").read_text())
            return os.waitstatus_to_exitcode(status), time.monotonic() - start, message, megabytes
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, time.monotonic() - start, "", 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", default=os.devnull, help="file to write")
    args = parser.parse_args()
    ours_too = importlib.import_module("etfzoo.zoo.download")  # imported before the forks
    assert ours_too.transport
    with open(args.log, "w") as file:

        def log(line):
            print(line, flush=True)
            print(line, file=file, flush=True)

        for downloader in (ours, pooch, huggingface_hub):
            if downloader is not ours:
                version = importlib.import_module(downloader.__name__).__version__
            failed = 0
            log(f"{downloader.__name__} {version if downloader is not ours else ''}".strip())
            for case in CASES:
                with tempfile.TemporaryDirectory() as base:
                    end, wrong = attempt(downloader, case, Path(base))
                failed += bool(wrong)
                log(f"  {case}: {end}" + "".join(f"; WRONG: {w}" for w in wrong))
            log(f"  {failed} of {len(CASES)} cases end badly")


if __name__ == "__main__":
    main()
