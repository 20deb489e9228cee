"""Pushing to the hub: huggingface_hub's own client at a hub on this machine.

Hugging Face's was never asked. This one answers as its pages say, as far as the client asks.
"""

import base64
import hashlib
import http.server
import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml

import etfzoo
from etfzoo.errors import EtfzooError
from etfzoo.zoo import push
from etfzoo.zoo.metadata import read_metadata
from testing import make_classifier, random_pixels, run_recipe

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
pytestmark = pytest.mark.small_rn18
TOKEN = "hf_of_this_test"


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories in memory; files of 1 kB and more go the way of large ones."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, document=b"", status=200, headers=()):
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        for key, value in ({"Content-Length": len(content)} | dict(headers)).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_HEAD(self):
        repository, _, path = self.path.lstrip("/").partition("/resolve/main/")
        content = self.server.repositories.get(repository, {}).get(path)
        if content is None:
            self.answer(status=404, headers={"X-Error-Code": "EntryNotFound"})
            return
        named = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "c" * 40}
        self.answer(content, headers=named)

    do_GET = do_HEAD

    def do_PUT(self):
        self.server.large[self.path.rpartition("/")[2]] = self.body()
        self.answer()

    def do_POST(self):
        body, repositories = self.body(), self.server.repositories
        if self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, status=401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.private[name] = asked.get("visibility") == "private" or asked.get("private")
            status = 409 if name in repositories else 200
            repositories.setdefault(name, {})
            self.answer({"url": f"{self.server.url}/{name}"}, status=status)
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= 1000 else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{self.server.url}/store/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            if self.server.full:
                self.answer({"error": "Storage limit reached"}, status=403)
                return
            name = re.fullmatch("/api/models/([^/]+/[^/]+)/commit/main", self.path)[1]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repositories[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repositories[name][value["path"]] = self.server.large[value["oid"]]
            self.server.commits += 1
            self.answer({"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "c" * 40})
        else:
            self.answer({"error": self.path}, status=404)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.large, server.private = {}, {}, {}
    server.full, server.commits = False, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", server.url)  # of other processes
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub_cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("ETFZOO_HOME", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A version with all that a card may tell."""
    folder = tmp_path_factory.mktemp("models") / "rn18_etf.birds"
    return etfzoo.publish(
        make_classifier(),
        folder,
        version=2,
        licence="CC BY 4.0",
        metrics={"top1": 0.5, "top5": 0.875, "examples": 8, "split": "validation"},
        provenance={"dataset": "birds/small", "title": "Birds", "epochs": 3, "seed": 3},
    )


def test_a_version_arrives_and_is_loaded(hub, published):
    address = push.push(published, "hf://owner/birds", private=True)
    assert hub.commits == 1 and hub.private["owner/birds"] is True
    stored = hub.repositories["owner/birds"]
    files = {p.relative_to(published.parent).as_posix(): p for p in published.rglob("*")}
    files = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    assert {name: stored[name] for name in files} == files
    assert stored.keys() - files.keys() == {"README.md"}
    assert len(hub.large) >= 2  # the graph and the variables
    model, there = etfzoo.load(published), etfzoo.load(address)
    np.testing.assert_array_equal(there(random_pixels()), model(random_pixels()))
    assert address.startswith("hf://owner/birds/2#sha256=")
    with pytest.raises(EtfzooError, match="sha256"):
        etfzoo.load(address[:-1] + ("0" if address[-1] != "0" else "1"))


def test_the_card_is_one_that_the_hub_understands(hub, published):
    push.push(published, "hf://owner/birds")
    text = hub.repositories["owner/birds"]["README.md"].decode()
    card = huggingface_hub.ModelCard(text)  # parses the header and its results
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "keras"
    assert card.data.pipeline_tag == "image-classification" and "etfzoo" in card.data.tags
    found = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert found == {"top-1": 0.5, "top-5": 0.875}
    assert {(r.dataset_name, r.dataset_split) for r in card.data.eval_results} == {
        ("Birds", "validation")
    }
    card.validate()  # by the client, at the hub's address
    assert "# rn18_etf.birds, version 2" in card.text and "Top-1: 50.00 %" in card.text
    header = yaml.safe_load(text.split("---")[1])
    assert header["model-index"][0]["results"][0]["dataset"]["type"] == "birds_small"


@pytest.mark.parametrize(
    "licence, expected",
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        (None, {}),
        (
            "research use only: ImageNet's terms",
            {"license": "other", "license_name": "research-use-only-imagenet-s-terms"},
        ),
    ],
)
def test_licences(licence, expected, published):
    metadata = read_metadata(published) | {"licence": licence}
    header = yaml.safe_load(push.hub_card("rn18_etf.birds", 2, metadata).split("---")[1])
    assert {k: v for k, v in header.items() if "license" in k} == expected


def test_a_version_is_never_overwritten(hub, published, tmp_path):
    first = push.push(published, "hf://owner/birds")
    assert push.push(published, "hf://owner/birds") == first and hub.commits == 1
    other = etfzoo.publish(make_classifier(seed=4), tmp_path / "rn18_etf.birds", 2)
    before = dict(hub.repositories["owner/birds"])
    with pytest.raises(EtfzooError, match="has another version 2: .* under a new number"):
        push.push(other, "hf://owner/birds")
    assert hub.repositories["owner/birds"] == before
    another = shutil.copytree(other, tmp_path / "rn18_etf.birds" / "3")
    push.push(another, "hf://owner/birds")  # both are there
    assert {"2/saved_model.pb", "3/saved_model.pb"} <= hub.repositories["owner/birds"].keys()


def test_what_goes_wrong_is_one_line_and_leaves_nothing(hub, published, tmp_path, monkeypatch):
    def refused(folder, address):
        with pytest.raises(EtfzooError) as error:
            push.push(folder, address)
        assert "\n" not in str(error.value) and TOKEN not in str(error.value)
        return str(error.value)

    for address in (
        "owner/birds",
        "hf://birds",
        "hf://a/b/c",
        "hf://a/b@c",
        "hf://a/re po",
        "hf://-a/b",
    ):
        assert "is no repository" in refused(published, address)
    damaged = Path(shutil.copytree(published, tmp_path / "rn18_etf.birds" / "1"))
    (damaged / "saved_model.pb").write_bytes(b"x")
    assert "saved_model.pb" in refused(damaged, "hf://owner/birds")
    assert hub.repositories == {}
    hub.full = True
    assert "did not take the model" in refused(published, "hf://owner/birds")
    assert hub.repositories == {"owner/birds": {}} and hub.commits == 0
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    assert "did not take the model" in refused(published, "hf://owner/birds")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "did not take the model" in refused(published, "hf://owner/birds")


def test_the_command(hub, published, tmp_path):
    """Published and pushed by one command; pushed again after the hub was full."""
    flags = ["--name=rn18_etf.birds", "--push=hf://owner/birds", f"--models_dir={tmp_path}/zoo"]
    assert "publish it with --workdir=DIR" in run_recipe("publish", *flags, code=2)
    hub.full = True
    text = run_recipe("publish", f"--model={published}", *flags, code=2)
    assert "published " in text and "did not take the model" in text
    hub.full = False
    text = run_recipe("publish", *flags, "--private")
    assert re.search("pushed: hf://owner/birds/1#sha256=[0-9a-f]{64}", text)
    assert hub.commits == 1 and "1/saved_model.pb" in hub.repositories["owner/birds"]
    text = run_recipe("publish", *flags[:1], "--push=owner/birds", code=2)
    assert "'owner/birds' is no repository of the hub: write hf://owner/repo" in text
