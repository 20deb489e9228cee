"""What a run says of the machine it ran on."""

import json
import types

import keras
import pytest
import tensorflow as tf

from etfzoo.runtime import hardware
from etfzoo.workdir import Workdir


def test_devices_of_this_machine_and_of_several(monkeypatch):
    monkeypatch.setattr(hardware, "_processor", lambda: "A CPU")
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 12)
    assert hardware.describe() == "A CPU, 12 cores"
    details = {"first": {"device_name": "A GPU"}, "second": {}, "third": {"device_name": "no"}}
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: list(details))
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details.get)
    assert hardware.describe() == "1 x A GPU"  # one replica takes the first alone
    of_jax = types.SimpleNamespace(accelerators=["TPU v5e"] * 4)
    assert hardware.describe(of_jax) == "4 x TPU v5e"
    monkeypatch.setattr(hardware, "num_workers", lambda strategy: 2)
    assert hardware.describe(of_jax) == "2 machines with 4 x TPU v5e each"


def test_a_command_names_its_backend_where_it_is_another(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert hardware._command(["etfzoo pretrain"]) == "KERAS_BACKEND=jax etfzoo pretrain"


@pytest.mark.parametrize(
    "argv, command",
    [
        (["/somewhere/a.py", "--workdir=/w", "--seed=3"], "python a.py --seed=3"),
        (["a.py", "--data_dir", "/d", "--note=two words"], "python a.py '--note=two words'"),
        (["etfzoo pretrain", "-workdir", "/w", "--head=etf"], "etfzoo pretrain --head=etf"),
        ([str(hardware._ROOT / "recipes/pretrain.py")], "python recipes/pretrain.py"),
    ],
)
def test_the_command_that_began_it_is_kept(argv, command, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware.sys, "argv", argv)
    hardware.write(tmp_path, 1.26)
    monkeypatch.setattr(hardware.sys, "argv", ["another.py"])
    hardware.write(tmp_path, 2.34)
    document = json.loads(Workdir(tmp_path).machine.read_text())
    assert document == {"hardware": hardware.describe(), "seconds": 2.3, "command": command}
