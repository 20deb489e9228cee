"""recipes/compile_check.py, as a user calls it."""

import importlib.util
import re

import pytest

from testing import finish, run_recipe, start_recipe

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="JAX is not installed"
)


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
    assert message in run_recipe("compile_check", flag, code=2)


@pytest.mark.skipif(importlib.util.find_spec("libtpu"), reason="libtpu is installed")
def test_without_libtpu():
    assert "etfzoo[tpu-check]" in run_recipe("compile_check", code=2)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_the_step_of_a_small_network_compiles_for_a_tpu():
    flags = ("--backbone=rn18", "--num_classes=10", "--image_size=32", "--batch_size=8")
    # A process of its own: libtpu and JAX read the environment as they are imported.
    out = finish("compile_check", start_recipe("compile_check", "--topology=v5e:2x2", *flags))
    memory = dict(re.findall(r"  (.+): ([\d.]+) GiB", out))
    # 11.2 million weights and as many slots in float32, on every chip.
    assert 0.083 < float(memory["weights, slots and batch"]) < 0.090
    assert float(memory["together"]) >= float(memory["temporaries"])
    # The chips share the batch and add up 11.2 million gradients, in bfloat16.
    number, size = re.search(r"all-reduce operations: (\d+), of ([\d.]+) MB", out).groups()
    assert int(number) > 0 and 22.3 < float(size) < 22.6
    assert out.splitlines()[-1] == "fits into the 16 GiB of a v5e chip"
