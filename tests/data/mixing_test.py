"""Mixup and cutmix: the draws, the mixture against NumPy, and that devices change nothing."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from etfzoo.data import sources
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.mixing import Mixing, mix_pair
from etfzoo.data.pipeline import InputShare, Pipeline
from etfzoo.errors import EtfzooError
from testing import forked_python, make_image_folder

HEIGHT, WIDTH, BATCH = 12, 10, 8
BOTH = Mixing(0.2, 1.0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 17), ("test", 3)):
        make_image_folder(root / split, {"a": count, "b": count, "c": count}, (16, 14))
    return root


def make_pipeline(photos, mixing, batch=BATCH):
    source = sources.resolve(f"folder:{photos}")
    return Pipeline(source, HEIGHT, WIDTH, 0.9, batch, Augmentation(), 0, mixing=mixing)


def read(batches):
    return [[part.numpy() for part in batch] for batch in batches]


def assert_same(one, other):
    assert len(one) == len(other)
    for batch, expected in zip(one, other, strict=True):
        for part, wanted in zip(batch, expected, strict=True):
            np.testing.assert_array_equal(part, wanted)


def draws(mixing, count, epoch=3, size=(HEIGHT, WIDTH)):
    draw = tf.function(lambda key: mixing.draw(key, *size))
    keys = tf.stack([tf.fill([count], epoch), tf.range(count)], axis=1)
    drawn = tf.map_fn(draw, keys, fn_output_signature={
        "share": tf.float32, "blend": tf.float32, "window": tf.int32
    })  # fmt: skip
    return {name: values.numpy() for name, values in drawn.items()}


@pytest.mark.parametrize(
    "alpha", [0.01, 1.0, *(pytest.param(a, marks=pytest.mark.slow) for a in (0.2, 8.0))]
)
def test_mixup_draws_from_beta(alpha):
    drawn = draws(Mixing(mixup=alpha), 2000)
    np.testing.assert_array_equal(drawn["share"], drawn["blend"])
    assert (drawn["window"] == 0).all()
    shares = drawn["share"].astype(float)
    assert np.isfinite(shares).all() and shares.min() >= 0 and shares.max() <= 1
    if alpha == 0.01:  # all but a few are 0 or 1 in float32, where no test of continuity applies
        assert 0.45 < shares.mean() < 0.55 and ((shares < 1e-3) | (shares > 0.999)).mean() > 0.9
    else:
        assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_cutmix_draws_windows():
    drawn = draws(Mixing(cutmix=1.0), 2000, size=(300, 200))
    top, left, bottom, right = drawn["window"].T
    assert top.min() == 0 and left.min() == 0 and bottom.max() == 300 and right.max() == 200
    assert (top <= bottom).all() and (left <= right).all()
    area = (bottom - top) * (right - left) / 60_000
    np.testing.assert_allclose(drawn["share"], 1 - area, atol=1e-6)
    assert (drawn["blend"] == 1).all()
    # Those that no edge cuts: the sides are sqrt(1 - share), where 1 - share is even in 0..1.
    whole = (top > 0) & (left > 0) & (bottom < 300) & (right < 200) & (bottom > top + 20)
    sides = (bottom - top) / (right - left)
    np.testing.assert_allclose(sides[whole], 1.5, rtol=0.15)
    # The centre is even in the image: of all windows, cut ones too, a half-plane has its share.
    expected = reference_areas(np.random.default_rng(0), 20_000)
    assert stats.ks_2samp(area, expected).pvalue > 1e-3


def reference_areas(rng, count, height=300, width=200):
    """Areas of the windows of the paper's algorithm, in NumPy."""
    share = rng.beta(1, 1, count)
    areas = np.ones(count)
    for side in (height, width):
        cut = (side * np.sqrt(1 - share)).astype(int)
        center = rng.integers(side, size=count)
        low, high = np.clip([center - cut // 2, center + cut // 2], 0, side)
        areas *= (high - low) / side
    return areas


def test_with_both_each_takes_half():
    drawn = draws(BOTH, 1000)
    cut = drawn["blend"] == 1
    other = draws(Mixing(cutmix=1.0), 1000)
    mixed = draws(Mixing(mixup=0.2), 1000)
    cut &= drawn["share"] == other["share"]
    assert 0.44 < cut.mean() < 0.56
    np.testing.assert_array_equal(drawn["share"][~cut], mixed["share"][~cut])
    np.testing.assert_array_equal(drawn["window"][~cut], 0)


def test_draws_are_functions_of_the_key():
    one, again = draws(BOTH, 50), draws(BOTH, 100)
    np.testing.assert_array_equal(one["share"], again["share"][:50])
    other = draws(BOTH, 50, epoch=4)
    assert np.mean(one["share"] == other["share"]) < 0.2


def reference(images, labels, drawn, classes):
    """The mixture by the definition, in float64."""
    mixed, targets = np.empty_like(images), np.zeros((2, classes))
    for i in range(2):
        blend = np.full(images.shape[1:3], np.float64(drawn["blend"][i]))
        top, left, bottom, right = drawn["window"][i]
        blend[top:bottom, left:right] = 0
        mine, other = images[i].astype(float), images[1 - i].astype(float)
        mixed[i] = np.rint(blend[..., None] * mine + (1 - blend[..., None]) * other)
        targets[i, labels[i]] += drawn["share"][i]
        targets[i, labels[1 - i]] += 1 - drawn["share"][i]
    return mixed, targets


@pytest.mark.parametrize("mixing", [Mixing(mixup=1.0), Mixing(cutmix=1.0), Mixing(1.0, 1.0)])
def test_the_mixture_equals_numpy(mixing):
    rng = np.random.default_rng(0)
    drawn = draws(mixing, 80)
    for first in range(0, 80, 2):
        images = rng.integers(0, 256, (2, HEIGHT, WIDTH, 3), np.uint8)
        labels = rng.integers(5, size=2)
        pair = {name: values[first : first + 2] for name, values in drawn.items()}
        mixed, targets = mix_pair(tf.constant(images), labels, pair, 5)
        assert mixed.dtype == tf.uint8 and targets.dtype == tf.float32
        wanted, wanted_targets = reference(images, labels, pair, 5)
        difference = np.abs(mixed.numpy().astype(int) - wanted)
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3  # ties in float32
        np.testing.assert_allclose(targets, wanted_targets, atol=1e-6)
        np.testing.assert_allclose(targets.numpy().sum(1), 1, atol=1e-6)


def test_batches_are_the_plain_ones_mixed(photos):
    plain = read(make_pipeline(photos, None).training("train", 2))
    mixed = read(make_pipeline(photos, BOTH).training("train", 2))
    assert len(plain) == len(mixed) == 51 // BATCH
    order, seed = make_pipeline(photos, BOTH)._epoch_seeds(2)
    source = sources.resolve(f"folder:{photos}")
    keys = [int(r["key"]) for r in source.records("train", order)]
    for number, ((images, labels), (found, targets)) in enumerate(zip(plain, mixed, strict=True)):
        assert found.shape == images.shape and targets.shape == (BATCH, 3)
        for i in range(0, BATCH, 2):
            two = keys[number * BATCH + i :][:2]
            drawn = [BOTH.draw(tf.constant([seed, key]), HEIGHT, WIDTH) for key in two]
            drawn = {name: np.stack([d[name] for d in drawn]) for name in drawn[0]}
            wanted, wanted_targets = reference(images[i : i + 2], labels[i : i + 2], drawn, 3)
            assert np.abs(found[i : i + 2].astype(int) - wanted).max() <= 1
            np.testing.assert_allclose(targets[i : i + 2], wanted_targets, atol=1e-6)


def test_batches_repeat_and_resume_bit_for_bit(photos):
    whole = read(make_pipeline(photos, BOTH).training("train", 1))
    assert_same(read(make_pipeline(photos, BOTH).training("train", 1)), whole)
    for step in (1, 6):
        assert_same(read(make_pipeline(photos, BOTH).training("train", 1, step)), whole[step:])
    other = read(make_pipeline(photos, BOTH).training("train", 0))
    assert not np.array_equal(other[0][0], whole[0][0])


@pytest.mark.parametrize("count, replicas, start", [(1, 2, 0), (2, 4, 2)])
def test_shares_of_all_pipelines_are_the_global_batches(photos, count, replicas, start):
    whole = read(make_pipeline(photos, BOTH).training("train", 5, start))
    parts = [
        read(
            make_pipeline(photos, BOTH).training("train", 5, start, InputShare(i, count, replicas))
        )
        for i in range(count)
    ]
    local = replicas // count
    together = [
        [np.concatenate(column) for column in zip(*pieces, strict=True)]
        for step in range(len(whole))
        for pieces in [[b for p in parts for b in p[step * local : (step + 1) * local]]]
    ]
    assert_same(together, whole)


_MIRRORED = """
import sys, numpy as np, tensorflow as tf
from etfzoo.runtime import step_tf
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.mixing import Mixing
from etfzoo.data.pipeline import Pipeline
from etfzoo.data.sources import resolve
from etfzoo.runtime.strategy import get_strategy

strategy = get_strategy("mirrored", None, 2)
pipeline = Pipeline(
    resolve("folder:" + sys.argv[1]), 12, 10, 0.9, 8, Augmentation(), 0, mixing=Mixing(0.2, 1.0)
)
batches = step_tf.distribute(strategy, lambda share: pipeline.training("train", 1, 0, share))
for number, batch in enumerate(batches):
    local = [strategy.experimental_local_results(part) for part in batch]
    assert len(local[0]) == 2 and local[0][0].device != local[0][1].device
    names = "images", "targets"
    np.savez(f"{sys.argv[2]}/{number}.npz", **{n: np.concatenate(p) for n, p in zip(names, local)})
"""


def test_two_devices_get_the_batches_of_one(photos, tmp_path):
    forked_python(_MIRRORED, photos, tmp_path)
    wanted = read(make_pipeline(photos, BOTH).training("train", 1))
    found = [np.load(tmp_path / f"{number}.npz") for number in range(len(wanted))]
    assert len(list(tmp_path.iterdir())) == len(wanted)
    assert_same([[f["images"], f["targets"]] for f in found], wanted)


@pytest.mark.parametrize("batch, replicas", [(7, 1), (6, 2), (12, 4)])
def test_half_a_pair_on_a_device_is_refused(photos, batch, replicas):
    with pytest.raises(EtfzooError, match=f"pass a multiple of {2 * replicas}"):
        make_pipeline(photos, BOTH, batch).training("train", 0, 0, InputShare(0, 1, replicas))
    Mixing().check_batch_size(batch, replicas)
