"""A prepared data set of TFDS as array_record, which is read by index.

`tfds convert_format` does the same with Apache Beam, which it needs even where it is not used, and
does not count records.
"""

import json
import os
from pathlib import Path

import tensorflow as tf

from etfzoo import files
from etfzoo.data.array_record import FORMAT, open_file
from etfzoo.data.source import Source
from etfzoo.data.sources import resolve
from etfzoo.data.tfds_source import TfdsSource
from etfzoo.errors import EtfzooError, first_line
from etfzoo.locks import lock
from etfzoo.progress import Progress

_INFO = "dataset_info.json"


def convert(name: str, data_dir: str | None, output: str) -> tuple[Source, bool]:
    """Writes a prepared data set as array_record into another data directory.

    Records are copied as they are, shard by shard. What is there of an earlier try stays, if it
    has the right number of records; dataset_info.json, without which it is no data set, comes last.

    Args:
        name, data_dir: as for `etfzoo.data.sources.resolve`; nothing is downloaded.
        output: data directory, made if needed.

    Returns:
        The converted data set, and whether anything was to do.

    Raises:
        EtfzooError: not prepared as tfrecord, a damaged or incomplete data set, or a folder that
            cannot be written.
    """
    source = resolve(name, data_dir, prepare=False)
    if not isinstance(source, TfdsSource):
        raise EtfzooError(f"{name} is no data set of TFDS, whose records could be converted")
    info = source.builder.info
    if info.file_format.value != "tfrecord":
        raise EtfzooError(
            f"data set {name} is not converted: it is {info.file_format.value}, not tfrecord"
        )
    here = Path(source.builder.data_dir)
    folder = files.expand(output) / info.full_name
    if folder.exists() and folder.samefile(here):
        raise EtfzooError(f"{name} is in {output} itself: name another data directory")
    made = not (folder / _INFO).exists()
    if made:
        with lock(folder, "a conversion"):
            _write(source, here, folder)
    converted = resolve(str(folder), prepare=False)
    sizes = {split: info.splits[split].num_examples for split in info.splits}
    if converted.fingerprint() != source.fingerprint() | {"format": FORMAT}:
        raise EtfzooError(
            f"{folder} is another data set than {name} in {here}, which has {sizes} examples: "
            "delete it, or name another data directory"
        )
    return converted, made


def _write(source, here, folder):
    infos = list(source.builder.info.splits.values())
    copies = [copy for info in infos for copy in _copies(source, info, here, folder)]
    files.remove_temporaries(folder)
    progress = Progress("converting", sum(length for *_, length in copies), unit="record")
    done = 0
    for old, new, length in copies:
        if not _whole(new, length):
            _copy(old, new, length, lambda number, done=done: progress.update(done + number))
        done += length
        progress.update(done)
    shards = {os.path.basename(old) for old, *_ in copies}
    for path in here.iterdir():
        if path.is_file() and path.name not in {*shards, _INFO} and not path.name.startswith("."):
            with files.atomic(folder / path.name) as file:
                file.write(files.read_bytes(path))
    document = files.read_json(here / _INFO) | {"fileFormat": FORMAT}
    files.write_text(folder / _INFO, json.dumps(document, indent=2) + "\n")
    progress.finish()


def _copies(source, info, here, folder):
    """Old path, new path and number of records of each shard of a split."""
    source.check_files(info.name)
    template = info.filename_template.replace(data_dir=folder, filetype_suffix=FORMAT)
    new = [Path(path) for path in template.sharded_filepaths(len(info.shard_lengths))]
    for path in new:
        if path.parent != folder or ".." in path.parts:
            raise EtfzooError(f"{here / _INFO} names files outside of the folder of the data set")
    return list(zip(map(os.fspath, info.filepaths), new, info.shard_lengths, strict=True))


def _whole(path, length):
    try:
        return path.exists() and bool(open_file(os.fspath(path), length))
    except EtfzooError:
        return False


def _copy(old, new, length, show):
    from array_record.python.array_record_module import ArrayRecordWriter

    with files.atomic(new) as file:
        try:
            # As TFDS writes them: one record a group can be read without its neighbours.
            writer = ArrayRecordWriter(file.name, "group_size:1")
            count = 0
            for count, record in enumerate(tf.data.TFRecordDataset(old).as_numpy_iterator(), 1):
                writer.write(record)
                show(count)
            writer.close()
        except RuntimeError as error:
            raise EtfzooError(f"cannot write {new}: {first_line(error)}") from error
        except tf.errors.OpError as error:
            raise EtfzooError(f"{old} is damaged: {first_line(error)}") from error
        if count != length:
            raise EtfzooError(
                f"{old} has {count} records, and {_INFO} tells of {length}: prepare it again"
            )
        open_file(file.name, length)
