"""Folders and data sets that were made to hurt, or are broken: one line each, and no code runs."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from etfzoo.data import folders, shapes, sources
from etfzoo.errors import EtfzooError
from testing import make_image_folder, nobody, small_disk, smooth_image


def one_line(call, *arguments):
    with pytest.raises(EtfzooError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def read(source, split="train"):
    return [os.fsdecode(r["record"]) for r in source.records(split).as_numpy_iterator()]


def resolve(root):
    return sources.resolve(f"folder:{root}")


def images(source):
    return {name for split in ("train", "test") for name in read(source, split)}


def open_to_all(path):
    """Lets everybody search the folders that lead to a path of pytest."""
    for folder in (path, *path.parents):
        if folder.name.startswith(("pytest-", "popen-")) or folder == path:
            folder.chmod(0o755)


# -------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Testing"),
        ("test", "val"),
        ("Train", "test"),
        ("train", "Testing"),
        ("train", "dev"),
        ("TRAIN",),
        ("test", "valid", "a"),
    ],
)
def test_folders_of_splits_are_no_classes(names, tmp_path):
    for name in names:
        make_image_folder(tmp_path / name, {"a": 4, "b": 4})
    line = one_line(resolve, tmp_path)
    assert all(name in line for name in names) and "expected train/" in line


def test_two_spellings_of_a_split(tmp_path):
    for name in ("train", "val", "validation"):
        make_image_folder(tmp_path / name, {"a": 4, "b": 4})
    assert "val and validation, which mean the same split" in one_line(resolve, tmp_path)


def test_one_class_may_be_called_like_a_split(tmp_path):
    make_image_folder(tmp_path, {"apple": 4, "test": 4})
    assert resolve(tmp_path).class_names == ("apple", "test")


def test_what_is_left_out_is_counted_and_named(tmp_path, caplog):
    make_image_folder(tmp_path / "train", {"a": 3, "b": 3, "b/.thumbs": 2})
    make_image_folder(tmp_path / "test", {"a": 1, "b": 1})
    make_image_folder(tmp_path / "old", {"a": 1})
    for name in ("notes.txt", "clip.tiff", "x.jpeg2000", "y.svg"):
        (tmp_path / "train" / "a" / name).write_bytes(b"x")
    (tmp_path / "train" / "labels.csv").write_bytes(b"x")
    (tmp_path / "train" / "b" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "train" / "b" / "fifo.jpg")
    with caplog.at_level("WARNING", "etfzoo"):
        assert len(images(resolve(tmp_path))) == 8
    (line,) = (record.getMessage() for record in caplog.records)
    for part in (
        "1 files and folders beside those of the splits (old)",
        "1 files outside of the folders of the classes (train/labels.csv)",
        "4 files that are not .jpg, .jpeg, .png, .bmp, .gif (train/a/clip.tiff, "
        "train/a/notes.txt, train/a/x.jpeg2000, ...)",
        "1 hidden files and folders (train/b/.thumbs)",
        "1 links that lead nowhere (train/b/gone.png)",
        "1 FIFOs, devices and sockets (train/b/fifo.jpg)",
    ):
        assert part in line


def test_links_are_followed_but_not_in_circles(tmp_path, caplog):
    make_image_folder(tmp_path / "photos", {"a": 3, "b": 3})
    make_image_folder(tmp_path / "elsewhere", {"2024": 5})
    (tmp_path / "photos" / "b" / "2024").symlink_to("../../elsewhere/2024")
    (tmp_path / "photos" / "a" / "up").symlink_to("../../photos")
    (tmp_path / "photos" / "a" / "self").symlink_to("self")
    (tmp_path / "photos" / "c").symlink_to("../elsewhere")
    found = images(resolve(tmp_path / "photos"))
    assert "b/2024/004.png" in found and "c/2024/000.png" in found
    # By way of a/up each class is there once more, below which nothing repeats.
    assert {n for n in found if n.count("up")} == {n for n in found if n.count("up") == 1}
    assert "links to a folder that they lie in" in caplog.text
    assert "links that lead nowhere (a/self" in caplog.text


def test_webp_is_counted_and_named(tmp_path, caplog):
    make_image_folder(tmp_path, {"a": 3, "b": 3})
    make_image_folder(tmp_path, {"b": 6}, suffix=".webp")
    assert len(images(resolve(tmp_path))) == 6
    assert "6 files that are not .jpg, .jpeg, .png, .bmp, .gif (b/000.webp, " in caplog.text


def test_names_that_are_not_utf_8(tmp_path):
    make_image_folder(tmp_path, {"a": 3, "b": 3})
    shutil.copy(tmp_path / "a" / "000.png", os.fsencode(tmp_path / "a") + b"/caf\xe9.png")
    assert os.fsdecode(b"a/caf\xe9.png") in images(resolve(tmp_path))
    shutil.copytree(os.fsencode(tmp_path / "a"), os.fsencode(tmp_path) + b"/\xe9")
    assert "is not UTF-8: rename it" in one_line(resolve, tmp_path)


def test_locked_folders_are_named(tmp_path):
    make_image_folder(tmp_path, {"a": 3, "b": 3, "b/inside": 2})
    open_to_all(tmp_path)
    for path in (tmp_path / "b" / "inside", tmp_path / "b", tmp_path):
        path.chmod(0o300)
        with nobody():
            assert f"{path} cannot be read: Permission denied" in one_line(resolve, tmp_path)
        path.chmod(0o755)


@pytest.mark.parametrize("name", ["", "~nobody-of-this-name/x", "a\0b", "y" * 256, "x/" * 3000])
def test_paths_that_cannot_be(name):
    assert one_line(resolve, name)


def test_images_that_a_user_names(tmp_path, caplog):
    make_image_folder(tmp_path, {"a": 2})
    (tmp_path / "a" / "notes.txt").write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo.jpg")
    assert len(folders.image_files([tmp_path / "a", tmp_path / "a" / "notes.txt"])) == 3
    assert "1 files that are not .jpg" in caplog.text and "notes.txt" in caplog.text
    for path in (tmp_path / "fifo.jpg", "/dev/zero"):
        assert "is neither a file nor a folder" in one_line(folders.image_files, [path])


# ----------------------------------------------------------------------------------------- TFDS

SHARD = "made-train.tfrecord-00000-of-00001"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A prepared data set of 12 images in 3 classes, which no code knows."""
    root = tmp_path_factory.mktemp("made")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
    )
    columns = {
        "image": np.stack([smooth_image(6, 8, seed=i) for i in range(12)]),
        "label": np.arange(12) % 3,
    }
    examples = tf.data.Dataset.from_tensor_slices(columns)
    tfds.dataset_builders.store_as_tfds_dataset(
        name="made",
        version="1.0.0",
        features=features,
        split_datasets={"train": examples, "test": examples},
        data_dir=root,
    )
    return root / "made" / "1.0.0"


def edited(name, change):
    """Changes a JSON file of the data set."""

    def edit(folder):
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))

    return edit


def split(**values):
    """Changes what is said of the training split."""

    def change(document):
        (train,) = (s for s in document["splits"] if s["name"] == "train")
        train.update(values)

    return edited("dataset_info.json", change)


def content(change):
    """Changes the bytes of the training split."""
    return lambda folder: (folder / SHARD).write_bytes(change((folder / SHARD).read_bytes()))


def replaced_by_fifo(folder):
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)


def classes(number):
    return edited(
        "features.json",
        lambda d: d["featuresDict"]["features"]["label"]["classLabel"].update(numClasses=number),
    )


BROKEN = {
    "a missing file": (lambda f: (f / SHARD).unlink(), f"{SHARD} of data set .*No such file"),
    "a cut file": (content(lambda b: b[: len(b) // 2]), f"{SHARD} is damaged: truncated record"),
    "a changed byte": (
        content(lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:]),
        f"{SHARD} is damaged: corrupted record",
    ),
    "no records": (content(lambda b: b""), "expected to contain 12 elements but contained only 0"),
    "a FIFO": (replaced_by_fifo, "is no file in the folder of the data set"),
    "fewer than are said": (split(shardLengths=["13"]), "13 elements but contained only 12"),
    "more than are said": (split(shardLengths=["11"]), "11 elements but contained at least 12"),
    "far fewer": (split(shardLengths=["99999999999"]), "99999999999 elements but contained only"),
    "less than nothing": (split(shardLengths=["-1"]), "is empty"),
    "files that are not there": (split(shardLengths=["6", "6"]), "of-00002.*No such file"),
    "a length that is none": (split(shardLengths=["x"]), "is no prepared TFDS data set"),
    "a file elsewhere": (
        split(filepathTemplate="../../../../../../../../../etc/passwd"),
        "etc/passwd of data set .* is no file in the folder of the data set",
    ),
    "a name without a value": (split(filepathTemplate="{X}"), "does not tell the names of its"),
    "another format": (
        edited("dataset_info.json", lambda d: d.update(fileFormat="x")),
        "'x' is not a valid FileFormat",
    ),
    "no version": (edited("dataset_info.json", lambda d: d.pop("version")), "Invalid version"),
    "no JSON": (lambda f: (f / "dataset_info.json").write_text("[1"), "is no prepared TFDS"),
    "no features": (lambda f: (f / "features.json").unlink(), "is no prepared TFDS data set"),
    "features that are none": (lambda f: (f / "features.json").write_text("[]"), "no feature of"),
    "no classes": (classes("0"), "that it has 0 classes"),
    "a billion classes": (classes("1000000000"), "it has 1000000000 classes"),
    "a label too many": (classes("2"), "cannot be read: the labels are 0 to 1; of record made-.*2"),
}


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "label.labels.txt"])
@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a folder", "a circle", "a link out"])
def test_documents_that_are_no_files(name, kind, made, tmp_path):
    """TFDS opens them itself, and would wait for a FIFO for ever."""
    path = shutil.copytree(made, tmp_path / "made") / name
    path.unlink(missing_ok=True)
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        targets = {"a device": "/dev/zero", "a circle": name, "a link out": made / name}
        path.symlink_to(targets[kind])
    if name == "label.labels.txt" and kind == "a folder":
        assert sources.resolve(str(tmp_path / "made")).class_names == ("0", "1", "2")
    else:
        assert str(tmp_path / "made") in one_line(sources.resolve, str(tmp_path / "made"))


@pytest.mark.parametrize("name", ["features.json", "label.labels.txt"])
def test_documents_of_an_embedded_data_set_that_are_no_files(name, embedded_dir, tmp_path):
    shutil.copytree(embedded_dir / "digits", tmp_path / "digits")
    path = tmp_path / "digits" / "1.0.0" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    line = one_line(sources.resolve, "digits", str(tmp_path))
    assert f"{path} of data set digits is no file in the folder of the data set" in line


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_sets(name, made, tmp_path):
    change, message = BROKEN[name]
    shutil.copytree(made, tmp_path / "made")
    change(tmp_path / "made")

    def call():
        return read(sources.resolve(str(tmp_path / "made")))

    with pytest.raises(EtfzooError, match=message):
        call()
    line = one_line(call)
    assert str(tmp_path / "made") in line


def test_streamed_data_sets_are_checked_too(made, tmp_path, monkeypatch):
    monkeypatch.setattr("etfzoo.data.tfds_source.MEMORY_BYTES", 0)
    from etfzoo.data.augmentation import Augmentation
    from etfzoo.data.pipeline import Pipeline

    for name in ("a cut file", "a label too many", "fewer than are said"):
        change, _ = BROKEN[name]
        shutil.copytree(made, tmp_path / name)
        change(tmp_path / name)
        pipeline = Pipeline(
            sources.resolve(str(tmp_path / name)), 8, 8, 0.875, 4, Augmentation("none"), 0
        )

        def call(pipeline=pipeline):
            with pipeline.naming_corrupt_records("train"):
                list(pipeline.evaluation("train"))

        assert str(tmp_path / name) in one_line(call)


@pytest.mark.parametrize(
    "names, wanted",
    [
        (b"a\nb\nc\n", ("a", "b", "c")),
        (None, ("0", "1", "2")),
        (b"a\n", ("0", "1", "2")),
        (b"\xff\xfe", ("0", "1", "2")),
    ],
)
def test_names_of_labels(names, wanted, made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    path = tmp_path / "made" / "label.labels.txt"
    path.unlink(missing_ok=True)
    if names is not None:
        path.write_bytes(names)
    assert sources.resolve(str(tmp_path / "made")).class_names == wanted


SEQUENCE = "tensorflow_datasets.core.features.sequence_feature.Sequence"
HIDDEN = json.dumps({"feature": {"type": "planted.X", "content": {}}, "length": None})
HOSTILE = {
    "a class": lambda f: f["image"].update(pythonClassName="planted.Image"),
    "spelled otherwise": lambda f: (
        f["image"].pop("pythonClassName"),
        f["image"].update(python_class_name="planted.Image"),
    ),
    "in JSON in JSON": lambda f: f.update(
        z={"pythonClassName": SEQUENCE, "jsonFeature": {"json": HIDDEN}}
    ),
    "a module of TFDS": lambda f: f["image"].update(
        pythonClassName="tensorflow_datasets.scripts.cli.main.Image"
    ),
}


@pytest.mark.parametrize("name", [*HOSTILE, "the old format", "an embedded data set"])
def test_no_module_is_imported_by_a_name_in_a_file(name, made, embedded_dir, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    data_dir = None
    if name == "an embedded data set":
        data_dir, data = str(tmp_path), "digits"
        folder = tmp_path / "digits" / "1.0.0"
        shutil.copytree(embedded_dir / "digits" / "1.0.0", folder)
        change = HOSTILE["a class"]
    else:
        folder = tmp_path / "made"
        data = str(folder)
        shutil.copytree(made, folder)
        change = HOSTILE.get(name)
    if change is None:
        (folder / "features.json").write_text(json.dumps({"type": "planted.X", "content": {}}))
    else:
        edited("features.json", lambda d: change(d["featuresDict"]["features"]))(folder)
    before = set(sys.modules)
    assert "which is no feature of TFDS" in one_line(sources.resolve, data, data_dir)
    assert not (tmp_path / "ran").exists()
    assert not {
        m
        for m in set(sys.modules) - before
        if m.startswith(("planted", "tensorflow_datasets.scripts"))
    }


@pytest.mark.parametrize("name", ["huggingface:x", "kaggle:x/y", "ns:digits:1.0.0", "digits:x"])
def test_no_code_of_others_is_fetched(name):
    assert "would run the code of others" in one_line(sources.resolve, name)


@pytest.mark.parametrize(
    "name", ["", "..", "/", "a\0b", "y" * 256, "~nobody-of-this-name", "[", "é"]
)
def test_names_that_are_no_data_set(name, tmp_path):
    assert one_line(sources.resolve, name, str(tmp_path))


@pytest.mark.parametrize(
    "split", ["", "train[", "train[50%:10%]", "train[9:3]", "+", "train+", "[:]"]
)
def test_splits_that_cannot_be(split, made):
    source = sources.resolve(str(made))
    for call in (source.size, source.records):
        assert one_line(call, split)


def test_embedded_data_sets_into_a_locked_directory(tmp_path):
    open_to_all(tmp_path)
    (tmp_path / "data").mkdir(mode=0o555)
    with nobody():
        line = one_line(shapes.prepare, tmp_path / "data", ["digits"])
    assert f"digits cannot be drawn into {tmp_path}/data" in line and "Permission denied" in line
    assert not list((tmp_path / "data").iterdir())


def test_embedded_data_sets_onto_a_full_disk(tmp_path):
    with small_disk(tmp_path / "disk", "16k") as disk:
        line = one_line(shapes.prepare, disk, ["digits"])
        assert f"digits cannot be drawn into {disk}" in line and "No space left" in line


def test_another_process_that_draws_the_same_was_faster(embedded_dir, tmp_path, monkeypatch):
    real = tfds.core.DatasetBuilder.download_and_prepare

    def beaten(builder, **options):
        shutil.copytree(embedded_dir / "digits", tmp_path / "digits")
        real(builder, **options)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", beaten)
    shapes.prepare(tmp_path, ["digits"])
    assert sources.resolve("digits", str(tmp_path)).size("train") == 200


def test_a_prepared_data_set_in_a_locked_directory_is_read(embedded_dir, tmp_path):
    open_to_all(tmp_path)
    shutil.copytree(embedded_dir / "digits", tmp_path / "data" / "digits")
    (tmp_path / "data").chmod(0o555)
    with nobody():
        assert sources.resolve("digits", str(tmp_path / "data")).size("train") == 200


def test_float_images_are_refused(tmp_path):
    features = {
        "image": tfds.features.Image(shape=(4, 4, 1), dtype=np.float32),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    columns = {"image": np.zeros((20, 4, 4, 1), np.float32), "label": np.zeros(20, np.int64)}
    tfds.dataset_builders.store_as_tfds_dataset(
        name="made",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": tf.data.Dataset.from_tensor_slices(columns)},
        data_dir=tmp_path,
    )
    assert "has no image feature" in one_line(sources.resolve, "made", str(tmp_path))
