"""Tables of images: a CSV file that tells the path, the label and maybe the split of each."""

import csv
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

from etfzoo import files
from etfzoo.data.file_source import SPLITS, file_source, some
from etfzoo.data.source import Source
from etfzoo.errors import EtfzooError, shown

_SPELLED = {spelling: split for split, spellings in SPLITS.items() for spelling in spellings}


def open_csv(name: str) -> Source:
    """The source of `csv:FILE`: a header with `path`, `label` and maybe `split`, then the images.

    Paths start in the folder of the file, and stay below it. A split is `train`, `val` or `test`.
    Classes are in the order of their names, or of their numbers where all labels are numbers.
    Images are in the order of classes and paths, so that the order of the rows does not matter,
    and the same images in folders of classes are the same data set.

    Raises:
        EtfzooError: no such file, another header, a row that is incomplete, an image that is
            missing, outside of the folder or there twice, or see `file_source`.
    """
    table = files.expand(name.removeprefix("csv:"))
    root = table.parent
    lines: dict[str, int] = {}  # by path
    found: dict[str, list[tuple[str, str]]] = {"train": []}
    for line, path, label, split in _rows(table):
        path = _below(root, path, f"{table}, line {line}")
        if path in lines:
            raise EtfzooError(f"{table} lists {path} twice, in lines {lines[path]} and {line}")
        lines[path] = line
        found.setdefault(split, []).append((path, label))
    missing = [path for path in lines if not os.path.isfile(os.path.join(root, path))]
    if missing:
        raise EtfzooError(
            f"{table} lists {len(missing)} images that do not exist in {root}, or are no files: "
            f"{some(missing)}"
        )
    order = _in_order({label for items in found.values() for _, label in items})
    place = {label: number for number, label in enumerate(order)}
    return file_source(
        name,
        table,
        root,
        {split: sorted({label for _, label in found[split]}, key=place.get) for split in found},
        {
            split: sorted(items, key=lambda item: (place[item[1]], item[0].split(os.sep)))
            for split, items in found.items()
        },
        kind="labels",
        expected="a row for each image",
    )


def _rows(table: Path) -> Iterator[tuple[int, str, str, str]]:
    """Number of the line, path, label and split of each row."""
    # Names of files need not be UTF-8.
    text = files.read_bytes(table).decode("utf-8-sig", "surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        if [header.count(column) for column in ("path", "label")] != [1, 1]:
            raise EtfzooError(
                f"the first line of {table} must name the columns path, label and maybe split, "
                f"with commas between them; got {shown(','.join(header))}"
            )
        for row in reader:
            if not any(row):
                continue
            where = f"{table}, line {reader.line_num}"
            if len(row) != len(header):
                raise EtfzooError(
                    f"{where} has {len(row)} fields, and the first line {len(header)}: quote what "
                    "has a comma in it"
                )
            values = dict(zip(header, row, strict=True))
            label, split = values["label"].strip(), values.get("split", "train").strip()
            if not values["path"] or not label:
                raise EtfzooError(f"{where} has no {'label' if values['path'] else 'path'}")
            if split not in _SPELLED:
                raise EtfzooError(
                    f"{where} has the split {shown(split)}; known: {', '.join(_SPELLED)}"
                )
            yield reader.line_num, values["path"], label, _SPELLED[split]
    except csv.Error as error:
        raise EtfzooError(f"{table}, line {reader.line_num} is no CSV: {error}") from error


def _below(root, path, where):
    """A path as it starts in the folder, without detours."""
    below = os.path.normpath(path)
    if os.path.isabs(below):
        below = os.path.relpath(below, root)
    if below.split(os.sep, 1)[0] == os.pardir:
        raise EtfzooError(
            f"{where}: {path} is outside of the folder of the table; move the table to a folder "
            "that all of its images are in"
        )
    return below


def _in_order(labels):
    numbers = all(re.fullmatch("[0-9]{1,18}", label) for label in labels)
    return sorted(labels, key=lambda label: (int(label) if numbers else 0, label))
