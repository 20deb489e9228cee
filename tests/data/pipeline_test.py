"""Tests of the input pipeline."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from etfzoo.data import augment, sources
from etfzoo.data.augmentation import CROPS, Augmentation
from etfzoo.data.pipeline import InputShare, Pipeline
from etfzoo.data.readable import readable
from etfzoo.data.source import ROLES
from etfzoo.errors import EtfzooError
from testing import make_image_folder, nobody

AUGMENTATIONS = {crop: Augmentation(crop) for crop in CROPS}
SIDE, BATCH = 8, 6
TRAIN, TEST = 28, 10


def make_pipeline(source, crop="resized_crop", seed=0, batch=BATCH, size=(SIDE, SIDE)):
    return Pipeline(source, *size, 0.875, batch, AUGMENTATIONS[crop], seed)


def read(batches):
    batches = [(images.numpy(), labels.numpy()) for images, labels in batches]
    for images, labels in batches:
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        assert len(images) == len(labels)
    return batches


def same(one, other):
    """Whether two lists of batches hold the same pixels and labels in the same places."""
    return len(one) == len(other) and all(
        np.array_equal(a, b)
        for batch, batch2 in zip(one, other, strict=True)
        for a, b in zip(batch, batch2, strict=True)
    )


def write_folder(root):
    make_image_folder(root / "train", {"a": TRAIN // 2, "b": TRAIN // 2}, (14, 12))
    make_image_folder(root / "test", {"a": TEST // 2, "b": TEST // 2}, (14, 12))
    return root


def resolve(root):
    return sources.resolve(f"folder:{root}")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return resolve(write_folder(tmp_path_factory.mktemp("images")))


@pytest.fixture(scope="module")
def digits(embedded_dir):
    return sources.resolve("digits", str(embedded_dir))


def test_training_batches(source):
    batches = read(make_pipeline(source, size=(10, 7)).training("train", 0))
    # The rest of 28 = 4 * 6 + 4 is dropped.
    assert [images.shape for images, _ in batches] == [(6, 10, 7, 3)] * 4
    assert {label for _, labels in batches for label in labels} == {0, 1}


def test_an_epoch_shows_every_example_once(source):
    order = [r["record"].numpy() for r in source.records("train")]
    images = {
        augment.evaluation_image((source.root / name.decode()).read_bytes(), SIDE, SIDE, 0.875)
        .numpy()
        .astype(np.uint8)
        .tobytes(): name
        for name in order
    }
    assert len(images) == TRAIN
    plain = Pipeline(source, SIDE, SIDE, 0.875, 1, Augmentation("none", flip=False), 0)
    for epoch in (0, 1):
        shown = [images[image.tobytes()] for image, _ in read(plain.training("train", epoch))]
        assert sorted(shown) == sorted(order) and shown != order


@pytest.mark.parametrize("crop", CROPS)
def test_batches_repeat_bit_for_bit(source, crop):
    pipeline = make_pipeline(source, crop)
    first = read(pipeline.training("train", 3))
    assert same(first, read(pipeline.training("train", 3)))
    # Another process builds everything anew.
    assert same(first, read(make_pipeline(resolve(source.root), crop).training("train", 3)))


def test_epochs_and_seeds_differ(source):
    runs = [
        read(make_pipeline(source, seed=seed).training("train", epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    for i, one in enumerate(runs):
        for other in runs[:i]:
            assert not any(np.array_equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))
            assert any((a != b).any() for (_, a), (_, b) in zip(one, other, strict=True))


def test_draws_differ_from_epoch_to_epoch(tmp_path):
    # One image a class: only the draws can make a difference.
    make_image_folder(tmp_path / "train", {"a": 1, "b": 1}, (40, 40))
    make_image_folder(tmp_path / "test", {"a": 1, "b": 1})
    pipeline = make_pipeline(resolve(tmp_path), batch=1)
    shown = [
        image.tobytes()
        for epoch in range(6)
        for image, label in read(pipeline.training("train", epoch))
        if label[0] == 0
    ]
    assert len(shown) == len(set(shown)) == 6


def test_draws_depend_on_the_example_and_not_on_its_neighbours(source, tmp_path):
    # An example looks the same in an epoch whatever else is in the data set.
    make_image_folder(tmp_path / "train", {"a": TRAIN // 2, "b": 3}, (14, 12))
    make_image_folder(tmp_path / "test", {"a": 1, "b": 1})
    small, large = (
        {
            image.tobytes()
            for image, label in read(make_pipeline(s, batch=1).training("train", 2))
            if label[0] == 0
        }
        for s in (resolve(tmp_path), source)
    )
    assert len(small) == TRAIN // 2 and small == large


@pytest.mark.parametrize(
    "name, crop", [*(("source", crop) for crop in CROPS), ("digits", "resized_crop")]
)
def test_start_step_gives_the_tail_of_the_epoch(name, crop, request):
    pipeline = make_pipeline(request.getfixturevalue(name), crop)
    whole = read(pipeline.training("train", 1))
    for step in (0, 1, len(whole) - 1, len(whole)) if crop == "resized_crop" else (1,):
        assert same(whole[step:], read(pipeline.training("train", 1, step)))


def test_start_step_when_streaming(embedded_dir, monkeypatch):
    monkeypatch.setattr("etfzoo.data.tfds_source.MEMORY_BYTES", 0)
    streamed = sources.resolve("digits", str(embedded_dir))
    whole = read(make_pipeline(streamed).training("train", 1))
    assert same(whole[20:], read(make_pipeline(streamed).training("train", 1, 20)))
    assert streamed.memory == {}


def break_records(source, names):
    for name in names:
        (source.root / name.decode()).write_bytes(b"broken")


def test_skipped_records_are_not_decoded(tmp_path):
    source = resolve(write_folder(tmp_path))
    wanted = read(make_pipeline(source).training("train", 0))
    order, _ = make_pipeline(source)._epoch_seeds(0)
    shown = [r["record"].numpy() for r in source.records("train", order)]
    break_records(source, shown[: 2 * BATCH])
    assert same(wanted[2:], read(make_pipeline(source).training("train", 0, start_step=2)))
    for step in (0, 1):
        pipeline = make_pipeline(source)
        with pytest.raises(EtfzooError, match="not a readable image") as error:
            with pipeline.naming_corrupt_records("train", 0, step):
                read(pipeline.training("train", 0, step))
        # It is the first that is read, in this epoch's order.
        assert str(error.value).startswith(shown[step * BATCH].decode())


def test_evaluation_keeps_order_and_rest(source):
    batches = read(make_pipeline(source, size=(10, 7)).evaluation("test"))
    assert [images.shape for images, _ in batches] == [(6, 10, 7, 3), (4, 10, 7, 3)]
    images, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
    records = list(source.records("test"))
    np.testing.assert_array_equal(labels, [0] * 5 + [1] * 5)
    for image, record in zip(images, records, strict=True):
        wanted = augment.evaluation_image(record["image"], 10, 7, 0.875).numpy()
        np.testing.assert_array_equal(image, wanted)


def test_evaluation_is_deterministic_on_tfds(digits):
    one, other = (read(make_pipeline(digits, batch=100).evaluation("select")) for _ in range(2))
    assert same(one, other) and [len(labels) for _, labels in one] == [100] * 3
    labels = [int(r["label"]) for r in digits.records("select")]
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in one]), labels)


def test_sizes(source):
    pipeline = make_pipeline(source)
    assert pipeline.size("train") == TRAIN and pipeline.size("test") == TEST
    assert pipeline.size("fit") + pipeline.size("select") == TRAIN


def test_corrupt_records_are_found_and_left_out(tmp_path, caplog):
    source = resolve(write_folder(tmp_path))
    bad = [b"train/a/003.png", b"train/b/000.png", b"test/a/001.png"]
    break_records(source, bad)
    (tmp_path / "train" / "b" / "001.png").write_bytes(b"")
    good = (tmp_path / "train" / "b" / "002.png").read_bytes()
    (tmp_path / "train" / "b" / "002.png").write_bytes(good[: len(good) // 2])
    bad += [b"train/b/001.png", b"train/b/002.png"]

    with caplog.at_level("WARNING", "etfzoo"):
        pipeline = make_pipeline(readable(source, tmp_path / "corrupt.json"))
        assert pipeline.size("train") == TRAIN - 4 and pipeline.size("test") == TEST - 1
    found = json.loads((tmp_path / "corrupt.json").read_text())
    assert sorted(found) == ["test", "train"] and found["test"] == ["test/a/001.png"]
    assert sorted(found["train"] + found["test"]) == sorted(name.decode() for name in bad)
    first, second = (record.getMessage() for record in caplog.records)
    assert "left out 4 corrupt images of the 28 of split train" in first
    assert "test/a/001.png: it is none of .jpg" in second
    whole = read(pipeline.training("train", 0))
    assert len(whole) == 4
    labels = np.concatenate([labels for _, labels in whole])
    np.testing.assert_array_equal(np.bincount(labels), [13, 11])
    assert sum(len(labels) for _, labels in read(pipeline.evaluation("test"))) == TEST - 1
    # Steps count what is left.
    assert same(whole[1:], read(pipeline.training("train", 0, 1)))
    # What was found is kept: an image that was mended since does not change the run.
    (tmp_path / "train" / "b" / "000.png").write_bytes(good)
    again = make_pipeline(readable(source, tmp_path / "corrupt.json"))
    assert same(whole, read(again.training("train", 0)))
    assert make_pipeline(readable(source)).size("train") == TRAIN - 3


@pytest.mark.parametrize("split, epoch", [("train", 0), ("test", None)])
def test_a_corrupt_record_is_named(split, epoch, tmp_path):
    source = resolve(write_folder(tmp_path))
    name = f"{split}/b/002.png"
    break_records(source, [name.encode()])
    pipeline = make_pipeline(source)
    with pytest.raises(EtfzooError) as error:
        with pipeline.naming_corrupt_records(split, epoch):
            read(pipeline.evaluation(split) if epoch is None else pipeline.training(split, epoch))
    message = str(error.value)
    assert message.startswith(f"{name} ({split} split of folder:{tmp_path})")
    assert "`skip_corrupt`" in message and "\n" not in message


def test_every_split_and_role_loses_its_corrupt_records(tmp_path):
    for split in ("train", "val", "test"):
        make_image_folder(tmp_path / split, {"a": 5, "b": 5})
        (tmp_path / split / "a" / "002.png").write_bytes(b"broken")
    source = readable(resolve(tmp_path))
    for role in ROLES:
        assert source.size(role) == len(list(source.records(role, 3))) == 9
        read(make_pipeline(source, batch=3).evaluation(role))


def test_a_split_without_any_readable_image(tmp_path):
    source = resolve(write_folder(tmp_path))
    break_records(source, [r["record"].numpy() for r in source.records("test")])
    with pytest.raises(EtfzooError, match="none of the 10 images of split test .* is readable"):
        readable(source).size("test")


def test_a_locked_file_is_named(tmp_path):
    # Nobody must pass all of pytest's folders, of which xdist makes one more.
    for folder in (tmp_path, *tmp_path.parents):
        if Path(tempfile.gettempdir()) in folder.parents and folder.owner() == tmp_path.owner():
            folder.chmod(0o755)
    source = resolve(write_folder(tmp_path))
    (tmp_path / "test" / "a" / "001.png").chmod(0)
    pipeline = make_pipeline(source)
    with nobody(), pytest.raises(EtfzooError, match=r"cannot be read: .*test/a/001\.png") as error:
        with pipeline.naming_corrupt_records("test"):
            read(pipeline.evaluation("test"))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    source = resolve(write_folder(tmp_path))
    (tmp_path / "test" / "a" / "001.png").unlink()
    pipeline = make_pipeline(source)
    with pytest.raises(EtfzooError, match=r"cannot be read: .*test/a/001\.png") as error:
        with pipeline.naming_corrupt_records("test"):
            read(pipeline.evaluation("test"))
    assert "\n" not in str(error.value)


def test_other_errors_pass_through(source):
    with pytest.raises(ZeroDivisionError):
        with make_pipeline(source).naming_corrupt_records("train", 0):
            raise ZeroDivisionError


@pytest.mark.parametrize("count, replicas, start", [(1, 2, 2), (2, 2, 0), (3, 6, 2)])
def test_shares_of_all_pipelines_are_the_global_batches(
    source, count, replicas, start, monkeypatch
):
    decoded = []
    draw = augment.training_image

    def counting(encoded, key, *rest):
        (key,) = tf.py_function(lambda k: decoded.append(int(k[1])) or k, [key], [tf.int32])
        key.set_shape([2])
        return draw(encoded, key, *rest)

    whole = read(make_pipeline(source).training("train", 5, start))
    monkeypatch.setattr(augment, "training_image", counting)
    parts = []
    for index in range(count):
        decoded.clear()
        share = InputShare(index, count, replicas)
        parts.append(read(make_pipeline(source).training("train", 5, start, share)))
        # No worker decodes what another one trains on.
        assert len(decoded) == len(set(decoded)) == (TRAIN // BATCH - start) * BATCH // count
    local = replicas // count
    for step, (images, labels) in enumerate(whole):
        mine = [batch for part in parts for batch in part[step * local : (step + 1) * local]]
        assert {len(labels) for _, labels in mine} == {BATCH // replicas}
        np.testing.assert_array_equal(np.concatenate([i for i, _ in mine]), images)
        np.testing.assert_array_equal(np.concatenate([n for _, n in mine]), labels)
    assert sum(map(len, parts)) == len(whole) * replicas


@pytest.mark.parametrize("count, replicas", [(1, 2), (2, 2), (3, 6)])
def test_shares_of_an_evaluation_hold_every_example_once(source, count, replicas):
    (images, labels), rest = read(make_pipeline(source).evaluation("test"))
    images, labels = np.concatenate([images, rest[0]]), np.concatenate([labels, rest[1]])
    parts = [
        read(make_pipeline(source).evaluation("test", InputShare(index, count, replicas)))
        for index in range(count)
    ]
    local = replicas // count
    order = [
        batch
        for step in range(2)
        for part in parts
        for batch in part[step * local : (step + 1) * local]
    ]
    assert len(order) == 2 * replicas
    shown, told = (np.concatenate(column) for column in zip(*order, strict=True))
    assert len(told) == 12 and (told[TEST:] == -1).all()
    np.testing.assert_array_equal(shown[:TEST], images)
    np.testing.assert_array_equal(told[:TEST], labels)


@pytest.mark.parametrize("streamed", [False, True])
def test_nothing_is_autotuned(digits, embedded_dir, source, monkeypatch, streamed):
    """Letting go of an autotuned iterator may block for up to a minute."""
    if streamed:
        monkeypatch.setattr("etfzoo.data.tfds_source.MEMORY_BYTES", 0)
        digits = sources.resolve("digits", str(embedded_dir))
    for data in (source, digits):
        pipeline = make_pipeline(data)
        for batches in (
            data.records("train", 3),
            pipeline.training("train", 0),
            pipeline.training("train", 0, share=InputShare(1, 2, 2)),
            pipeline.evaluation("test"),
            pipeline.evaluation("test", InputShare(0, 2, 2)),
        ):
            options = batches.options()
            assert options.autotune.enabled is False and options.deterministic
