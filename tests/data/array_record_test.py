"""Tests of data sets that are read by index, and of their conversion."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from scipy import stats

from etfzoo.data import array_record, conversion, loading, sources
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.long_tail import long_tailed
from etfzoo.data.pipeline import InputShare, Pipeline
from etfzoo.data.readable import readable
from etfzoo.data.source import Places, shuffled
from etfzoo.errors import EtfzooError
from testing import forked_python, fresh_python, run_recipe, small_disk, smooth_image

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="array_record is there for Linux")
SHARDS, TRAIN, TEST, BATCH = 5, 103, 22, 8
SHARD, IN_SHARD = "made-train.{}-00002-of-00005", 21


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A data directory with a data set in 5 shards, which TFDS wrote as tfrecord."""
    root = tmp_path_factory.mktemp("tfrecord")
    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
    }

    def examples(count, offset):
        images = np.stack([smooth_image(9, 12, seed=offset + i) for i in range(count)])
        labels = np.arange(count) % 7 % 3
        return tf.data.Dataset.from_tensor_slices({"image": images, "label": labels})

    tfds.dataset_builders.store_as_tfds_dataset(
        name="made",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": examples(TRAIN, 0), "test": examples(TEST, 500)},
        data_dir=root,
        download_config=tfds.download.DownloadConfig(num_shards=SHARDS),
    )
    (root / "made" / "1.0.0" / "words.txt").write_text("a\tant\nb\tbee\nc\tcat\n")
    return root


@pytest.fixture(scope="module")
def indexed(plain, tmp_path_factory):
    """The same, converted by the command."""
    root = tmp_path_factory.mktemp("array_record")
    convert(plain, root)
    return root


def convert(plain, root, code=0):
    flags = ("--dataset=made", f"--data_dir={plain}", f"--output={root}")
    return run_recipe("prepare", *flags, "--file_format=array_record", code=code)


def resolve(root):
    return sources.resolve("made", str(root))


def records(source, *args, **kwargs):
    return list(source.records(*args, **kwargs).as_numpy_iterator())


def names(source, *args, **kwargs):
    return [r["record"].decode() for r in records(source, *args, **kwargs)]


def make_pipeline(source, seed=0, batch=BATCH):
    return Pipeline(source, 8, 8, 0.875, batch, Augmentation("resized_crop"), seed)


def read(batches):
    return [(images.numpy(), labels.numpy()) for images, labels in batches]


def same(one, other):
    return len(one) == len(other) and all(
        np.array_equal(a, b)
        for batch, batch2 in zip(one, other, strict=True)
        for a, b in zip(batch, batch2, strict=True)
    )


@pytest.fixture
def counted(monkeypatch):
    """`(file, position)` of each record that is read, as often as it is."""
    seen = []
    record = array_record.Shards.record
    monkeypatch.setattr(
        array_record.Shards, "record", lambda self, *at: seen.append(at) or record(self, *at)
    )
    return seen


# ----------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("start, stop", [(0, None), (16, 96), (96, 96)])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_places_are_those_of_a_filter(start, stop, count):
    parts = []
    for index in range(count):
        places = Places(start, stop, BATCH, index, count)
        found = list(places.numbers(TRAIN).as_numpy_iterator())
        assert len(found) == places.number_of(TRAIN)
        assert found == list(places.of(tf.data.Dataset.range(TRAIN)).as_numpy_iterator())
        parts.append(found)
    every = np.arange(TRAIN)[start:stop].tolist()
    assert sorted(n for part in parts for n in part) == every
    for at in range(0, len(every) - BATCH + 1, BATCH):
        size, step = BATCH // count, at // BATCH
        runs = [part[step * size : (step + 1) * size] for part in parts]
        assert sum(runs, []) == every[at : at + BATCH]


def order(seed, size):
    return list(shuffled(tf.data.Dataset.range(size), seed, size).as_numpy_iterator())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 100, 1001])
def test_an_order_is_a_permutation_of_its_seed(size):
    assert sorted(order(3, size)) == list(range(size))
    assert order(3, size) == order(3, size)
    assert size < 64 or order(3, size) != order(4, size)


def test_orders_are_even():
    assert order(7, 10) == [7, 1, 9, 4, 5, 8, 0, 6, 3, 2]  # runs go on with other versions
    # Where an example goes is even over seeds, and so is where its neighbour goes from it.
    size, seeds = 25, 1000
    orders = np.array([order(seed, size) for seed in range(seeds)])
    for place in (0, 1, 12, 24):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=size)).pvalue > 1e-3
        step = (orders[:, place] - orders[:, place - 1]) % size
        assert stats.chisquare(np.bincount(step, minlength=size)[1:]).pvalue > 1e-3
    # Within one order neighbours know nothing of each other: within 4 standard deviations.
    places = np.array(order(5, 100_000))
    for lag in (1, 2, 256):
        assert abs(np.corrcoef(places[lag:], places[:-lag])[0, 1]) < 4 / np.sqrt(len(places))
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 4 / np.sqrt(len(places))


# -------------------------------------------------------------------------------------- the source


def test_both_formats_hold_the_same(plain, indexed):
    one, other = resolve(plain), resolve(indexed)
    assert not one.by_index("train") and other.by_index("train")
    assert other.class_names == one.class_names
    assert other.class_descriptions == one.class_descriptions == ("ant", "bee", "cat")
    for split in ("train", "test+train[:30%]"):
        assert other.size(split) == one.size(split)
        assert (other.class_counts(split) == one.class_counts(split)).all()
        wanted, found = records(one, split), records(other, split)
        for field in ("image", "label", "key", "index"):
            assert [r[field] for r in wanted] == [r[field] for r in found]
        assert [r["record"].replace(b"tfrecord", b"array_record") for r in wanted] == [
            r["record"] for r in found
        ]
        assert names(other, split, images=False) == names(other, split)
        labels = [r["label"] for r in records(other, split, 4, images=False)]
        assert labels == [r["label"] for r in records(other, split, 4)]
    # Evaluation and draws are bit for bit those of tfrecord, order is not.
    one, other = make_pipeline(one, batch=1), make_pipeline(other, batch=1)
    assert same(read(one.evaluation("test")), read(other.evaluation("test")))
    shown = [{image.tobytes() for image, _ in read(p.training("train", 2))} for p in (one, other)]
    assert shown[0] == shown[1] and len(shown[0]) == TRAIN


@pytest.mark.parametrize("workers", [1, 2, 4, 16])
def test_each_worker_reads_its_own_records_once(indexed, counted, workers):
    batch, start = 16, 2
    pipeline = make_pipeline(resolve(indexed), batch=batch)
    whole = read(pipeline.training("train", 5, start, InputShare()))
    assert len(whole) == TRAIN // batch - start
    counted.clear()
    parts, seen = [], []
    for index in range(workers):
        parts.append(
            read(pipeline.training("train", 5, start, InputShare(index, workers, workers)))
        )
        assert len(counted) == len(whole) * batch // workers
        seen += counted
        counted.clear()
    assert len(seen) == len(set(seen)) == len(whole) * batch
    for step, (images, labels) in enumerate(whole):
        mine = [part[step] for part in parts]
        np.testing.assert_array_equal(np.concatenate([i for i, _ in mine]), images)
        np.testing.assert_array_equal(np.concatenate([n for _, n in mine]), labels)


def test_resuming_reads_nothing_of_what_was_seen(indexed, counted):
    pipeline = make_pipeline(resolve(indexed))
    whole = read(pipeline.training("train", 1, share=InputShare()))
    for step in (0, 1, 9, len(whole)):
        counted.clear()
        rest = read(make_pipeline(resolve(indexed)).training("train", 1, step, InputShare()))
        assert same(whole[step:], rest) and len(counted) == BATCH * len(rest)
    assert not same(whole, read(pipeline.training("train", 2, share=InputShare())))
    other = make_pipeline(resolve(indexed), seed=1)
    assert not same(whole, read(other.training("train", 1, share=InputShare())))


@pytest.mark.parametrize("count, replicas", [(1, 1), (2, 2), (4, 4), (2, 4)])
def test_shares_of_an_evaluation_are_those_of_tfrecord(plain, indexed, count, replicas, counted):
    for index in range(count):
        share = InputShare(index, count, replicas)
        one, other = (
            make_pipeline(resolve(root)).evaluation("test", share) for root in (plain, indexed)
        )
        counted.clear()
        assert same(read(one), read(other))
        # 22 in batches of 8: two are filled up, each with the first image again.
        assert len(counted) == 24 // count


def test_long_tails_are_those_of_tfrecord(plain, indexed, counted):
    one, other = (long_tailed(resolve(root), 4, "train") for root in (plain, indexed))
    assert other.size("train") == one.size("train") < TRAIN
    assert (other.class_counts("train") == one.class_counts("train")).all()
    wanted, found = records(one, "train"), records(other, "train")
    for field in ("image", "label", "key", "index"):
        assert [r[field] for r in wanted] == [r[field] for r in found]
    assert sorted(names(other, "train", 3)) == sorted(names(other, "train"))
    assert [r["index"] for r in records(other, "train", 3)] != list(range(one.size("train")))
    # What is left out is not read.
    counted.clear()
    part = read(make_pipeline(other).training("train", 0, 1, InputShare(0, 2, 2)))
    assert len(counted) == len(part) * BATCH // 2


def write_shard(path, examples):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for example in examples:
        writer.write(example)
    writer.close()


def read_shard(path):
    return array_record.open_file(str(path), IN_SHARD).read_all()


def test_unreadable_images_are_named_and_left_out(indexed, tmp_path, counted):
    shutil.copytree(indexed, tmp_path / "data")
    path = tmp_path / "data/made/1.0.0" / SHARD.format("array_record")
    examples = read_shard(path)
    for i in (3, 4, 19):
        example = tf.train.Example.FromString(examples[i])
        example.features.feature["image"].bytes_list.value[0] = b"broken"
        examples[i] = example.SerializeToString()
    write_shard(path, examples)
    source = resolve(tmp_path / "data")
    pipeline = make_pipeline(source)
    for epoch in (0, None):
        with pytest.raises(EtfzooError, match=rf"^{path.name}__(3|4|19) .*`skip_corrupt`"):
            with pipeline.naming_corrupt_records("train", epoch):
                data = (
                    pipeline.evaluation("train") if epoch is None else pipeline.training("train", 0)
                )
                read(data)
    good = readable(source, tmp_path / "corrupt.json")
    assert good.size("train") == TRAIN - 3
    lost = [f"{path.name}__{i}" for i in (3, 4, 19)]
    assert json.loads((tmp_path / "corrupt.json").read_text()) == {"train": lost}
    assert names(good, "train") == [n for n in names(source, "train") if n not in lost]
    assert [r["index"] for r in records(good, "train")] == list(range(TRAIN - 3))
    again = readable(source, tmp_path / "corrupt.json")
    whole = read(make_pipeline(again).training("train", 0, share=InputShare()))
    counted.clear()
    assert same(whole[2:], read(make_pipeline(again).training("train", 0, 2, InputShare())))
    assert len(counted) == len(whole[2:]) * BATCH
    tail = long_tailed(again, 4, "train")
    assert not set(lost) & set(names(tail, "train", 1)) and tail.size("train") < TRAIN - 3


def test_a_data_set_outlives_its_source(indexed):
    iterator = iter(resolve(indexed).records("train", 1))
    first = next(iterator)
    gc.collect()
    assert len([first, *iterator]) == TRAIN


def test_batches_for_fit(plain, indexed):
    one, other = (
        loading.load("made", "test", image_size=8, batch_size=4, data_dir=str(root))
        for root in (plain, indexed)
    )
    assert same(read(one), read(other))
    batches = loading.load(
        "made", "train", image_size=8, batch_size=BATCH, training=True, data_dir=str(indexed)
    )
    epochs = [read(batches) for _ in range(3)]
    assert len({len(epoch) for epoch in epochs}) == 1 and not same(epochs[0], epochs[1])


_LEAVES = """
import sys
from etfzoo.data import sources
from etfzoo.data.source import reading
records = sources.resolve("made", sys.argv[1]).records("train", 1).repeat(1000)
iterator = iter(records.batch(4).prefetch(8).with_options(reading()))
print(len(next(iterator)["label"]))
"""


def test_a_process_may_end_while_records_are_read(indexed):
    assert fresh_python(_LEAVES, indexed).split() == ["4"]


_FEW_FILES = """
import resource, sys, types
resource.setrlimit(resource.RLIMIT_NOFILE, (80, int(sys.argv[2])))
from etfzoo.data import array_record
path = sys.argv[1]
one = types.SimpleNamespace(filename=path, skip=0, take=21)
files = array_record.Shards("x", [one] * 90, {path.split("/")[-1]: 21})
print(sum(len(files.record(i, 3)) > 0 for i in range(90)))
"""


def test_a_low_limit_of_open_files_is_raised(indexed):
    path = indexed / "made/1.0.0" / SHARD.format("array_record")
    assert "90" in forked_python(_FEW_FILES, path, 1000)


# ------------------------------------------------------------------------------------------ errors


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = path.read_bytes()
    at = content.index(b"IDAT") + 20
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def shorter(path):
    write_shard(path, read_shard(path)[:-1])


DAMAGE = {
    "missing": (lambda path: path.unlink(), "No such file"),
    "cut": (cut, "is damaged: "),
    "empty": (lambda path: path.write_bytes(b""), "is damaged: "),
    "no array_record": (lambda path: path.write_bytes(os.urandom(200_000)), "is damaged: "),
    "a changed byte": (flip, "is damaged at record [0-9]+: "),
    "a record less": (shorter, "has 20 records, and dataset_info.json tells of 21: prepare it"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_named_in_one_line(kind, indexed, tmp_path):
    damage, message = DAMAGE[kind]
    shutil.copytree(indexed, tmp_path / "data")
    path = tmp_path / "data/made/1.0.0" / SHARD.format("array_record")
    damage(path)
    pipeline = make_pipeline(resolve(tmp_path / "data"))
    for call in (
        lambda: read(pipeline.training("train", 0, share=InputShare())),
        lambda: pipeline.source.class_counts("train"),
        lambda: pipeline.fingerprint("train"),
    ):
        with pytest.raises(EtfzooError, match=message) as error:
            with pipeline.naming_corrupt_records("train", 0):
                call()
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        assert "EtfzooError" not in str(error.value)


def test_a_data_set_that_lies_elsewhere_is_not_read(indexed, tmp_path):
    shutil.copytree(indexed, tmp_path / "data")
    path = tmp_path / "data/made/1.0.0" / SHARD.format("array_record")
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EtfzooError, match="is no file in the folder of the data set"):
        resolve(tmp_path / "data").records("train")


# -------------------------------------------------------------------------------------- conversion


def test_the_converted_data_set_is_whole_for_tfds(plain, indexed):
    one, other = (tfds.builder_from_directory(str(r / "made/1.0.0")) for r in (plain, indexed))
    assert [len(other.as_data_source(split)) for split in ("train", "test")] == [TRAIN, TEST]
    wanted = tfds.as_numpy(one.as_dataset(split="test"))
    for example, found in zip(wanted, other.as_data_source("test"), strict=True):
        np.testing.assert_array_equal(example["image"], found["image"])
        assert example["label"] == found["label"]
    left = {p.name.replace("tfrecord", "array_record") for p in (plain / "made/1.0.0").iterdir()}
    assert {p.name for p in (indexed / "made/1.0.0").iterdir()} - {".lock"} == left


def test_one_that_tfds_wrote_as_array_record_is_read(plain, tmp_path):
    blank = {"image": np.zeros((20, 4, 4, 3), np.uint8), "label": np.arange(20) % 3}
    tfds.dataset_builders.store_as_tfds_dataset(
        name="made",
        version="1.0.0",
        features=tfds.builder_from_directory(str(plain / "made/1.0.0")).info.features,
        split_datasets=dict.fromkeys(("train", "test"), tf.data.Dataset.from_tensor_slices(blank)),
        data_dir=tmp_path,
        file_format="array_record",
    )
    source = resolve(tmp_path)
    assert source.by_index("train") and sorted(names(source, "train")) == sorted(
        names(source, "train", 3)
    )
    with pytest.raises(EtfzooError, match="made is not converted: it is array_record"):
        conversion.convert("made", str(tmp_path), str(tmp_path / "other"))


def test_converting_again_and_going_on(plain, indexed, tmp_path):
    said = convert(plain, tmp_path)
    assert "converted: test 22 images, train 103 images, in 10 files" in said or (
        "converted: train 103 images, test 22 images, in 10 files" in said
    )
    assert f"--dataset=made --data_dir={tmp_path}" in said
    assert "there already: " in convert(plain, tmp_path)
    folder = tmp_path / "made/1.0.0"
    whole = {p.name: p.read_bytes() for p in folder.glob("[!.]*")}
    # As a killed conversion leaves it: no document yet, a shard too little, one half-written.
    (folder / "dataset_info.json").unlink()
    (folder / SHARD.format("array_record")).unlink()
    cut(folder / SHARD.format("array_record").replace("-00002-", "-00003-"))
    (folder / f".{SHARD.format('array_record')}.1a2b3c4d.tmp").write_bytes(b"half")
    kept = folder / SHARD.format("array_record").replace("-00002-", "-00001-")
    before = kept.stat().st_mtime_ns
    with pytest.raises(EtfzooError):
        resolve(tmp_path)
    assert "converted: " in convert(plain, tmp_path)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"} == whole
    assert kept.stat().st_mtime_ns == before


def test_a_killed_conversion_leaves_no_data_set_and_goes_on(plain, tmp_path):
    code = (
        "import sys, time; from etfzoo.data import conversion\n"
        "copy = conversion._copy\n"
        "def slow(*a): copy(*a); print('shard', flush=True); time.sleep(0.5)\n"
        "conversion._copy = slow; conversion.convert('made', *sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(plain), str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert process.stdout.readline() == b"shard\n"
    time.sleep(0.6)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder = tmp_path / "made/1.0.0"
    written = {p.name for p in folder.glob("made-*")}
    assert 0 < len(written) < 10 and not (folder / "dataset_info.json").exists()
    assert "converted: " in convert(plain, tmp_path)
    assert names(resolve(tmp_path), "train") == [
        n.replace("tfrecord", "array_record") for n in names(resolve(plain), "train")
    ]


def test_damaged_originals_are_named_and_make_no_data_set(plain, tmp_path):
    path = tmp_path / "data/made/1.0.0" / SHARD.format("tfrecord")
    shutil.copytree(plain, tmp_path / "data")
    whole = path.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], f"{path} is damaged: "),
        (b"", f"{path} has 0 records, and dataset_info.json tells of 21"),
    ):
        path.write_bytes(content)
        assert message in convert(tmp_path / "data", tmp_path / "new", code=2)
        assert not (tmp_path / "new/made/1.0.0/dataset_info.json").exists()
    path.unlink()
    assert "No such file" in convert(tmp_path / "data", tmp_path / "new", code=2)


def test_what_cannot_be_converted(plain, indexed, tmp_path):
    flags = ("--dataset=made", f"--data_dir={plain}")
    assert "is in" in convert(plain, plain, code=2)
    assert "not prepared" in run_recipe(
        "prepare", "--dataset=cifar10", f"--data_dir={plain}", f"--output={tmp_path}",
        "--file_format=array_record", code=2,
    )  # fmt: skip
    assert "--file_format=array_record" in run_recipe("prepare", *flags, code=2)
    assert "two tasks" in run_recipe("prepare", *flags, "--archive=x", code=2)
    assert "go with --dataset" in run_recipe("prepare", "--archive=x", "--output=y", code=2)
    (tmp_path / "file").write_bytes(b"")
    assert "cannot create directory" in convert(plain, tmp_path / "file", code=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    # What is there is another data set.
    shutil.copytree(indexed, tmp_path / "other")
    path = tmp_path / "other/made/1.0.0/label.labels.txt"
    path.write_text("x\ny\nz\n")
    assert "is another data set than made" in convert(plain, tmp_path / "other", code=2)


def test_a_full_disk(plain, tmp_path):
    with small_disk(tmp_path / "disk", "100k") as disk:
        said = convert(plain, disk, code=2)
        assert "cannot write" in said and not list(disk.rglob("dataset_info.json"))
