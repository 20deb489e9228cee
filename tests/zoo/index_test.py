"""Tests of the index: what it refuses, how it grows, and loading by its names."""

import json
import os
import shutil

import numpy as np
import pytest

import etfzoo
import mutations
import server as http
from etfzoo.zoo import index, manifest
from testing import randomize

pytestmark = pytest.mark.small_rn18

ROW = {
    "dataset": "shapes/source",
    "num_classes": 3,
    "input_shape": [32, 32, 3],
    "head": "etf",
    "command": "python recipes/pretrain.py",
    "metrics": {"top1": 0.5},
    "licence": "CC0-1.0",
}


@pytest.fixture(scope="module")
def model():
    return randomize(etfzoo.build_classifier("rn18", 3, input_shape=(32, 32, 3)))


@pytest.fixture(scope="module")
def site(model, tmp_path_factory):
    """A server of `rn18_etf.x/1`, and the fields of that version in an index."""
    root = tmp_path_factory.mktemp("site")
    folder = etfzoo.publish(model, root / "rn18_etf.x", licence="CC0-1.0")
    listing = manifest.read(folder) | {manifest.NAME: manifest.entry_of(folder / manifest.NAME)}
    with http.serve(root) as server:
        server.published = {
            "urls": [f"{server.url}/rn18_etf.x/1"],
            "files": manifest.as_json(listing),
            "metrics": {"top1": 0.25},
            "created": "2026-01-01T00:00:00+00:00",
        }
        server.size = sum(entry.size for entry in listing.values())
        yield server


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    path = tmp_path / "zoo/index.json"
    path.parent.mkdir()
    monkeypatch.setenv("ETFZOO_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ETFZOO_INDEX", str(path))
    monkeypatch.delenv("ETFZOO_OFFLINE", raising=False)
    return path


def refused(call, *args):
    with pytest.raises(etfzoo.EtfzooError) as error:
        call(*args)
    assert str(error.value).isprintable() and len(str(error.value)) < 900
    return str(error.value)


def test_adding_versions(own_index, site):
    index.add(own_index, "rn18_etf.x", 1, ROW, site.published)
    index.add(own_index, "rn18_etf.x", 3, ROW | {"licence": "MIT"}, site.published)
    index.add(own_index, "rn18_etf.y", 1, ROW, site.published)
    found = index.load(own_index)
    assert found.index_version == 3 and found.defaults == {"rn18_etf": "x"}
    row = found.models["rn18_etf.x"]
    assert (row.tag, row.licence, set(row.versions)) == ("x", "MIT", {1, 3})
    assert row.versions[1].files[manifest.NAME].size > 0
    before = own_index.read_bytes()
    index.add(own_index, "rn18_etf.x", 1, ROW, site.published)  # the same again changes nothing
    assert "has a version 1 of rn18_etf.x already" in refused(
        index.add, own_index, "rn18_etf.x", 1, ROW, site.published | {"metrics": {"top1": 0.5}}
    )
    assert "broken: urls of version 2" in refused(
        index.add, own_index, "rn18_etf.x", 2, ROW, site.published | {"urls": ["file:///x"]}
    )
    assert own_index.read_bytes() == before
    assert os.listdir(own_index.parent) == ["index.json"]
    everything = index.read().models
    assert {"rn18_etf.x", "rn50_etf.in1k"} <= everything.keys()  # beside those of the package


@pytest.mark.parametrize("name", mutations.DOCUMENTS)
def test_what_is_no_index(own_index, name):
    own_index.write_bytes(mutations.DOCUMENTS[name])
    assert str(own_index) in refused(etfzoo.list_models)


def test_no_index_there(own_index):
    assert f"index {own_index} cannot be read: No such file" in refused(etfzoo.load, "rn18_etf.x")


@pytest.mark.parametrize(
    "name",
    ["rn18_etf", "rn19_etf.x", "rn18_eft.x", "rn18_etf.", "rn18_etf.x.y", "rn18_etf./x", "../x"]
    + ["rn18_etf.x@1", "RN18_etf.x", "rn18_etf.x\n", ""],
)
def test_names(name):
    assert "is no name for a model" in refused(index.check_name, name)
    assert index.check_name("rn101_sw.tiny100_64-b") == ("rn101", "sw", "tiny100_64-b")


def test_loading_by_a_name_of_the_index(own_index, site, model, tmp_path):
    index.add(own_index, "rn18_etf.x", 1, ROW, site.published)
    found = etfzoo.info("rn18_etf")
    assert not (tmp_path / "cache").exists() and site.requests == []
    assert found["size_bytes"] == site.size
    expected = {"name": "rn18_etf.x", "version": 1, "path": None, "published": True}
    expected |= {"dataset": "shapes/source", "metrics": {"top1": 0.25}, "licence": "CC0-1.0"}
    assert found | expected == found and found["spec"]["head"] == "etf"

    loaded = etfzoo.load("rn18_etf")
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(loaded(images), model(images))
    folder = tmp_path / "cache/rn18_etf.x/1"
    assert etfzoo.info("rn18_etf.x")["path"] == str(folder)
    assert "# rn18_etf.x, version 1" in etfzoo.info("rn18_etf.x@1")["card"]
    assert "has no version 2 here; it has: 1" in refused(etfzoo.load, "rn18_etf.x@2")
    assert etfzoo.load("rn18_etf.x", load_weights=False).spec == model.spec

    # A damaged file in the cache is noticed by the hashes of the index and fetched again.
    data = folder / "variables/variables.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    np.testing.assert_array_equal(etfzoo.load("rn18_etf.x")(images), model(images))


def test_a_newer_version_is_said(own_index, site, tmp_path, caplog):
    caplog.set_level("INFO", "etfzoo")
    index.add(own_index, "rn18_etf.x", 1, ROW, site.published)
    etfzoo.load("rn18_etf.x")
    index.add(own_index, "rn18_etf.x", 2, ROW, site.published)
    caplog.clear()
    assert etfzoo.info("rn18_etf.x")["version"] == 1  # what is here is taken
    assert caplog.messages == ["rn18_etf.x@2 is newer than version 1 here and published"]
    assert etfzoo.info("rn18_etf.x@2")["path"] is None


def test_the_default_points_to_what_exists(own_index, site):
    """An unpublished model gives way; a published one stays, unless the publisher says so."""
    document = {"format": 2, "index_version": 1, "defaults": {"rn18_etf": "in1k"}}
    document["models"] = {"rn18_etf.in1k": {"tag": "in1k"} | ROW | {"versions": {}}}
    own_index.write_text(json.dumps(document))
    found = []
    for name, default in [("x", False), ("y", False), ("z", True)]:
        index.add(own_index, f"rn18_etf.{name}", 1, ROW, site.published, default)
        found.append(index.load(own_index))
    assert [i.defaults["rn18_etf"] for i in found] == ["x", "x", "z"]
    assert [i.index_version for i in found] == [2, 3, 4]


def test_the_line_about_a_bare_name(own_index, model, tmp_path, caplog):
    caplog.set_level("INFO", "etfzoo")
    home = tmp_path / "cache"
    provenance, metrics = {"dataset": "tiny_imagenet"}, {"top1": 0.4157}
    folder = etfzoo.publish(model, home / "rn18_etf.x", provenance=provenance, metrics=metrics)
    document = {"format": 2, "index_version": 1, "defaults": {"rn18_etf": "x"}, "models": {}}
    for tag, versions in [("x", {}), ("in1k", {})]:
        row = ROW | {"dataset": "ImageNet-1k"}
        document["models"][f"rn18_etf.{tag}"] = {"tag": tag} | row | {"versions": versions}
    own_index.write_text(json.dumps(document))
    line = (
        f"rn18_etf is rn18_etf.x version 1 ({folder}): trained on tiny_imagenet, 32x32 pixels, 3 "
        "classes, top-1 41.6 %"
    )
    etfzoo.load("rn18_etf")
    assert caplog.messages == [line + "; ImageNet-1k weights are not published"]
    caplog.clear()
    del document["models"]["rn18_etf.in1k"]  # once they are, nothing has to be said
    own_index.write_text(json.dumps(document))
    etfzoo.load("rn18_etf")
    assert caplog.messages == [line]


@pytest.mark.parametrize("offline", ["", "1"])
def test_weights_without_an_address(own_index, site, model, tmp_path, monkeypatch, offline):
    """As from a wheel: the index knows the model, and its weights come with a checkout."""
    monkeypatch.setenv("ETFZOO_OFFLINE", offline)
    index.add(own_index, "rn18_etf.x", 1, ROW, site.published | {"urls": []})
    target = tmp_path / "cache/rn18_etf.x/1"
    message = refused(etfzoo.load, "rn18_etf")
    assert message.startswith(f"the weights of rn18_etf.x@1 are not in {target}, and the index has")
    assert "saved_models/ of its source repository and in no wheel" in message
    assert "copy saved_models/rn18_etf.x/1 to that place (below ETFZOO_HOME)" in message
    assert etfzoo.load("rn18_etf", load_weights=False).output_shape == (None, 3)
    shutil.copytree(site.root / "rn18_etf.x/1", target)  # as it says
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(etfzoo.load("rn18_etf")(images), model(images))


def test_offline(own_index, site, monkeypatch):
    index.add(own_index, "rn18_etf.x", 1, ROW, site.published)
    monkeypatch.setenv("ETFZOO_OFFLINE", "1")
    message = refused(etfzoo.load, "rn18_etf.x")
    assert "rn18_etf.x@1 is not in " in message and "ETFZOO_OFFLINE" in message
    monkeypatch.delenv("ETFZOO_OFFLINE")
    etfzoo.load("rn18_etf.x")
    monkeypatch.setenv("ETFZOO_OFFLINE", "1")
    assert etfzoo.load("rn18_etf.x").spec.num_classes == 3


def test_an_address_as_a_handle(own_index, site, monkeypatch, capsys):
    """Nothing is on stdout but what the user prints."""
    monkeypatch.setenv("ETFZOO_INDEX", "")
    pin = site.published["files"][manifest.NAME]["sha256"]
    assert etfzoo.load(f"{site.published['urls'][0]}#sha256={pin}").spec.num_classes == 3
    assert capsys.readouterr().out == ""
    found = etfzoo.info(site.published["urls"][0])
    assert (found["name"], found["version"]) == ("rn18_etf.x", 1)
