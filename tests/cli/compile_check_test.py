"""recipes/compile_check.py, as a user calls it."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from testing import CHECKOUT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="JAX is not installed"
)


def run(*flags, timeout=120):
    process = subprocess.run(
        [sys.executable, CHECKOUT / "recipes" / "compile_check.py", *flags],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--topology=v5e", "as in v5e:2x2"),
        ("--topology=v9:2x2", "v5e or v6e"),
        ("--topology=v5e:0x2", "as in v5e:2x2"),
        ("--mixed_precision=float16", "did you mean bfloat16"),
        ("--batch_size=6", "must be a multiple of 4"),
    ],
)
def test_bad_flags(flag, message):
    code, _, err = run(flag)
    assert code == 2 and message in err and len(err.splitlines()) == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu"), reason="libtpu is installed")
def test_without_libtpu():
    code, _, err = run()
    assert code == 2 and "etfzoo[tpu-check]" in err


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_the_step_of_a_small_network_compiles_for_a_tpu():
    flags = ("--backbone=rn18", "--num_classes=10", "--image_size=32", "--batch_size=8")
    code, out, err = run("--topology=v5e:2x2", *flags, timeout=900)
    assert code == 0, err
    memory = dict(re.findall(r"  (.+): ([\d.]+) GiB", out))
    # 11.2 million weights and as many slots in float32, on every chip.
    assert 0.083 < float(memory["weights, slots and batch"]) < 0.090
    assert float(memory["together"]) >= float(memory["temporaries"])
    # The chips share the batch and add up 11.2 million gradients, in bfloat16.
    number, size = re.search(r"all-reduce operations: (\d+), of ([\d.]+) MB", out).groups()
    assert int(number) > 0 and 22.3 < float(size) < 22.6
    assert out.splitlines()[-1] == "fits into the 16 GiB of a v5e chip"
