"""Packaging of etfzoo."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

# Read as text: importing the package would need its dependencies.
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "etfzoo" / "version.py").read_text("utf-8"), re.MULTILINE
).group(1)

# tensorflow-cpu has wheels for x86-64 Linux and Windows only; elsewhere `tensorflow` is the one
# for CPUs.
HAS_TF_CPU = "sys_platform != 'darwin' and platform_machine in 'x86_64 AMD64'"
NO_TF_CPU = "sys_platform == 'darwin' or platform_machine not in 'x86_64 AMD64'"

setup(
    name="etfzoo",
    version=VERSION,
    description="Image backbones pretrained with a fixed equiangular tight frame (ETF) head",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["etfzoo", "etfzoo.*"]),
    package_data={"etfzoo": ["py.typed"], "etfzoo.zoo": ["index.json"]},
    entry_points={"console_scripts": ["etfzoo=etfzoo.cli.__main__:main"]},
    # Not `build`, which is the Bazel file BUILD where file names ignore case (macOS, Windows).
    options={"build": {"build_base": ".build"}},
    # No TensorFlow here: its CPU, GPU and TPU builds install the same files, so that exactly one
    # of the extras `cpu`, `gpu` and `tpu` has to bring it.
    install_requires=[
        "absl-py",
        "importlib_resources",  # tensorflow-datasets imports it without declaring it
        "keras>=3.15,<3.16",
        "keras-cv==0.9.0",
        "matplotlib",
        "numpy",
        "pillow",
        "requests",
        "scikit-learn",
        "scipy",
        "tensorboard",
        "tensorflow-datasets>=4.9.10",
        "threadpoolctl",
    ],
    extras_require={
        "cpu": [
            f"tensorflow-cpu>=2.21,<2.22; {HAS_TF_CPU}",
            f"tensorflow>=2.21,<2.22; {NO_TF_CPU}",
        ],
        "gpu": ["tensorflow[and-cuda]>=2.21,<2.22"],
        # For KERAS_BACKEND=jax, beside `cpu`: TensorFlow then only reads the data. On GPUs and TPUs
        # with `pip install 'jax[cuda12]'` or `'jax[tpu]'`.
        "jax": ["jax>=0.10"],
        "tpu-check": ["jax[tpu]>=0.10,<0.11"],  # for recipes/compile_check.py; needs no TPU
        "hf": ["huggingface_hub"],  # for hf:// addresses
        "tpu": ["tensorflow-tpu>=2.19"],  # its releases trail those of tensorflow
        # For recipes/serve_client.py. It asks for `tensorflow`, which must not be installed beside
        # tensorflow-cpu: there run `pip install --no-deps tensorflow-serving-api grpcio` instead.
        "serving": ["grpcio", "tensorflow-serving-api>=2.21,<2.22"],
        "onnx": ["tf2onnx>=1.17"],
        "test": [
            "onnxruntime",
            "tf2onnx>=1.17",
            "grpcio",  # with tensorflow-serving-api, which the Makefile installs by itself
            "import-linter>=2.1",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "ruff>=0.17,<0.18",  # a newer ruff may format differently
            "setuptools>=64",  # the packaging test builds a wheel with these two
            "wheel",
        ],
    },
)
