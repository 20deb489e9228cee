"""Where a run computes under JAX: the devices of this process, over which batches are split."""

import contextlib
import os

import jax
import numpy as np
import tensorflow as tf
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from etfzoo.errors import EtfzooError, first_line


class DataParallel:
    """Devices that hold the same weights and share each batch evenly.

    Has what etfzoo asks of a `tf.distribute` strategy. XLA sees one program over the whole batch
    and splits it, so that every sum, mean and statistic is one of the global batch.
    keras.distribution.DataParallel does the same, but puts variables on its devices as they are
    made: no step could be compiled for chips that are not there.

    Attributes:
        devices: tuple of JAX devices.
        replicated: the sharding of what all devices hold, such as weights.
        split: the sharding of a batch, along its first axis.

    Args:
        devices: JAX devices of this process.
    """

    def __init__(self, devices):
        self.devices = tuple(devices)
        mesh = Mesh(np.array(self.devices), ("batch",))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec("batch"))

    @property
    def num_replicas_in_sync(self) -> int:
        return len(self.devices)

    @property
    def accelerators(self) -> list[str]:
        """Kinds of the devices that are no CPU."""
        return [d.device_kind for d in self.devices if d.platform != "cpu"]

    def scope(self):
        """Does nothing: variables move to the devices when a step first uses them."""
        return contextlib.nullcontext()


def get_strategy(
    name: str, tpu: str | None = None, num_virtual_devices: int | None = None
) -> DataParallel:
    """See `etfzoo.runtime.strategy.get_strategy`; `mirrored` and `tpu` are all devices of this
    process.

    Raises:
        EtfzooError: a machine that does not have it, `"multiworker"`, or a TPU elsewhere.
    """
    if name == "multiworker":
        raise EtfzooError(
            "under JAX a run uses the devices of one machine; start `strategy=multiworker` with "
            "KERAS_BACKEND=tensorflow"
        )
    if tpu not in (None, "local"):
        raise EtfzooError("under JAX a run uses the TPU of its own machine: leave out `tpu`")
    # What TensorFlow does here is reading data; it would claim the memory of all GPUs for it.
    with contextlib.suppress(RuntimeError):  # too late: it has computed
        tf.config.set_visible_devices([], "GPU")
    if num_virtual_devices is not None:
        return DataParallel(_virtual_devices(num_virtual_devices))
    devices = _devices()
    if name == "auto":
        name = best_here()
    if name == "one_device":
        return DataParallel(devices[:1])
    if name == "tpu" and devices[0].platform != "tpu":
        raise EtfzooError(
            "JAX sees no TPU on this machine: run on a TPU VM with pip install 'jax[tpu]', or use "
            "`strategy=one_device`"
        )
    if devices[0].platform == "cpu":
        raise EtfzooError(
            "JAX sees no GPU for `strategy=mirrored`; try it out on CPU devices with "
            "`num_virtual_devices=2`, or use `strategy=one_device`"
        )
    return DataParallel(devices)


def best_here() -> str:
    """The name of the strategy that `auto` stands for."""
    devices = _devices()
    if devices[0].platform == "tpu":
        return "tpu"
    return "mirrored" if devices[0].platform != "cpu" and len(devices) > 1 else "one_device"


def _devices():
    try:
        return jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names what is not there
        wanted = os.environ.get("JAX_PLATFORMS", "")
        raise EtfzooError(
            f"JAX finds no device of JAX_PLATFORMS={wanted}: {first_line(error)}"
        ) from error


def _virtual_devices(number):
    if number < 1:
        raise EtfzooError(f"`num_virtual_devices` must be at least 1; got {number}")
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError as error:
        raise EtfzooError(
            "virtual devices must be made before JAX computes anything; start a new process"
        ) from error
    return jax.devices("cpu")[:number]
