"""Settings and fixtures of all tests."""

import os

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before anything imports TensorFlow


@pytest.fixture(scope="session")
def embedded_dir(tmp_path_factory):
    """TFDS data directory with every embedded data set; tests must not write to it."""
    from etfzoo.data import shapes

    directory = tmp_path_factory.mktemp("embedded")
    shapes.prepare(directory)
    return directory
