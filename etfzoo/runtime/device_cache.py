"""A data set that lives on the device, for one that outruns the CPUs beside it. JAX only.

Images are decoded once and kept there as uint8. Each step the host sends what it draws, some bytes
an image, and the device crops, resizes, mirrors and erases. Order and draws are those of the
pipeline on the host, and so are the images, but for rounding (some values differ by one level of
255) and at the edges of a JPEG's window, whose colours the host blends without the pixels outside
of it.
"""

import logging
import math

import jax
import numpy as np
import tensorflow as tf
from jax import lax
from jax import numpy as jnp

from etfzoo.data import augment, decoding
from etfzoo.data.pipeline import PARALLEL, Pipeline
from etfzoo.errors import EtfzooError
from etfzoo.progress import Progress

log = logging.getLogger("etfzoo")

_SHARE = 0.6  # of a device's memory; the rest is for the network


class DeviceCache:
    """The batches of a pipeline, made on the devices.

    Args:
        pipeline: its data set must be one that sources hold in memory (up to 1 GiB encoded) or
            read by index.
        strategy: an `etfzoo.runtime.strategy_jax.DataParallel`; each device holds all images.

    Raises:
        EtfzooError: the pipeline draws what is not made on devices: RandAugment, mixup, cutmix.
    """

    def __init__(self, pipeline: Pipeline, strategy):
        if pipeline.mixing or pipeline.augmentation.rand_augment:
            raise EtfzooError(
                "`cache=device` crops, resizes, mirrors and erases only: leave out `mixup`, "
                "`cutmix` and `rand_augment`, or `cache`"
            )
        self.pipeline = pipeline
        self.strategy = strategy
        # (split, fast) -> images on the devices [N, H, W, 3], shapes of each [N, 2]
        self._held = {}
        self._pixels = jax.jit(self._make, out_shardings=strategy.split)

    def at_size(self, height: int, width: int) -> "DeviceCache":
        """The same images, held once, at another size in pixels."""
        other = DeviceCache(self.pipeline.at_size(height, width), self.strategy)
        other._held = self._held
        return other

    def training(self, split: str, epoch: int, start_step: int = 0):
        """Yields the batches of `Pipeline.training` as JAX arrays.

        Raises:
            EtfzooError: the split is too large for this machine or device.
        """
        images, shapes = self._hold(split, fast=True)
        seed = self.pipeline.draw_seed(epoch)
        size, augmentation = self.pipeline.preprocessing, self.pipeline.augmentation
        height, width, crop = size

        def numbers(record):
            drawn = augment.random_numbers(seed(record), augmentation)
            return record["index"], drawn, record["label"]

        def windows(index, drawn, labels):
            shape = tf.gather(shapes, index)
            return index, *augment.draws(shape, drawn, height, width, augmentation, crop), labels

        share = self.strategy.share
        records = self.pipeline.training_records(split, epoch, start_step, share, images=False)
        return self._batches(images, records.map(numbers, PARALLEL), windows, share)

    def evaluation(self, split: str):
        """Yields the batches of `Pipeline.evaluation` as JAX arrays; all whole, see there.

        Raises:
            EtfzooError: the split is too large for this machine or device.
        """
        images, shapes = self._hold(split)
        height, width, crop = self.pipeline.preprocessing
        pad = tf.constant(augment.padding(height, width))

        def windows(index, labels):
            shown = augment.evaluation_window(tf.gather(shapes, index), height, width, crop)
            no, nothing = tf.zeros_like(index, bool), tf.zeros_like(shown[0])
            return index, *shown, ~no, nothing[:, :2] + pad, no, nothing, labels

        share = self.strategy.share
        records = self.pipeline.evaluation_records(split, share, images=False)
        records = records.map(lambda record: (record["index"], record["label"]))
        return self._batches(images, records, windows, share)

    def _batches(self, images, records, windows, share):
        """Batches of images from records, of whose batches `windows` makes what is shown."""
        draws = self.pipeline.batched(records, share, drop_remainder=False)
        draws = draws.map(windows, PARALLEL).prefetch(2)
        for *drawn, labels in draws.as_numpy_iterator():
            drawn = [self.strategy.place(d, self.strategy.split) for d in drawn]
            yield self._pixels(images, *drawn), labels

    def _hold(self, split, fast=False):
        if (split, fast) not in self._held:
            images, shapes = self._decoded(split, fast)
            images = self.strategy.place(images, self.strategy.replicated)
            self._held[split, fast] = images, shapes
        return self._held[split, fast]

    def _decoded(self, split, fast):
        """All images of a split, below and right of which is black, and their shapes."""
        records = self.pipeline.evaluation_records(split)
        if "index" not in records.element_spec:
            raise EtfzooError(
                f"the {split} split of {self.pipeline.source.name} is too large for `cache=device` "
                "unless it is read by index: python recipes/prepare.py --file_format=array_record"
            )
        decoded = records.map(
            lambda record: (record["index"], decoding.decode(record["image"], fast)), PARALLEL
        )
        sizes = records.map(lambda r: (r["index"], decoding.image_size(r["image"])), PARALLEL)
        sizes = dict(sizes.as_numpy_iterator())
        count = 1 + int(max(sizes))  # with the places of images that are left out
        shapes = np.zeros((count, 2), np.int32)
        for index, size in sizes.items():
            shapes[index] = size
        shape = (count, *shapes.max(0), 3)
        self._check_memory(split, math.prod(map(int, shape)))
        images = np.zeros(shape, np.uint8)
        progress = Progress(f"{split} split to the device", count)
        for number, (index, image) in enumerate(decoded.as_numpy_iterator()):
            images[index, : image.shape[0], : image.shape[1]] = image
            if number % 256 == 0:
                progress.update(number)
        progress.finish()
        return images, tf.constant(shapes)

    def _check_memory(self, split, size):
        known = self.strategy.local_devices[0].memory_stats() or {}
        limit = known.get("bytes_limit")
        held = sum(images.nbytes for images, _ in self._held.values())
        if limit and held + size > _SHARE * limit:
            raise EtfzooError(
                f"the {split} split of {self.pipeline.source.name} takes "
                f"{size / 2**30:.1f} GiB decoded, too much for the {limit / 2**30:.0f} GiB of the "
                "device: leave out `cache=device`"
            )

    def _make(self, images, index, region, window, antialias, shift, flip, erased):
        """Images uint8 of a batch from what was drawn for it; see `augment.training_image`."""
        height, width, _ = self.pipeline.preprocessing
        pixels = images[index].astype(jnp.float32)
        rows, columns = (
            _weights(region[:, axis::2], window[:, axis::2], antialias, new, pixels.shape[1 + axis])
            for axis, new in enumerate((height, width))
        )
        pixels = jnp.einsum("boh,bhwc->bowc", rows, pixels, precision="highest")
        pixels = jnp.einsum("bpw,bowc->bopc", columns, pixels, precision="highest")
        pixels = jnp.round(pixels).astype(jnp.uint8)
        if self.pipeline.augmentation.crop == "shift":
            pad_h, pad_w = augment.padding(height, width)
            pixels = jnp.pad(pixels, ((0, 0), (pad_h, pad_h), (pad_w, pad_w), (0, 0)))
            pixels = jax.vmap(
                lambda image, at: lax.dynamic_slice(image, (*at, 0), (height, width, 3))
            )(pixels, shift)
        pixels = jnp.where(flip[:, None, None, None], pixels[:, :, ::-1], pixels)
        if not self.pipeline.augmentation.random_erasing:
            return pixels
        y, x = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
        top, left, bottom, right = erased.T[..., None, None, None]
        inside = (top <= y) & (y < bottom) & (left <= x) & (x < right)
        fill = jnp.array(self.pipeline.augmentation.erased_pixel, jnp.uint8)
        return jnp.where(inside, fill, pixels)


def _weights(region, window, antialias, size, pixels):
    """The bilinear filter from windows of an axis to their new pixels.

    Args:
        region, window: start and length of what is read and of what is shown, `[B, 2]`.
        antialias: whether the filter grows with the window, `[B]`.
        size: new pixels.
        pixels: of the axis.

    Returns:
        float32 `[B, size, pixels]`, rows of sum 1, zero outside of the region.
    """
    first, count = (region[:, i, None, None].astype(jnp.float32) for i in range(2))
    start, length = (window[:, i, None, None] for i in range(2))
    scale = length / size
    radius = jnp.where(antialias[:, None, None], jnp.maximum(scale, 1), 1)
    centers = start + scale * (jnp.arange(size, dtype=jnp.float32)[None, :, None] + 0.5)
    positions = jnp.arange(pixels, dtype=jnp.float32)[None, None] + 0.5
    weights = jnp.maximum(0, 1 - jnp.abs(positions - centers) / radius)
    weights = jnp.where((positions > first) & (positions < first + count), weights, 0)
    return weights / weights.sum(-1, keepdims=True)
