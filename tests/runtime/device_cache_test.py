"""Images made on the device against those of the pipeline on the host. JAX only."""

import importlib.util
import json
import shutil

import pytest

from testing import fresh_python, run_recipe

needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="JAX is not installed"
)


def on_jax(code, *args):
    return fresh_python(code, *args, KERAS_BACKEND="jax")


_IMAGES = """
import sys, itertools, numpy as np, tensorflow as tf
from pathlib import Path
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.long_tail import long_tailed
from etfzoo.data.pipeline import Pipeline, InputShare
from etfzoo.data.sources import resolve
from etfzoo.runtime.device_cache import DeviceCache
from etfzoo.runtime.strategy import get_strategy

root, devices = Path(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
for split, label, number in itertools.product(("train", "val"), ("a", "b"), range(9)):
    folder = root / split / label
    folder.mkdir(parents=True, exist_ok=True)
    height, width = rng.integers(5, 90, 2)
    coarse = rng.integers(256, size=(4, 4, 3)).astype(np.float32)
    image = tf.image.resize(coarse, (height, width), "bicubic")
    image = tf.cast(tf.clip_by_value(image + rng.normal(0, 20, image.shape), 0, 255), tf.uint8)
    # Without coarser colours, which the host's decoder blends differently at a window's edge.
    jpeg = tf.io.encode_jpeg(image, chroma_downsampling=False)
    encoded = tf.io.encode_png(image) if number % 3 else jpeg
    (folder / f"{number}.{'png' if number % 3 else 'jpg'}").write_bytes(encoded.numpy())
source = resolve(f"folder:{root}")
strategy = get_strategy("mirrored", num_virtual_devices=devices) if devices > 1 else \\
    get_strategy("one_device")
share = InputShare()

def check(expected, found):
    expected, found = list(expected.as_numpy_iterator()), list(found)
    assert len(expected) == len(found) > 0
    for (images, labels), (made, made_labels) in zip(expected, found):
        made = np.asarray(made)
        assert made.shape == images.shape and made.dtype == images.dtype == np.uint8
        np.testing.assert_array_equal(labels, made_labels)
        off = np.abs(made.astype(int) - images)
        assert off.max() <= 1 and np.mean(off > 0) < 0.02, (off.max(), np.mean(off > 0))

for crop, flip, erasing, (height, width) in (
    ("resized_crop", True, 0.0, (24, 24)), ("resized_crop", False, 0.6, (7, 40)),
    ("shift", True, 1.0, (32, 24)), ("none", True, 0.0, (24, 32)),
):
    augmentation = Augmentation(
        crop, 0.08, flip, random_erasing=erasing, mean=(250.4, 3.0, 99.6)
    )
    pipeline = Pipeline(source, height, width, 0.875, 4, augmentation, seed=3)
    cache = DeviceCache(pipeline, strategy)
    for epoch, start in ((0, 0), (1, 2)):
        expected = pipeline.training("train", epoch, start, share)
        check(expected, cache.training("train", epoch, start))
    check(pipeline.evaluation("test", share), cache.evaluation("test"))

# A long tail: 9 and 3 images, of which no others are held.
tail = Pipeline(long_tailed(source, 3, "train"), 24, 24, 0.875, 4, Augmentation("shift"), seed=3)
cache = DeviceCache(tail, strategy)
check(tail.training("train", 1, 1, share), cache.training("train", 1, 1))
check(tail.evaluation("train", share), cache.evaluation("train"))
assert all(len(images) == 12 for images, _ in cache._held.values())
"""


@needs_jax
@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_images_made_on_devices_equal_those_of_the_host(tmp_path, devices):
    on_jax(_IMAGES, tmp_path / "images", devices)


_REFUSED = """
import sys, numpy as np, pytest
from types import SimpleNamespace
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.mixing import Mixing
from etfzoo.data.pipeline import Pipeline
from etfzoo.data import sources, tfds_source
from etfzoo.runtime.device_cache import DeviceCache
from etfzoo.errors import EtfzooError
from etfzoo.runtime.strategy import get_strategy

source = sources.resolve("digits", sys.argv[1])
strategy = get_strategy("one_device")
def cache(augmentation=Augmentation(), mixing=None, strategy=strategy):
    return DeviceCache(
        Pipeline(source, 8, 8, 1.0, 4, augmentation, 0, mixing=mixing), strategy
    )
for arguments in (dict(augmentation=Augmentation(rand_augment=5)), dict(mixing=Mixing(0.2))):
    with pytest.raises(EtfzooError, match="leave out `mixup`"):
        cache(**arguments)
device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**16})
small = SimpleNamespace(local_devices=[device], split=strategy.split)
with pytest.raises(EtfzooError, match="too much for the 0 GiB of the device"):
    next(cache(strategy=small).training("train", 0))
tfds_source.MEMORY_BYTES = 1000
with pytest.raises(EtfzooError, match="train split of digits is too large for `cache=device`"):
    next(cache().training("train", 0))
"""


@needs_jax
def test_what_cannot_be_cached_is_refused_in_one_line(embedded_dir):
    on_jax(_REFUSED, embedded_dir)


_INDEXED = """
import sys, numpy as np
from etfzoo.data import array_record, conversion
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.long_tail import long_tailed
from etfzoo.data.pipeline import InputShare, Pipeline
from etfzoo.runtime.device_cache import DeviceCache
from etfzoo.runtime.strategy import get_strategy

source, _ = conversion.convert("digits", *sys.argv[1:])
tail = long_tailed(source, 2, "train")
pipeline = Pipeline(tail, 8, 8, 1.0, 8, Augmentation("shift"), seed=3)
cache = DeviceCache(pipeline, get_strategy("one_device"))
for expected, found in (
    (pipeline.training("train", 1, 2, InputShare()), cache.training("train", 1, 2)),
    (pipeline.evaluation("select", InputShare()), cache.evaluation("select")),
):
    expected, found = list(expected.as_numpy_iterator()), list(found)
    assert len(expected) == len(found) > 0
    for (images, labels), (made, made_labels) in zip(expected, found):
        np.testing.assert_array_equal(labels, made_labels)
        assert np.abs(np.asarray(made).astype(int) - images).max() <= 1
# What is on the device is read from no file again.
array_record.Shards.record = None
assert len(list(cache.training("train", 2))) == tail.size("train") // 8
"""


@needs_jax
def test_what_is_read_by_index_is_cached(embedded_dir, tmp_path):
    on_jax(_INDEXED, embedded_dir, tmp_path)


_RUNS = """
import sys, json, dataclasses
from etfzoo.training import loop as training
from etfzoo.training.config import TrainConfig

config = TrainConfig(
    "digits", sys.argv[1], backbone="rn18", image_size=16, batch_size=64, epochs=2,
    augment="shift", crop=1.0, flip=False, learning_rate=1e-4, checkpoint_every=3,
)
config = dataclasses.replace(config, **json.loads(sys.argv[3]))
print("result", json.dumps(training.train_and_evaluate(config, sys.argv[2])))
"""


@needs_jax
@pytest.mark.slow
def test_a_run_is_that_of_the_host_and_resumes_bit_equal(embedded_dir, tmp_path):
    def result(name, **changes):
        out = on_jax(_RUNS, embedded_dir, tmp_path / name, json.dumps(changes))
        return json.loads(out.rpartition("result ")[2])

    host, cached = result("host"), result("cached", cache="device")
    for name in ("train_loss", "loss"):  # hits near random logits turn with single levels
        assert cached[name] == pytest.approx(host[name], rel=0.005), name
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    shutil.copy(tmp_path / "cached" / "config.json", stopped)
    checkpoints = sorted((tmp_path / "cached" / "checkpoints").glob("step-*.npz"))
    assert len(checkpoints) == 2  # the one before the end, and the end
    (stopped / "checkpoints").mkdir()
    shutil.copy(checkpoints[0], stopped / "checkpoints")
    assert result("stopped", cache="device") == cached


def test_under_tensorflow_it_is_refused_before_anything_is_written(embedded_dir, tmp_path):
    workdir = tmp_path / "run"
    err = run_recipe(
        "pretrain", "--cache=device", "--dataset=digits", f"--data_dir={embedded_dir}",
        "--backbone=rn18", "--protocol=quickstart", f"--workdir={workdir}", code=2,
    )  # fmt: skip
    assert "--cache=device needs KERAS_BACKEND=jax" in err and not workdir.exists()
