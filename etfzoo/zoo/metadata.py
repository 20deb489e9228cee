"""What a published version says about itself, read without Keras."""

import re
from pathlib import Path

from etfzoo import files
from etfzoo.errors import EtfzooError, first_line
from etfzoo.models.spec import ClassifierSpec
from etfzoo.models.table import MAX_VERSION, VERSION
from etfzoo.version import __version__

FORMAT = 1
METADATA = "assets.extra/etfzoo.json"


def version_folders(directory) -> dict[int, Path]:
    """The folders in a model's folder that are named by an integer, by version."""
    directory = Path(directory)
    if not directory.is_dir():
        return {}
    named = {p.name: p for p in directory.iterdir() if re.fullmatch(VERSION, p.name)}
    return {int(name): p for name, p in named.items() if int(name) <= MAX_VERSION and p.is_dir()}


def read_metadata(folder) -> dict:
    """The metadata of a version folder, with `spec` as a ClassifierSpec.

    Args:
        folder: the version folder.

    Raises:
        EtfzooError: the file is missing, broken or of a newer format; names the file.
    """
    path = Path(folder) / METADATA
    if not path.exists():
        raise EtfzooError(f"{path} is missing: not published by etfzoo, or an incomplete copy")
    content = files.read_bytes(path, files.MAX_DOCUMENT)
    try:
        metadata = files.parse_json(content)
    except ValueError as e:
        raise EtfzooError(f"{path} cannot be read: {first_line(e)}") from e
    number = metadata.get("format") if isinstance(metadata, dict) else None
    if type(number) is not int or number < 1:
        raise EtfzooError(f"{path} is not etfzoo metadata: it has no format number")
    if metadata["format"] > FORMAT:
        raise EtfzooError(
            f"{path} has format {metadata['format']}, and this etfzoo {__version__} reads up to "
            f"{FORMAT}: upgrade etfzoo"
        )
    for name in ("provenance", "metrics"):
        if not isinstance(metadata.get(name, {}), dict):
            raise EtfzooError(f"{path} is broken: {name} is no JSON object")
    try:
        return metadata | {"spec": ClassifierSpec.from_dict(metadata["spec"])}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise EtfzooError(f"{path} has no usable spec: {first_line(e)}") from e
