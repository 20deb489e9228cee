"""Data sets of the package `datasets`: splits, roles, order, shares and what cannot be used."""

import io

import numpy as np
import pytest
from PIL import Image

import etfzoo
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.pipeline import InputShare, Pipeline
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError
from testing import run_recipe

datasets = pytest.importorskip("datasets")

CLASSES = ["cat", "dog", "emu"]


def png(number, size=8):
    image = Image.fromarray(np.full((size, size, 3), number % 256, np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def table(count, label=None, first=0, columns=("image", "label")):
    """Images that tell their number, of labels 0, 1, 2, 0, ..."""
    numbers = range(first, first + count)
    image, name = columns
    return datasets.Dataset.from_dict(
        {
            image: [{"bytes": png(n), "path": None} for n in numbers],
            name: [n % 3 for n in numbers] if label is None else [label(n) for n in numbers],
        },
        features=datasets.Features(
            {image: datasets.Image(), name: datasets.ClassLabel(names=CLASSES)}
            if label is None or isinstance(label(0), int)
            else {image: datasets.Image(), name: datasets.Value("string")}
        ),
    )


def saved(tmp_path, **splits):
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return f"hf:{tmp_path / 'saved'}"


def image_folder(tmp_path):
    """12 images as files of their own, in one folder a class."""
    for n in range(12):
        path = tmp_path / "images" / "train" / CLASSES[n % 3] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(n))
    return f"hf:{tmp_path / 'images'}"


def numbers(source, split, **kwargs):
    """What the images of a split tell, and their labels."""
    found = [
        (np.array(Image.open(io.BytesIO(r["image"].numpy())))[0, 0, 0], int(r["label"]))
        for r in source.records(split, **kwargs)
    ]
    return [int(n) for n, _ in found], [label for _, label in found]


def test_stored_splits_are_roles(tmp_path):
    source = resolve(
        saved(tmp_path, train=table(30), validation=table(9, first=30), test=table(12, first=39))
    )
    assert source.class_names == tuple(CLASSES)
    assert numbers(source, "train") == (list(range(30)), [n % 3 for n in range(30)])
    assert numbers(source, "fit")[0] == list(range(30))
    assert numbers(source, "select")[0] == list(range(30, 39))
    assert numbers(source, "test") == (list(range(39, 51)), [n % 3 for n in range(39, 51)])
    assert numbers(source, "all")[0] == list(range(51))
    assert numbers(source, "test+train")[0] == [*range(39, 51), *range(30)]
    assert numbers(source, "train+fit")[0] == list(range(30))  # each example once
    assert source.class_counts("test").tolist() == [4, 4, 4]
    with pytest.raises(EtfzooError, match="no split 'dev'; it has: train, validation, test"):
        source.size("dev")


@pytest.mark.parametrize("splits", [("train",), ("train", "validation"), ("train", "test")])
def test_missing_splits_are_held_out_of_each_class(splits, tmp_path):
    stored = {name: table(60, first=60 * place) for place, name in enumerate(splits)}
    source = resolve(saved(tmp_path, **stored))
    found = {role: numbers(source, role) for role in ("train", "fit", "select", "test")}
    own = {"train": 60, "test": 60} if len(splits) == 2 else {"train": 48, "test": 12}
    own |= {"select": own["train"] // 10 if own["train"] == 60 else 6}
    own |= {"fit": own["train"] - own["select"]}
    assert {role: len(ns) for role, (ns, _) in found.items()} == own
    sets = {role: set(ns) for role, (ns, _) in found.items()}
    assert sets["fit"] | sets["select"] == sets["train"] and not sets["fit"] & sets["select"]
    assert not sets["train"] & sets["test"]
    for ns, labels in found.values():
        assert labels == [n % 3 for n in ns]
        assert len(set(np.bincount(labels))) == 1  # of each class as many
    again = resolve(f"hf:{tmp_path / 'saved'}")
    assert numbers(again, "test") == found["test"]
    assert again.fingerprint() == source.fingerprint()


def test_order_keys_and_places(tmp_path):
    source = resolve(saved(tmp_path, train=table(40), test=table(3, first=40)))
    assert source.by_index("train")
    shuffled, labels = numbers(source, "train", shuffle_seed=5)
    assert sorted(shuffled) == list(range(40)) != shuffled
    assert labels == [n % 3 for n in shuffled]
    records = list(source.records("test+train"))
    names = [r["record"].numpy().decode() for r in records]
    assert names[:4] == ["test__0", "test__1", "test__2", "train__0"]
    assert len({int(r["key"]) for r in records}) == 43
    assert source.find("test+train", ["train__7", "test__2"]).tolist() == [10, 2]
    for wrong in ("test__3", "dev__0", "test__x"):
        with pytest.raises(EtfzooError, match=f"no record '{wrong}'"):
            source.find("test", [wrong])
    assert "image" not in next(iter(source.records("train", images=False)))


@pytest.mark.parametrize("count", [2, 4])
def test_each_worker_reads_its_share_only(count, tmp_path, monkeypatch):
    source = resolve(saved(tmp_path, train=table(64), test=table(3)))
    pipeline = Pipeline(source, 8, 8, 1.0, 16, Augmentation("none", flip=False), 3)
    read, image = [], type(source)._image

    def counted(self, part, row):
        read.append(row)
        return image(self, part, row)

    monkeypatch.setattr(type(source), "_image", counted)
    whole = [images[:, 0, 0, 0] for images, _ in pipeline.training("train", 1).as_numpy_iterator()]
    read.clear()
    shares = []
    for index in range(count):
        share = InputShare(index, count, count)
        batches = pipeline.training("train", 1, share=share).as_numpy_iterator()
        shares.append([images[:, 0, 0, 0] for images, _ in batches])
        assert len(read) == 64 // count * (index + 1)
    together = [np.concatenate(parts) for parts in zip(*shares, strict=True)]
    np.testing.assert_array_equal(together, whole)
    read.clear()  # what is skipped is not read
    rest = [i[:, 0, 0, 0] for i, _ in pipeline.training("train", 1, 3).as_numpy_iterator()]
    np.testing.assert_array_equal(rest, whole[3:])
    assert len(read) == 16


def test_other_columns_and_labels_of_text(tmp_path):
    train = table(12, lambda n: ["small", "large"][n % 2], columns=("img", "label"))
    source = resolve(saved(tmp_path, train=train, test=train.select(range(4))))
    assert source.class_names == ("large", "small")
    assert numbers(source, "test") == ([0, 1, 2, 3], [1, 0, 1, 0])
    train = table(12, columns=("photo", "fine_label"))
    assert numbers(resolve(saved(tmp_path / "b", train=train, test=train)), "test")[1][:3] == [
        0,
        1,
        2,
    ]


def test_folders_that_load_dataset_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split, count, first in (("train", 12, 0), ("test", 6, 12)):
        path = tmp_path / "parquet" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        table(count, first=first).to_parquet(str(path))
    source = resolve(f"hf:{tmp_path / 'parquet'}")
    assert source.class_names == tuple(CLASSES)
    assert numbers(source, "test") == (list(range(12, 18)), [0, 1, 2] * 2)
    source = resolve(image_folder(tmp_path))
    found, labels = numbers(source, "all")
    assert [n % 3 for n in found] == labels and sorted(found) == list(range(12))
    before = source.fingerprint()
    (tmp_path / "images" / "train" / "dog" / "4.png").write_bytes(png(4, size=30))
    assert resolve(f"hf:{tmp_path / 'images'}").fingerprint() != before


def training(source):
    pipeline = Pipeline(source, 8, 8, 1.0, 6, Augmentation("none", flip=False), 3)
    with pipeline.naming_corrupt_records("train"):
        list(pipeline.training("train", 0))


def test_an_image_that_is_damaged_or_missing_is_named(tmp_path):
    rows = [{"bytes": png(n) if n != 1 else png(n)[:20], "path": None} for n in range(6)]
    train = table(6).remove_columns("image").add_column("image", rows)
    source = resolve(saved(tmp_path, train=train.cast_column("image", datasets.Image())))
    with pytest.raises(EtfzooError, match="train__1"):
        training(source)


def test_a_file_that_is_gone_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = resolve(image_folder(tmp_path))
    for path in (tmp_path / "images" / "train" / "dog").iterdir():
        path.unlink()
    with pytest.raises(EtfzooError, match="dog.*No such file|No such file.*dog"):
        training(source)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: {"test": table(6)}, "no train split; it has: test"),
        (lambda: {"train": table(6).remove_columns("label")}, "no column of labels"),
        (lambda: {"train": table(6).remove_columns("image")}, "no column of images"),
        (lambda: {"train": table(6, lambda n: 0)}, "of its 3, 2 have none"),
        (lambda: {"train": table(6), "test": table(6, lambda n: -1)}, "examples without a label"),
        (lambda: {"train": table(3)}, "no class has two images"),
        (
            lambda: {"train": table(6, lambda n: "ab"[n % 2]), "test": table(6, lambda n: "c")},
            "labels that its training split lacks: c",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said(make, message, tmp_path):
    with pytest.raises(EtfzooError, match=message):
        resolve(saved(tmp_path, **make()))


def test_no_such_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (f"hf:{tmp_path}", "hf:nobody/nothing", "hf:a/b/c/d"):
        with pytest.raises(EtfzooError, match="cannot be opened") as caught:
            resolve(name)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.small_rn18
def test_it_trains_resumes_and_is_evaluated(tmp_path):
    name = saved(tmp_path, train=table(30), test=table(6, first=30))
    flags = (f"--dataset={name}", "--batch_size=4")
    small = ("--protocol=quickstart", "--epochs=1", "--learning_rate=0.01")
    place = (f"--workdir={tmp_path}/a", "--backbone=rn18", "--image_size=32")
    run_recipe("pretrain", *flags, *small, *place)
    run_recipe("finetune", f"--model={tmp_path}/a", *flags, *small, f"--workdir={tmp_path}/b")
    report = f"--output={tmp_path}/report"
    out = run_recipe("evaluate", f"--model={tmp_path}/b", f"--dataset={name}", report)
    assert "on 6 images" in out
    batches = etfzoo.data.load(name, "test", etfzoo.load(tmp_path / "b"), batch_size=6)
    assert batches.class_names == tuple(CLASSES)
    ((_, labels),) = batches
    assert labels.numpy().tolist() == [0, 1, 2] * 2
