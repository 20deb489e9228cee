"""Settings and fixtures of all tests."""

import gc
import os
from contextlib import nullcontext

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before anything imports TensorFlow


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1800))


def pytest_collection_finish():
    gc.freeze()  # a million objects of the imports, which each full collection would walk again


@pytest.fixture(scope="session")
def embedded_dir(tmp_path_factory):
    """TFDS data directory with digits; who resolves the shapes first draws them there."""
    from etfzoo.data import shapes

    directory = tmp_path_factory.mktemp("embedded")
    shapes.prepare(directory, ["digits"])
    return directory


@pytest.fixture(scope="module", autouse=True)
def network_of_module(request):
    """See `testing.small_rn18`: before all other fixtures of a module that is marked so."""
    import testing

    with testing.small_rn18() if request.node.get_closest_marker("small_rn18") else nullcontext():
        yield


@pytest.fixture
def small_network():
    """The same for one test."""
    import testing

    with testing.small_rn18():
        yield
