"""Data sets by name: TFDS, prepared folders of TFDS, folders and tables of images."""

import os

from etfzoo import files
from etfzoo.data.csv_file import open_csv
from etfzoo.data.folders import open_folder
from etfzoo.data.hugging_face import open_hugging_face
from etfzoo.data.source import Source
from etfzoo.data.tfds import open_tfds


def resolve(name: str, data_dir: str | None = None, prepare: bool = True) -> Source:
    """Finds a data set by name.

    Args:
        name: a row of `etfzoo.data.datasets.DATASETS`, any other TFDS name or folder of a prepared
            TFDS data set under `data_dir`, a path to one, `folder:PATH`: one subfolder of images a
            class, optionally below `train`, `val` and `test`, `csv:FILE`: a table with the
            columns `path`, `label` and optionally `split`, or `hf:NAME`: a data set of Hugging
            Face, see `open_hugging_face`.
        data_dir: TFDS data directory; None is TFDS's own default.
        prepare: whether a data set that is not there is downloaded and prepared, where TFDS can.

    Raises:
        EtfzooError: not found, not prepared, empty, or not an image classification data set.
    """
    if name.startswith("folder:"):
        return open_folder(name)
    if name.startswith("hf:"):
        return open_hugging_face(name)
    if name.startswith("csv:"):
        return open_csv(name)
    return open_tfds(name, data_dir and os.fspath(files.expand(data_dir)), prepare)
