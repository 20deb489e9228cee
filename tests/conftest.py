"""Settings and fixtures of all tests."""

import dataclasses
import os

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before anything imports TensorFlow


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def embedded_dir(tmp_path_factory):
    """TFDS data directory of the embedded data sets, each prepared by the first who asks for it."""
    return tmp_path_factory.mktemp("embedded")


@pytest.fixture(scope="module")
def shallow_rn18():
    """rn18 with 5 of its 8 blocks, for tests of what does not hang on depth: graphs of half size.

    Not for tests that compare with another process, which knows the real one.
    """
    from etfzoo.models import table

    row = dataclasses.replace(table.BACKBONES["rn18"], blocks=(2, 1, 1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table.BACKBONES, "rn18", row)
        yield
