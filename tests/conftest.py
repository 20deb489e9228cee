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
    """TFDS data directory with digits; who resolves the shapes first draws them there."""
    from etfzoo.data import shapes

    directory = tmp_path_factory.mktemp("embedded")
    shapes.prepare(directory, ["digits"])
    return directory


@pytest.fixture(scope="module")
def small_rn18():
    """See `testing.small_rn18`; for all tests of a module."""
    import testing

    with testing.small_rn18():
        yield


@pytest.fixture
def small_network():
    """The same for one test."""
    import testing

    with testing.small_rn18():
        yield
