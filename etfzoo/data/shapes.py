"""Embedded data sets: small images that are made on the spot, without any download.

`Shapes` renders geometric shapes with NumPy. It has a source domain and two target domains,
and no class is in more than one of them:

* `shapes/source`: filled shapes on colour gradients with distractors (to pretrain on);
* `shapes/textures`: textured shapes on textured backgrounds (a moderate domain shift);
* `shapes/outlines`: thin line drawings on cluttered paper (a larger domain shift).

`Digits` wraps the 8x8 scans of handwritten digits that come with scikit-learn. Both are
ordinary TFDS builders: after `prepare(data_dir)`, `tfds.load("digits", data_dir=data_dir)` works.
"""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds

from etfzoo.data.datasets import EMBEDDED
from etfzoo.errors import EtfzooError, extra, first_line

SPLITS = ("train", "validation", "test")
IMAGE_SIZE = 32

_FEW = (30, 10, 50)  # Images a class in each split of a target: few, so that transfer matters.
_DIGITS_CUTS = (20, 50)  # Digits: 20 a class to train on, 30 to validate, the rest to test.
_GRID_SIZE = 2 * IMAGE_SIZE  # Images are drawn at twice their size, then averaged 2x2.
_AXIS = (np.arange(_GRID_SIZE) + 0.5) / _GRID_SIZE * 2 - 1
_GRID = _AXIS[None, :] - 1j * _AXIS[:, None]
_TEMPLATE_SIZE = 128
_TEMPLATE_EXTENT = 1.5  # Templates span [-1.5, 1.5]^2; shapes fit the unit disc, roughly.

# Signed distance functions (negative inside) of complex points z = x + iy, with y upwards.
# Unions and cuts by min/max are exact near the contour, which is all that drawing needs.


def _disc(z, radius, centre=0):
    return np.abs(z - centre) - radius


def _polygon(z, *vertices):
    distance = np.full(z.shape, np.inf)
    inside = np.zeros(z.shape, bool)
    for a, b in zip(vertices, vertices[1:] + vertices[:1], strict=True):
        edge, w = b - a, z - a
        t = np.clip((w * np.conj(edge)).real / abs(edge) ** 2, 0, 1)
        distance = np.minimum(distance, np.abs(w - t * edge))
        if edge.imag:  # Even-odd rule: count the edges that a horizontal ray crosses.
            crossed = (a.imag > z.imag) != (b.imag > z.imag)
            inside ^= crossed & (w.real < edge.real * w.imag / edge.imag)
    return np.where(inside, -distance, distance)


def _mirrored(z, *right):
    """Polygon symmetric about the y axis, given the vertices with x >= 0 from top to bottom."""
    left = tuple(-vertex.conjugate() for vertex in reversed(right) if vertex.real)
    return _polygon(z, *right, *left)


def _box(z, half_width, half_height, centre=0):
    corner = complex(half_width, half_height)
    return _mirrored(z - centre, corner, corner.conjugate())


def _polar(z, radius, count=120):
    """Closed curve of which `radius` gives the distance from the origin at each angle."""
    angles = 2 * np.pi * np.arange(count) / count
    return _polygon(z, *(radius(angles) * np.exp(1j * angles)).tolist())


def _ellipse(z, a, b):
    return _polar(z, lambda t: a * b / np.hypot(b * np.cos(t), a * np.sin(t)))


def _star(z, points, outer, inner):
    angles = np.pi / 2 + np.pi * np.arange(2 * points) / points
    return _polygon(z, *(np.tile([outer, inner], points) * np.exp(1j * angles)).tolist())


def _regular(z, sides, radius=0.95):
    return _star(z, sides, radius, radius * np.cos(np.pi / sides))


def _union(*distances):
    return functools.reduce(np.minimum, distances)


def _cut(distance, removed):
    return np.maximum(distance, -removed)


_SOURCE = {
    "disc": lambda z: _disc(z, 0.85),
    "square": lambda z: _box(z, 0.72, 0.72),
    "triangle": lambda z: _regular(z, 3, 1.0),
    "star": lambda z: _star(z, 5, 1.05, 0.42),
    "cross": lambda z: _union(_box(z, 0.92, 0.3), _box(z, 0.3, 0.92)),
    "ring": lambda z: np.abs(_disc(z, 0.68)) - 0.22,
    "half_disc": lambda z: np.maximum(_disc(z, 0.95, -0.4j), -0.4 - z.imag),
    "crescent": lambda z: _cut(_disc(z, 0.92), _disc(z, 0.72, 0.48)),
    "heart": lambda z: _union(
        _disc(z, 0.46, -0.42 + 0.3j),
        _disc(z, 0.46, 0.42 + 0.3j),
        _mirrored(z, 0.5j, 0.82 + 0.08j, -0.9j),
    ),
    "arrow": lambda z: _mirrored(z, 1j, 0.72 + 0.1j, 0.22 + 0.1j, 0.22 - 0.9j),
    "ellipse": lambda z: _ellipse(z, 0.95, 0.45),
    "pentagon": lambda z: _regular(z, 5),
    "droplet": lambda z: _union(_disc(z, 0.56, -0.35j), _mirrored(z, 1j, 0.51 - 0.12j)),
    "corner": lambda z: _polygon(
        z, -0.7 + 0.8j, -0.2 + 0.8j, -0.2 - 0.3j, 0.7 - 0.3j, 0.7 - 0.8j, -0.7 - 0.8j
    ),
    "tee": lambda z: _mirrored(z, 0.8 + 0.8j, 0.8 + 0.3j, 0.25 + 0.3j, 0.25 - 0.8j),
    "hourglass": lambda z: _mirrored(z, 0.7 + 0.85j, 0.12, 0.7 - 0.85j),
    "gear": lambda z: _polar(z, lambda t: 0.78 + np.clip(0.6 * np.cos(8 * t), -0.17, 0.17)),
    "flower": lambda z: _polar(z, lambda t: 0.68 + 0.28 * np.cos(5 * t)),
}
_TEXTURES = {
    "hexagon": lambda z: _regular(z, 6),
    "trapezoid": lambda z: _mirrored(z, 0.48 + 0.55j, 0.95 - 0.55j),
    "capsule": lambda z: _disc(z, 0.4, np.clip(z.real, -0.6, 0.6)),
    "chevron": lambda z: _mirrored(z, 0.9j, 0.85, 0.85 - 0.7j, 0.3j),
    "horseshoe": lambda z: np.maximum(
        np.abs(_disc(z, 0.58, 1j * np.clip(z.imag, -2, 0.25))) - 0.22, -0.85 - z.imag
    ),
    "sparkle": lambda z: _star(z, 4, 1.1, 0.36),
    "pie": lambda z: _cut(_disc(z, 0.9), _polygon(z, 0j, 2 + 1.5j, 2 - 1.5j)),
    "frame": lambda z: _cut(_box(z, 0.78, 0.78), _box(z, 0.38, 0.38)),
    "house": lambda z: _mirrored(z, 0.95j, 0.9 + 0.1j, 0.62 + 0.1j, 0.62 - 0.8j),
    "lightning": lambda z: _polygon(
        z, 0.45 + 1j, -0.75 - 0.2j, -0.1 - 0.2j, -0.45 - 1j, 0.75 + 0.2j, 0.1 + 0.2j
    ),
}
_OUTLINES = {
    "kite": lambda z: _mirrored(z, 1j, 0.65 + 0.3j, -1j),
    "fish": lambda z: _union(
        _ellipse(z + 0.25, 0.75, 0.45), _polygon(z, 0.3, 0.95 + 0.5j, 0.95 - 0.5j)
    ),
    "cloud": lambda z: _union(
        _disc(z, 0.37, -0.58 - 0.18j),
        _disc(z, 0.5, -0.08 + 0.15j),
        _disc(z, 0.37, 0.58 - 0.18j),
        _box(z, 0.58, 0.2, -0.35j),
    ),
    "bottle": lambda z: _mirrored(z, 0.18 + 1j, 0.18 + 0.45j, 0.45 + 0.15j, 0.45 - 0.95j),
    "tree": lambda z: _mirrored(
        z, 1j, 0.55 + 0.15j, 0.28 + 0.15j, 0.75 - 0.5j, 0.16 - 0.5j, 0.16 - 0.95j
    ),
    "trefoil": lambda z: _union(*(_disc(z, 0.46, 0.5 * 1j ** (1 + 4 * k / 3)) for k in range(3))),
    "boat": lambda z: _union(
        _mirrored(z, 0.95 - 0.3j, 0.55 - 0.8j), _polygon(z, -0.2 - 0.3j, -0.2 + 1j, 0.75 - 0.3j)
    ),
    "crown": lambda z: _mirrored(z, 0.8j, 0.4, 0.95 + 0.65j, 0.75 - 0.65j),
    "mushroom": lambda z: _union(
        np.maximum(_disc(z, 0.85), -z.imag), _mirrored(z, 0.27 + 0.1j, 0.27 - 0.8j)
    ),
    "eight": lambda z: _union(_disc(z, 0.5, 0.45j), _disc(z, 0.5, -0.45j)),
}


@functools.cache
def _template(distance):
    """Samples a signed distance function once and for all; images just look it up."""
    axis = np.linspace(-_TEMPLATE_EXTENT, _TEMPLATE_EXTENT, _TEMPLATE_SIZE)
    return distance(axis[None, :] + 1j * axis[:, None])


def _lookup(field, z):
    """Bilinear interpolation, at the points `z`, of a square `field` that spans [-1, 1]^2."""
    last = len(field) - 1
    x, y = (np.clip((c + 1) / 2 * last, 0, last - 1e-6) for c in (z.real, z.imag))
    column, row = x.astype(int), y.astype(int)
    x, y = x - column, y - row
    low = field[row, column] * (1 - x) + field[row, column + 1] * x
    high = field[row + 1, column] * (1 - x) + field[row + 1, column + 1] * x
    return low * (1 - y) + high * y


def _coverage(distance):
    """Anti-aliased mask of a signed distance given in grid steps."""
    return np.clip(0.5 - distance, 0, 1)


def _paint(canvas, mask, colour):
    canvas += mask[..., None] * (colour - canvas)


def _noise(rng, z, cells):
    """Smooth random field with values in [0, 1]; `cells` sets how fast it varies."""
    return _lookup(rng.random((cells + 1, cells + 1)), z)


def _pattern(rng, z):
    """Random texture with values in [0, 1]: stripes, checks, dots or blotches."""
    frequency = np.pi * rng.uniform(2, 4.5)
    w = z * np.exp(2j * np.pi * rng.random()) * frequency + rng.uniform(0, 6)
    kind = rng.integers(4)
    if kind == 0:
        wave = np.sin(w.real)
    elif kind == 1:
        wave = 2 * np.sin(w.real) * np.sin(w.imag)
    elif kind == 2:
        wave = np.cos(w.real) + np.cos(w.imag) - 0.6
    else:
        wave = 4 * _noise(rng, z, 12) - 2
    return np.clip(0.5 + 2 * wave, 0, 1)


def _textured(rng, z, colour):
    """Canvas of a random pattern of `colour` and another one not far from it."""
    return colour + _pattern(rng, z)[..., None] * rng.uniform(-0.4, 0.4, 3)


def _scribble(rng, canvas, z, count, width):
    """Paints `count` random strokes, some as short as dots."""
    for _ in range(count):
        start = complex(*rng.uniform(-1, 1, 2))
        w = (z - start) * np.exp(2j * np.pi * rng.random())
        stroke = _disc(w, 0, np.clip(w.real, 0, rng.uniform(0, 1)))
        half_width = rng.uniform(0.5, 1) * width
        _paint(canvas, _coverage((stroke - half_width) * _GRID_SIZE / 2), rng.random(3))


def _draw_filled(rng, z, distance):
    """Filled shapes on colour gradients with distractors."""
    # Light on dark, so that no shape vanishes and a demo's few epochs suffice.
    start, end = rng.uniform(0, 0.45, (2, 3))
    ramp = np.clip(0.5 + 0.5 * (z * np.exp(2j * np.pi * rng.random())).real, 0, 1)
    canvas = start + (end - start) * ramp[..., None]
    _scribble(rng, canvas, z, rng.integers(0, 4), width=0.06)
    _paint(canvas, _coverage(distance), rng.uniform(0.55, 1, 3))
    return canvas


def _draw_textured(rng, z, distance):
    """Textured shapes on textured backgrounds."""
    canvas = _textured(rng, z, rng.uniform(0, 0.6, 3))
    _paint(canvas, _coverage(distance), _textured(rng, z, rng.uniform(0.4, 1, 3)))
    return canvas


def _draw_outlined(rng, z, distance):
    """Thin line drawings of shapes on cluttered paper, dark on light or light on dark."""
    paper, ink = rng.uniform(0.7, 1, 3), rng.uniform(0, 0.35, 3)
    if rng.random() < 0.5:
        paper, ink = ink, paper
    canvas = paper + 0.2 * (_noise(rng, z, 4)[..., None] - 0.5)
    _scribble(rng, canvas, z, rng.integers(3, 8), width=0.05)
    _paint(canvas, _coverage(np.abs(distance) - rng.uniform(1.0, 1.8)), ink)
    return canvas


@dataclasses.dataclass(eq=False)
class ShapesConfig(tfds.core.BuilderConfig):
    """One domain of `Shapes`.

    Attributes:
        shapes: class name -> signed distance function; the order gives the labels.
        draw: the drawing style, called with (rng, points, distances in grid steps).
        per_class: number of images a class in each of `SPLITS`.
    """

    shapes: dict = dataclasses.field(default_factory=dict)
    draw: Callable | None = None
    per_class: tuple = ()


class Shapes(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `shapes` of rendered 32x32 RGB shapes; its configs are the domains."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        ShapesConfig(name="source", shapes=_SOURCE, draw=_draw_filled, per_class=(160, 20, 50)),
        ShapesConfig(name="textures", shapes=_TEXTURES, draw=_draw_textured, per_class=_FEW),
        ShapesConfig(name="outlines", shapes=_OUTLINES, draw=_draw_outlined, per_class=_FEW),
    ]

    def _info(self):
        return _dataset_info(self, self.builder_config.draw.__doc__, self.builder_config.shapes)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        names = list(self.builder_config.shapes)
        count = self.builder_config.per_class[SPLITS.index(split)] * len(names)
        for index in range(count):
            image = render(self.builder_config.name, split, index)
            yield index, {"image": image, "label": names[index % len(names)]}


def render(config, split, index):
    """Renders one image of `Shapes`, which is a pure function of the arguments.

    Args:
        config: str, name of a config of `Shapes`.
        split: str, one of `SPLITS`.
        index: int, index of the image. Its label is `index` modulo the number of classes.

    Returns:
        uint8 array of shape (32, 32, 3).
    """
    number = [domain.name for domain in Shapes.BUILDER_CONFIGS].index(config)
    domain = Shapes.BUILDER_CONFIGS[number]
    rng = np.random.default_rng([0, number, SPLITS.index(split), index])

    scale = rng.uniform(0.7, 0.9)
    shift = complex(*rng.uniform(-1, 1, 2)) * (0.95 - scale)
    w = (_GRID - shift) * (np.exp(2j * np.pi * rng.uniform(-0.08, 0.08)) / scale)
    distances = list(domain.shapes.values())
    template = _template(distances[index % len(distances)])
    distance = _lookup(template, w / _TEMPLATE_EXTENT) * scale * _GRID_SIZE / 2

    canvas = domain.draw(rng, _GRID, distance)
    image = sum(canvas[row::2, column::2] for row in (0, 1) for column in (0, 1)) / 4
    image += rng.normal(0, 0.02, image.shape)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _dataset_info(builder, description, names):
    image = tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format="png")
    label = tfds.features.ClassLabel(names=list(names))
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict({"image": image, "label": label}),
        supervised_keys=("image", "label"),
    )


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits: the 8x8 scans that come with scikit-learn, as 32x32 RGB images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return _dataset_info(self, self.__doc__, [str(digit) for digit in range(10)])

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        # Imported here so that the rendered data sets do without scikit-learn and SciPy.
        with extra("train"):
            from scipy import ndimage
            from sklearn import datasets

        scans, labels = datasets.load_digits(return_X_y=True)
        rng = np.random.default_rng(0)
        for digit in range(10):
            members = rng.permutation(np.flatnonzero(labels == digit))
            # Training and validation take a fixed number of each digit, the test split the rest.
            for index in np.split(members, _DIGITS_CUTS)[SPLITS.index(split)]:
                scan = scans[index].reshape(8, 8) / 16
                scan = ndimage.zoom(scan, IMAGE_SIZE / 8, order=3, mode="nearest", grid_mode=True)
                gray = np.rint(255 * np.clip(scan, 0, 1)).astype(np.uint8)
                yield int(index), {"image": np.stack([gray] * 3, axis=-1), "label": digit}


def prepare(data_dir, names=EMBEDDED):
    """Writes those of the embedded data sets that are not yet in `data_dir`; needs no network.

    Args:
        data_dir: str or path, the TFDS data directory.
        names: names of data sets, some of `EMBEDDED`.

    Raises:
        EtfzooError: the directory cannot be written.
    """
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    for name in names:
        builder = tfds.builder(name, data_dir=data_dir)
        try:
            # TFDS announces a download and shows progress bars: noise, as nothing is downloaded.
            with contextlib.redirect_stdout(io.StringIO()):
                with contextlib.redirect_stderr(io.StringIO()):
                    builder.download_and_prepare(download_config=config)
        except Exception as error:  # TFDS wraps what TensorFlow says of a full disk
            if tfds.builder(name, data_dir=data_dir).is_prepared():
                continue  # by another process, which was faster
            raise EtfzooError(
                f"{name} cannot be drawn into {builder.data_dir}: "
                f"{getattr(error, 'strerror', None) or first_line(error)}; "
                "choose another data directory"
            ) from error
