"""`tiny_imagenet`: 100 classes of Tiny ImageNet as a TFDS data set, from its public archive.

The archive (http://cs231n.stanford.edu/tiny-imagenet-200.zip, 248 MB; Le and Yang, Tiny ImageNet
visual recognition challenge, CS231N 2015) is downloaded by hand. Of its 200 classes, sorted by
WordNet id, every second one is taken with all of its images: 500 to train and 50 to validate, JPEG
files of 64 x 64 pixels whose bytes stay as they are. (The archive's test images have no labels.)

After `prepare` the folder `<data_dir>/tiny_imagenet/1.0.0` is an ordinary TFDS data set; class
names are WordNet ids, and `words.txt` beside the records says what they mean.
"""

import contextlib
import io
import re
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import tensorflow_datasets as tfds
from PIL import Image

from etfzoo.data.tfds_source import WORDS
from etfzoo.errors import EtfzooError, first_line
from etfzoo.files import make_directory
from etfzoo.progress import Progress

SIDE = 64
# Records are shuffled by the hash of the file's name, so that they are the same in every
# preparation: their place is what the draws of augmentation hang on.
_SHARDS = 4
_TRAIN = re.compile(r"train/([^/]+)/images/[^/]+\.JPEG")


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """Every second class of Tiny ImageNet (Stanford CS231n): 100 classes, 64 x 64 pixels.

    Args:
        archive: an `Archive`, to prepare the data set; reading it needs none.
        show: called with the number of images that are done.
        **kwargs: see TFDS.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, archive=None, show=lambda count: None, **kwargs):
        self._archive, self._show, self._done = archive, show, 0
        super().__init__(**kwargs)

    def _info(self):
        # Before the archive is known the names are too; what is prepared has them in its files.
        names = {"names": self._archive.classes} if self._archive else {"num_classes": 100}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__.partition("\n")[0],
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(**names),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        lines = (f"{i}\t{n}\t{w}\n" for i, (n, w) in enumerate(self._archive.words.items()))
        Path(self.data_dir, WORDS).write_text("".join(lines), "utf-8")
        splits = {"train": self._archive.train, "validation": self._archive.validation}
        return {split: self._generate_examples(files) for split, files in splits.items()}

    def _generate_examples(self, files):
        for name, label in files.items():
            encoded = self._archive.read(name)
            _check_image(encoded, name)
            yield name.rpartition("/")[2], {"image": encoded, "label": label}
            self._done += 1
            self._show(self._done)


class Archive:
    """What an unpacked folder or the zip file of Tiny ImageNet holds of the chosen classes.

    Args:
        path: the zip file, its unpacked folder, or the folder that holds that one.

    Attributes:
        classes: WordNet ids, sorted.
        words: their meanings by id, e.g. `goldfish, Carassius auratus`.
        train, validation: class by name of the image file.

    Raises:
        EtfzooError: no archive of this layout, or an incomplete one.
    """

    def __init__(self, path):
        self.path = Path(path).expanduser()
        self._open()
        self.classes = sorted(self._lines("wnids.txt"))[::2]
        words = dict(line.split("\t", 1) for line in self._lines("words.txt") if "\t" in line)
        self._need("words.txt", "the words of", [c for c in self.classes if c not in words])
        self.words = {name: words[name] for name in self.classes}

        chosen = set(self.classes)
        found = ((name, _TRAIN.fullmatch(name)) for name in sorted(self._names))
        self.train = {name: m[1] for name, m in found if m and m[1] in chosen}
        annotations = "val/val_annotations.txt"
        pairs = (line.split("\t")[:2] for line in self._lines(annotations))
        labels = {f"val/images/{p[0]}": p[1] for p in pairs if len(p) == 2}
        self.validation = {name: label for name, label in labels.items() if label in chosen}
        self._need("val/images", "images of", self.validation.keys() - self._names)
        for split, place in ((self.train, "train"), (self.validation, annotations)):
            counts = Counter(split.values())
            most = max(counts.values(), default=0)
            self._need(place, "images of", [c for c in self.classes if counts[c] < max(most, 1)])

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            EtfzooError: it is damaged or cannot be read.
        """
        try:
            return self._read(self._root + name)
        except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
            raise EtfzooError(f"{name} in {self.path} cannot be read: {first_line(e)}") from e

    def _open(self):
        try:
            if self.path.is_dir():
                names = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*.*")]
                self._read = lambda name: (self.path / name).read_bytes()
            else:
                archive = zipfile.ZipFile(self.path)
                names, self._read = archive.namelist(), archive.read
        except zipfile.BadZipFile as e:
            raise EtfzooError(
                f"{self.path} is no zip file, or only a part of one: download it again"
            ) from e
        except OSError as e:
            raise EtfzooError(f"{self.path} cannot be read: {e.strerror or e}") from e
        lists = [n for n in names if n.rpartition("/")[2] == "wnids.txt"]
        if not lists:
            raise EtfzooError(
                f"{self.path} is not Tiny ImageNet: wnids.txt is missing; expected "
                "tiny-imagenet-200.zip or its unpacked folder"
            )
        self._root = min(lists, key=len).removesuffix("wnids.txt")
        self._names = {n[len(self._root) :] for n in names if n.startswith(self._root)}

    def _lines(self, name):
        text = self.read(name).decode("utf-8", errors="replace")
        return [line for line in map(str.strip, text.splitlines()) if line]

    def _need(self, place, what, missing):
        if missing:
            shown = ", ".join(sorted(missing)[:3])
            raise EtfzooError(
                f"{self.path} is incomplete: {place} lacks {what} {shown}"
                f"{' and others' if len(missing) > 3 else ''}; unpack or download it again"
            )


def prepare(archive, data_dir=None) -> Path | None:
    """Writes `<data_dir>/tiny_imagenet/1.0.0`, whole or not at all, unless it is there.

    Args:
        archive: path of the archive, see `Archive`.
        data_dir: TFDS data directory, made if needed; None is TFDS's own default.

    Returns:
        The folder; None where it was there already.

    Raises:
        EtfzooError: a damaged or incomplete archive, or a folder that cannot be written.
    """
    if TinyImagenet(data_dir=data_dir).info.splits:
        return None
    content = Archive(archive)
    if data_dir is not None:
        make_directory(data_dir)
    progress = Progress("preparing", len(content.train) + len(content.validation), unit="image")
    terminal = sys.stdout

    def show(count):
        with contextlib.redirect_stdout(terminal):
            progress.update(count)

    builder = TinyImagenet(content, show, data_dir=data_dir)
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=_SHARDS)
    try:
        # TFDS announces a download, shows bars of its own and makes a folder for what it downloads;
        # nothing is downloaded here.
        with (
            tempfile.TemporaryDirectory() as downloads,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            builder.download_and_prepare(download_dir=downloads, download_config=config)
    except OSError as e:
        raise EtfzooError(f"cannot write {builder.data_dir}: {e.strerror or e}") from e
    finally:
        with contextlib.suppress(OSError):  # TFDS leaves the parent of what it removes
            Path(builder.data_dir).parent.rmdir()
    progress.finish()
    return Path(builder.data_dir)


def _check_image(encoded, name):
    try:
        with Image.open(io.BytesIO(encoded), formats=["JPEG"]) as image:
            image.load()
            size = image.size
    except (OSError, SyntaxError, ValueError) as e:
        raise EtfzooError(f"{name} is no JPEG image that can be read: {first_line(e)}") from e
    if size != (SIDE, SIDE):
        raise EtfzooError(f"{name} has {size[0]} x {size[1]} pixels instead of {SIDE} x {SIDE}")
