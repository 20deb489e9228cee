"""Mixup and cutmix of neighbours in a batch, with soft targets.

An example is mixed with its neighbour (0 with 1, 2 with 3, ...) in the random order of the epoch,
and each of the two has draws of its own, a function of its key. Pairs stay together when several
devices share a batch, so that the same images come out however many there are.
"""

import dataclasses

import tensorflow as tf

from etfzoo.errors import EtfzooError

_MIXING = 1  # tells the draws here from others of the same key


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How images and labels of a pair are mixed; each example takes one of the two, evenly.

    Attributes:
        mixup: alpha of the Beta(alpha, alpha) that the share of an image is drawn from (Zhang et
            al., "mixup: beyond empirical risk minimization", ICLR 2018); 0 is off.
        cutmix: alpha of the Beta(alpha, alpha) that the share of an image is drawn from, before
            its neighbour's window is cut off at the edge (Yun et al., "CutMix", ICCV 2019); 0 is
            off.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __bool__(self):
        return bool(self.mixup or self.cutmix)

    def check_batch_size(self, batch_size: int, replicas: int = 1) -> None:
        """Raises EtfzooError where the part of a device would hold half of a pair."""
        if self and batch_size // replicas % 2:
            raise EtfzooError(
                "mixup and cutmix mix pairs: each device needs an even number of images, and "
                f"`batch_size={batch_size}` gives {batch_size // replicas} to each of {replicas}; "
                f"pass a multiple of {2 * replicas}"
            )

    def draw(self, key: tf.Tensor, height: int, width: int) -> dict[str, tf.Tensor]:
        """What is drawn for one example.

        Args:
            key: int `[2]`, the stateless seed of this example in this epoch.
            height, width: of the image in pixels.

        Returns:
            `share`: float32, the example's share of its target; `blend`: float32, its share of
            each pixel, 1 for cutmix; `window`: int32 `[4]`, top, left, bottom and right of the
            neighbour's pixels, empty for mixup.
        """
        keys = tf.unstack(tf.random.split(tf.random.fold_in(key, _MIXING), 4))
        if self.mixup:
            share = tf.cast(_beta(keys[0], self.mixup), tf.float32)
            mixup = {"share": share, "blend": share, "window": tf.zeros([4], tf.int32)}
        if self.cutmix:
            window = _window(keys[1], _beta(keys[2], self.cutmix), height, width)
            area = (window[2] - window[0]) * (window[3] - window[1])
            share = 1 - tf.cast(area, tf.float32) / (height * width)
            cutmix = {"share": share, "blend": tf.constant(1.0), "window": window}
        if self.mixup and self.cutmix:
            first = tf.random.stateless_uniform([], keys[3]) < 0.5
            return {name: tf.where(first, mixup[name], cutmix[name]) for name in mixup}
        return mixup if self.mixup else cutmix


def mix_pair(images, labels, draws, num_classes: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes two examples with each other.

    Args:
        images: uint8 `[2, H, W, 3]`.
        labels: class numbers `[2]`.
        draws: of both, see `Mixing.draw`.
        num_classes: K.

    Returns:
        mixed images uint8 `[2, H, W, 3]` and targets float32 `[2, K]`, whose rows sum to 1.
    """
    mixed = [
        _mix(images[i], images[1 - i], draws["blend"][i], draws["window"][i]) for i in range(2)
    ]
    share, one_hot = draws["share"][:, None], tf.one_hot(labels, num_classes)
    return tf.stack(mixed), share * one_hot + (1 - share) * tf.reverse(one_hot, [0])


def _mix(image, neighbour, blend, window):
    """An image `[H, W, 3]` blended with its neighbour, or (blend 1) with its pixels in a window."""

    def blended():
        one, other = tf.cast(image, tf.float32), tf.cast(neighbour, tf.float32)
        return tf.cast(tf.round(blend * one + (1 - blend) * other), tf.uint8)

    def patched():
        top, left, bottom, right = tf.unstack(window)
        rows, patch = image[top:bottom], neighbour[top:bottom, left:right]
        rows = tf.concat([rows[:, :left], patch, rows[:, right:]], axis=1)
        return tf.concat([image[:top], rows, image[bottom:]], axis=0)

    return tf.ensure_shape(tf.cond(blend < 1, blended, patched), image.shape)


def _beta(key, alpha):
    """A draw from Beta(alpha, alpha), float64.

    It is X / (X + Y) of two Gamma(alpha) draws, each made as log G + log(U) / alpha with G from
    Gamma(alpha + 1): for small alpha both X and Y would underflow.
    """
    gamma_key, uniform_key = tf.unstack(tf.random.split(key, 2))
    gammas = tf.random.stateless_gamma([2], gamma_key, alpha=alpha + 1, dtype=tf.float64)
    uniforms = 1 - tf.random.stateless_uniform([2], uniform_key, dtype=tf.float64)  # never 0
    logs = tf.math.log(gammas) + tf.math.log(uniforms) / alpha
    return tf.sigmoid(logs[0] - logs[1])


def _window(key, share, height, width):
    """Cutmix's window: 1 - share of the area around an even centre, as far as it is inside."""
    sides = tf.constant([height, width])
    half = tf.cast(tf.sqrt(1 - share) * tf.cast(sides, tf.float64), tf.int32) // 2
    center = tf.cast(tf.random.stateless_uniform([2], key) * tf.cast(sides, tf.float32), tf.int32)
    center = tf.minimum(center, sides - 1)
    return tf.concat([tf.maximum(center - half, 0), tf.minimum(center + half, sides)], 0)
