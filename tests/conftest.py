"""Settings and fixtures of all tests."""

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
    """See `testing.shallow_rn18`; for all tests of a module."""
    from testing import shallow_rn18

    with shallow_rn18():
        yield
