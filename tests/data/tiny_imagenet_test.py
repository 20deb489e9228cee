"""Tests of the data set made from Tiny ImageNet's archive, on a small archive of its layout."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from etfzoo.data import sources, tiny_imagenet
from etfzoo.errors import EtfzooError
from etfzoo.zoo import index, saved_model
from testing import CHECKOUT, leftovers, run_recipe

WNIDS = [f"n{10_000_000 + 37 * i:08d}" for i in range(200)]
CHOSEN = WNIDS[::2]
PER_CLASS = {"train": 3, "validation": 2}
ROOT = "tiny-imagenet-200"


def jpeg(rng, size=(64, 64)):
    """Every tenth is grey, as some of the archive's are."""
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels).convert("L" if rng.random() < 0.1 else "RGB")
    with io.BytesIO() as file:
        image.save(file, "JPEG", quality=int(rng.integers(30, 95)))
        return file.getvalue()


@pytest.fixture(scope="module")
def images():
    """`{split: {file name: (wnid, bytes)}}` of all 200 classes."""
    rng = np.random.default_rng(0)
    train = [(f"{w}_{i}.JPEG", w) for w in WNIDS for i in range(PER_CLASS["train"])]
    order = random.Random(0).sample([w for w in WNIDS for _ in range(PER_CLASS["validation"])], 400)
    validation = [(f"val_{i}.JPEG", w) for i, w in enumerate(order)]
    named = {"train": train, "validation": validation}
    return {s: {name: (w, jpeg(rng)) for name, w in pairs} for s, pairs in named.items()}


@pytest.fixture(scope="module")
def unpacked(images, tmp_path_factory):
    """The folder tiny-imagenet-200, with everything that the archive has."""
    root = tmp_path_factory.mktemp("archive") / ROOT
    for name, (wnid, content) in images["train"].items():
        path = root / "train" / wnid / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for wnid in WNIDS:
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t1\t2\t3\n")
    (root / "val/images").mkdir(parents=True)
    (root / "test/images").mkdir(parents=True)
    (root / "test/images/test_0.JPEG").write_bytes(content)
    for name, (_, content) in images["validation"].items():
        (root / "val/images" / name).write_bytes(content)
    lines = (f"{name}\t{wnid}\t0\t32\t44\t62\n" for name, (wnid, _) in images["validation"].items())
    (root / "val/val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(random.Random(1).sample(WNIDS, 200)))
    words = ["n00001740\tentity", *(f"{w}\tthing {w}, it" for w in reversed(WNIDS))]
    (root / "words.txt").write_text("\n".join(words) + "\n")
    return root


@pytest.fixture(scope="module")
def packed(unpacked):
    return shutil.make_archive(unpacked.parent / "packed", "zip", unpacked.parent, ROOT)


@pytest.fixture(scope="module")
def prepared(packed, tmp_path_factory):
    """A data directory that the recipe made from the zip file, and what it printed."""
    data_dir = tmp_path_factory.mktemp("data") / "new"
    return data_dir, run_recipe("prepare", f"--archive={packed}", f"--data_dir={data_dir}")


def stored(data_dir):
    """Raw records of the files, without TFDS: `{file: [(label, bytes), ...]}` in order."""
    found = {}
    for path in sorted((data_dir / "tiny_imagenet/1.0.0").glob("*.tfrecord-*")):
        examples = (
            tf.train.Example.FromString(r.numpy()).features.feature
            for r in tf.data.TFRecordDataset(str(path))
        )
        found[path.name] = [
            (e["label"].int64_list.value[0], e["image"].bytes_list.value[0]) for e in examples
        ]
    return found


def test_every_record_is_an_image_of_the_archive_untouched(images, prepared):
    found = stored(prepared[0])
    for split, files in images.items():
        shards = [f"tiny_imagenet-{split}.tfrecord-0000{i}-of-00004" for i in range(4)]
        records = [r for name in shards for r in found.pop(name)]
        wanted = [(CHOSEN.index(w), content) for w, content in files.values() if w in CHOSEN]
        assert sorted(records) == sorted(wanted) and len(records) == 100 * PER_CLASS[split]
        assert [label for label, _ in records] != sorted(label for label, _ in records)  # shuffled
    assert not found


def test_what_tfds_reads(prepared, images):
    """The features, splits and names that the data set has elsewhere, from its files alone."""
    builder = tfds.builder_from_directory(prepared[0] / "tiny_imagenet/1.0.0")
    assert builder.info.full_name == "tiny_imagenet/1.0.0"
    features = builder.info.features
    assert features.keys() == {"image", "label"} and features["label"].names == CHOSEN
    assert (features["image"].shape, features["image"].dtype) == ((64, 64, 3), np.uint8)
    assert features["image"].get_tensor_info().shape == (64, 64, 3)
    assert builder.info.supervised_keys == ("image", "label")
    counts = {name: s.num_examples for name, s in builder.info.splits.items()}
    assert counts == {"train": 300, "validation": 200}
    by_pixels = {
        tf.io.decode_jpeg(content, channels=3).numpy().tobytes(): wnid
        for wnid, content in images["validation"].values()
    }
    for image, label in tfds.as_numpy(builder.as_dataset(split="validation", as_supervised=True)):
        assert by_pixels[image.tobytes()] == CHOSEN[label]


def test_as_a_source(prepared):
    source = sources.resolve("tiny_imagenet", str(prepared[0]))
    assert source.class_names == tuple(CHOSEN)
    assert source.class_descriptions == tuple(f"thing {w}, it" for w in CHOSEN)
    assert {role: source.size(role) for role in ("train", "fit", "select", "test")} == {
        "train": 300, "fit": 270, "select": 30, "test": 200,
    }  # fmt: skip
    first = next(iter(source.records("train")))
    assert first["record"].numpy() == b"tiny_imagenet-train.tfrecord-00000-of-00004__0"


def test_the_recipe(prepared, packed, unpacked):
    data_dir, printed = prepared
    assert "preparing - 500/500" in printed
    assert "prepared: 100 classes, train 300 images, validation 200 images" in printed
    assert "note: the public archive has 50,000 (train), 5,000 (validation)" in printed
    assert leftovers(data_dir) == ["tiny_imagenet"]
    assert leftovers(data_dir / "tiny_imagenet") == ["1.0.0"]
    before = {p: p.stat().st_mtime_ns for p in data_dir.rglob("*")}
    again = run_recipe("prepare", "--archive=nowhere.zip", f"--data_dir={data_dir}")
    assert again.startswith("there already: 100 classes") and "preparing" not in again
    assert {p: p.stat().st_mtime_ns for p in data_dir.rglob("*")} == before


@pytest.mark.parametrize("place", [".", ".."])
def test_from_the_folder_it_is_the_same(unpacked, prepared, tmp_path, place):
    """Also beside what a killed preparation left."""
    (tmp_path / "tiny_imagenet/1.0.0.incompleteABCDEF_1.0.0").mkdir(parents=True)
    folder = tiny_imagenet.prepare(unpacked / place, tmp_path)
    assert folder == tmp_path / "tiny_imagenet/1.0.0"
    assert stored(tmp_path) == stored(prepared[0])
    for name in ("label.labels.txt", "words.txt", "features.json"):
        there = prepared[0] / "tiny_imagenet/1.0.0" / name
        assert (folder / name).read_text() == there.read_text()


def test_a_data_set_that_is_not_prepared_says_how(tmp_path):
    with pytest.raises(EtfzooError) as error:
        sources.resolve("tiny_imagenet", str(tmp_path))
    assert f"tiny_imagenet is not prepared under {tmp_path}/tiny_imagenet" in str(error.value)
    assert "python recipes/prepare.py --archive=tiny-imagenet-200.zip" in str(error.value)


FIRST = f"train/{CHOSEN[0]}/images/{CHOSEN[0]}_0.JPEG"


def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda r: (r / "val/val_annotations.txt").unlink(), "val/val_annotations.txt in"),
        (lambda r: (r / "wnids.txt").unlink(), "is not Tiny ImageNet: wnids.txt is missing"),
        (lambda r: (r / "words.txt").unlink(), "words.txt in"),
        (lambda r: (r / "words.txt").write_text("n1\tx\n"), "words.txt lacks the words of n100"),
        (lambda r: shutil.rmtree(r / "train" / CHOSEN[7]), f"train lacks images of {CHOSEN[7]};"),
        (lambda r: (r / FIRST).unlink(), f"train lacks images of {CHOSEN[0]};"),
        (lambda r: shutil.rmtree(r / "train"), f"of {', '.join(CHOSEN[:3])} and others;"),
        (lambda r: shutil.rmtree(r / "val/images"), "val/images lacks images of val/images/val_"),
        (lambda r: rewrite(r / "val/val_annotations.txt", lambda b: b[: len(b) // 2]), "lacks"),
        (lambda r: rewrite(r / FIRST, lambda b: b[: len(b) // 2]), f"{FIRST} is no JPEG image"),
        (lambda r: rewrite(r / FIRST, lambda b: b""), f"{FIRST} is no JPEG image"),
        (lambda r: rewrite(r / FIRST, lambda b: b"\x89PNG" + b), f"{FIRST} is no JPEG image"),
        (
            lambda r: (r / FIRST).write_bytes(jpeg(np.random.default_rng(0), (64, 48))),
            f"{FIRST} has 64 x 48 pixels instead of 64 x 64",
        ),
    ],
)
def test_a_damaged_folder(unpacked, tmp_path, damage, message):
    damaged = shutil.copytree(unpacked, tmp_path / ROOT)
    damage(damaged)
    with pytest.raises(EtfzooError) as error:
        tiny_imagenet.prepare(damaged, tmp_path / "data")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert leftovers(tmp_path / "data") == []


def test_a_damaged_zip_file(packed, unpacked, tmp_path):
    content = open(packed, "rb").read()
    broken = tmp_path / "broken.zip"
    data = tmp_path / "data"
    for bad, message in [
        (content[: len(content) // 2], "is no zip file, or only a part of one"),
        (b"", "is no zip file, or only a part of one"),
    ]:
        broken.write_bytes(bad)
        with pytest.raises(EtfzooError, match=message):
            tiny_imagenet.prepare(broken, data)
        assert not data.exists()
    # One byte of an image has changed on the way, late in the archive: half of it is written then.
    annotations = (unpacked / "val/val_annotations.txt").read_text().splitlines()
    name = next(
        f"{ROOT}/val/images/{line.split()[0]}" for line in annotations if line.split()[1] in CHOSEN
    )
    with zipfile.ZipFile(packed) as archive:
        place = archive.getinfo(name).header_offset + 30 + len(name) + 100
    broken.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
    printed = run_recipe("prepare", f"--archive={broken}", f"--data_dir={data}", code=2)
    assert f"{name.removeprefix(ROOT + '/')} in {broken} cannot be read" in printed
    assert leftovers(data) == []
    assert "No such file" in run_recipe("prepare", "--archive=x.zip", f"--data_dir={data}", code=2)
    assert "say where it is" in run_recipe("prepare", f"--data_dir={data}", code=2)


def git(folder, *arguments):
    who = "-c", "user.name=t", "-c", "user.email=t@example.org"
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


@pytest.mark.slow
def test_from_the_archive_to_a_name_in_a_clone(prepared, images, tmp_path):
    """Prepare, train, publish, commit and clone; the clone knows the model offline, by words."""
    run = tmp_path / "run"
    flags = "--backbone=rn18", "--protocol=quickstart", "--image_size=16", "--epochs=1"
    data = f"--data_dir={prepared[0]}"
    run_recipe("pretrain", "--dataset=tiny_imagenet", data, *flags, f"--workdir={run}")
    checkout, clone = tmp_path / "checkout", tmp_path / "clone"
    for name in ("etfzoo", "recipes"):
        shutil.copytree(CHECKOUT / name, checkout / name)
    for name in ("setup.py", ".gitignore", ".gitattributes"):
        shutil.copy(CHECKOUT / name, checkout)
    git(tmp_path, "init", "-q", checkout)
    before = index.load(checkout / "etfzoo/zoo/index.json")
    publish = "--name=rn18_etf.tiny100_64", "--storage=float16", f"--workdir={run}"
    where = f"--models_dir={checkout}/saved_models", f"--index={checkout}/etfzoo/zoo/index.json"
    run_recipe("publish", *publish, *where, "--default")
    git(checkout, "config", "core.autocrlf", "true")  # as on Windows: hashes must not change
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "a model")
    git(tmp_path, "-c", "core.autocrlf=true", "clone", "-q", checkout, clone)

    after = index.load(clone / "etfzoo/zoo/index.json")
    assert after.index_version == before.index_version + 1
    assert after.defaults == before.defaults | {"rn18_etf": "tiny100_64"}
    folder = clone / "saved_models/rn18_etf.tiny100_64/1"
    published = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in published) < 25e6 < saved_model.SHARD_BYTES < 95e6
    card = (folder / "README.md").read_text()
    assert card == (folder.parent / "README.md").read_text()
    assert "unknown" not in card.lower() + json.dumps(after.models["rn18_etf.tiny100_64"].metrics)
    for part in (
        "| Trained on | tiny_imagenet: 100 classes of Tiny ImageNet",
        "--dataset=tiny_imagenet --backbone=rn18",
        "| Epochs | 1 |",
        "| Licence of the weights | as the training images (ImageNet's terms: non-commercial",
        "On 200 images of the validation split:\n\n- Top-1: ",
        "- Top-5: ",
    ):
        assert part in card
    assert str(tmp_path) not in card and str(prepared[0]) not in card

    photo = tmp_path / "photo.jpg"
    photo.write_bytes(images["validation"]["val_0.JPEG"][1])
    code = (
        "import sys, etfzoo\n"
        "m = etfzoo.load('rn18_etf')\n"
        "logits = m(etfzoo.preprocess(m, sys.argv[1]))\n"
        "print(m.output_shape, m.spec.class_names[0], etfzoo.decode_predictions(m, logits)[0][0])\n"
    )
    environment = {"ETFZOO_HOME": str(tmp_path / "none"), "ETFZOO_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code, photo],
        cwd=clone,
        env=os.environ | environment | {"PYTHONPATH": str(clone), "ETFZOO_INDEX": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"(None, 100) {CHOSEN[0]} (")
    assert "'thing n1" in process.stdout and ", it'" in process.stdout
    (line,) = (x for x in process.stderr.splitlines() if "rn18_etf" in x)
    assert line.startswith(f"rn18_etf is rn18_etf.tiny100_64 version 1 ({folder}): trained on ")
    assert "tiny_imagenet, 16x16 pixels, 100 classes, top-1 " in line
    served = tf.saved_model.load(str(folder)).signatures["serving_bytes"]
    (labels,) = served(image_bytes=tf.constant([photo.read_bytes()]))["labels"].numpy()
    assert all(label.startswith(b"thing n1") for label in labels)
