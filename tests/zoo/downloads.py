"""What the tests of downloads share: a version folder, and what is left of a download."""

import numpy as np
import pytest

from etfzoo.errors import EtfzooError
from etfzoo.zoo import cache, manifest

DATA = "variables/variables.data-00000-of-00001"


def make_version(folder, size=300_000, seed=0):
    """A version folder as far as downloading looks at it."""
    rng = np.random.default_rng(seed)
    for name, count in {
        "saved_model.pb": 5000,
        DATA: size,
        "variables/variables.index": 300,
        "assets.extra/etfzoo.json": 700,
        "assets/empty.txt": 0,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.bytes(count))
    manifest.write(folder)
    return folder


def assert_same_folder(folder, other):
    names = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    assert names == {p.relative_to(other) for p in other.rglob("*") if p.is_file()}
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def leftovers():
    """All files in the cache that are in no finished version."""
    return [p for p in cache.home().rglob("*") if ".download" in str(p)]


def one_line(call, *args):
    with pytest.raises(EtfzooError) as error:
        call(*args)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


def listing_of(folder):
    return manifest.read(folder) | {manifest.NAME: manifest.entry_of(folder / manifest.NAME)}
