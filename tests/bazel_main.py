"""Main of the Bazel tests: pytest on the arguments, as a pytest file runs nothing by itself."""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[1:]))
