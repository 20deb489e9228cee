"""Every kind of damaged or hostile model is refused in one line; more in benchmarks/attack.py."""

import json
import random

import pytest

import etfzoo
import mutations
import server as http
from etfzoo.zoo import download, manifest, publish
from testing import randomize

WEIGHTS = (mutations.DATA, mutations.INDEX)


pytestmark = pytest.mark.small_rn18


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A version and one of another network; and a server of the folder `site` beside them."""
    root = tmp_path_factory.mktemp("hostile")
    for name, classes in (("model", 5), ("other", 7)):
        model = etfzoo.build_classifier("rn18", classes, input_shape=(32, 32, 3))
        etfzoo.publish(randomize(model, seed=classes), root / name)
    with http.serve(root / "world/site") as server:
        yield root / "world", root / "model/1", root / "other/1", server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(download, "WAITS", (0.01,))
    for name in ("ETFZOO_HOME", "ETFZOO_INDEX"):
        monkeypatch.setenv(name, "")  # so that it is set back
    monkeypatch.setenv("ETFZOO_TIMEOUT", "5")
    monkeypatch.delenv("ETFZOO_OFFLINE", raising=False)


@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_refused(models, name):
    world = mutations.World(*models)
    where, mutate = mutations.MUTATIONS[name]
    what = mutate(random.Random(f"test {name}"), world)
    faults, message = mutations.refusal(world, where)
    assert not faults, (what, faults, message)


@pytest.mark.parametrize("where", ["folder", "address", "pinned", "index"])
def test_what_is_not_mutated_loads(models, where, monkeypatch):
    """So that the refusals above are no accident of the set-up."""
    world = mutations.World(*models)
    monkeypatch.setenv("ETFZOO_HOME", str(world.root / "cache"))
    monkeypatch.setenv("ETFZOO_INDEX", str(world.root / "index.json"))
    assert etfzoo.load(world.handle(where)).spec.num_classes == 5


def bytes_of_metadata(content):
    return lambda world: world.write(publish.METADATA, content, rehash=True)


def metadata(change):
    """A document that is changed."""

    def damage(world):
        document = json.loads((world.folder / publish.METADATA).read_bytes())
        change(document)
        world.write(publish.METADATA, json.dumps(document).encode(), rehash=True)

    return damage


def spec(**changes):
    return metadata(lambda document: document["spec"].update(changes))


def weights(*names):
    """Healthy files of a model with more classes."""

    def damage(world):
        for name in names:
            world.write(name, (world.other / name).read_bytes())
        world.rehash()

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (bytes_of_metadata(b"\xff\xfe\x00"), "cannot be read"),
        (bytes_of_metadata(b"[" * 10**6), "cannot be read: it is nested too deeply"),
        (bytes_of_metadata(b'{"format": 1, "format": 1}'), "a key occurs twice"),
        (bytes_of_metadata(b'{"format": NaN}'), "the number NaN is not finite"),
        (bytes_of_metadata(b"[1]"), "has no format number"),
        (metadata(lambda d: d.pop("format")), "has no format number"),
        (metadata(lambda d: d.update(format=0)), "has no format number"),
        (metadata(lambda d: d.update(format=99)), "has format 99, .*upgrade etfzoo"),
        (metadata(lambda d: d.pop("spec")), "has no usable spec"),
        (metadata(lambda d: d.update(spec=[])), "has no usable spec"),
        (metadata(lambda d: d.update(metrics=[1])), "metrics is no JSON object"),
        (spec(new=1), "unknown fields: .'new'"),
        (spec(backbone="rn19"), "unknown backbone 'rn19'"),
        (spec(backbone="rn34"), "do not fit the model: miss"),
        (spec(num_classes="5"), "has no usable spec"),
        (spec(num_classes=6), "do not fit"),
        (spec(num_classes=10**12), "do not fit"),
        (spec(mean=[1.0]), "3 numbers each"),
        (spec(std=[1, 0, 1]), "3 numbers each"),
        (spec(crop=-1), "crop must be in"),
        (spec(input_shape=[-4, 4, 3]), "input_shape must be"),
        (spec(class_names=[1, 2, 3, 4, 5]), "must be strings"),
        (spec(dtype="float33"), "cannot be built"),
        (weights(*WEIGHTS), "do not fit the model: .*classes instead of 5"),
        (weights(mutations.DATA), "damaged or incomplete"),
        (weights(mutations.INDEX), "do not fit the model: .*classes instead of 5"),
    ],
)
def test_right_hashes_of_what_is_no_model(models, damage, message):
    world = mutations.World(*models)
    damage(world)
    assert manifest.verify(world.folder)
    with pytest.raises(etfzoo.EtfzooError, match=message) as error:
        etfzoo.load(world.folder)
    assert str(error.value).isprintable() and str(world.folder) in str(error.value)


def test_a_folder_from_before_files_json(models):
    """It is loaded as it was then, by the checksums of the checkpoint alone."""
    world = mutations.World(*models)
    (world.folder / manifest.NAME).unlink()
    with pytest.raises(etfzoo.EtfzooError, match="files.json is missing: an incomplete copy"):
        etfzoo.load(world.folder)
    document = json.loads((world.folder / publish.METADATA).read_bytes())
    del document["manifest"]
    world.write(publish.METADATA, json.dumps(document).encode())
    assert etfzoo.load(world.folder).spec.num_classes == 5
    content = bytearray((world.folder / mutations.DATA).read_bytes())
    content[len(content) // 2] ^= 16
    world.write(mutations.DATA, bytes(content))
    with pytest.raises(etfzoo.EtfzooError, match="damaged or incomplete"):
        etfzoo.load(world.folder)
