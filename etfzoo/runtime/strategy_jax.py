"""Where a run computes under JAX: the devices of one or more processes, which split batches."""

import contextlib
import os
from collections import Counter

import jax
import numpy as np
import tensorflow as tf
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from etfzoo import internals
from etfzoo.data.pipeline import InputShare
from etfzoo.errors import EtfzooError, first_line
from etfzoo.runtime import cluster

# Seconds. Who is silent so long is lost; its sockets, if they are closed, tell it sooner.
_HEARTBEAT = 20
_JOINING = 600  # all have to start within
_DISMISSING = 1800  # the others wait at their end for the first one, who may still draw and write
_LEAVING = 5  # who leaves with an error waits so long for the others to do the same


class DataParallel:
    """Devices that hold the same weights and share each batch evenly.

    Has what etfzoo asks of a `tf.distribute` strategy. XLA sees one program over the whole batch
    and splits it, so that every sum, mean and statistic is one of the global batch.
    keras.distribution.DataParallel does the same, but puts variables on its devices as they are
    made: no step could be compiled for chips that are not there.

    Attributes:
        devices: tuple of JAX devices; those of a process are neighbours.
        replicated: the sharding of what all devices hold, such as weights.
        split: the sharding of a batch, along its first axis.
        num_workers: processes that have these devices.

    Args:
        devices: JAX devices of this process, or of all processes, equally many of each.
    """

    def __init__(self, devices):
        self.devices = tuple(sorted(devices, key=lambda d: d.process_index))
        mesh = Mesh(np.array(self.devices), ("batch",))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec("batch"))
        self.num_workers = len({d.process_index for d in self.devices})

    @property
    def num_replicas_in_sync(self) -> int:
        return len(self.devices)

    @property
    def worker(self) -> int:
        """Which of the processes this is; 0 writes files and shows progress."""
        return jax.process_index() if self.num_workers > 1 else 0

    @property
    def local_devices(self) -> tuple:
        """Those of this process."""
        count = len(self.devices) // self.num_workers
        return self.devices[self.worker * count :][:count]

    @property
    def share(self) -> InputShare:
        """What this process reads of each batch, whole: it is cut for the devices later."""
        return InputShare(self.worker, self.num_workers, self.num_workers)

    @property
    def accelerators(self) -> list[str]:
        """Kinds of the devices of this process that are no CPU."""
        return [d.device_kind for d in self.local_devices if d.platform != "cpu"]

    def scope(self):
        """Does nothing: variables move to the devices when a step first uses them."""
        return contextlib.nullcontext()

    def place(self, value, sharding):
        """A JAX array with a sharding of this strategy.

        Args:
            value: array or TensorFlow tensor; where it is to be split, the share of this process.
            sharding: `replicated` or `split`.
        """
        known = isinstance(value, jax.Array)
        if known and value.sharding == sharding:  # asked, as moving nothing takes time too
            return value
        if not known or not value.is_fully_addressable:
            value = np.asarray(value)  # one that several processes hold is replicated
        if self.num_workers == 1:
            return jax.device_put(value, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(value))

    def settle(self, variables) -> None:
        """Gives Keras variables the values of the first process, on all devices.

        With one process a step moves them as it needs them. Several may have computed other last
        bits of their first values, and would stay apart. What is on all devices already stays.
        """
        if self.num_workers == 1:
            return
        moved = [v for v in variables if v.value.sharding != self.replicated]
        if not moved:
            return
        rows = []  # one a device, of which all but the first are zero
        for value in (np.asarray(v.value) for v in moved):
            mine = np.zeros((len(self.local_devices), *value.shape), value.dtype)
            mine[0] = value if self.worker == 0 else 0
            rows.append(self.place(mine, self.split))
        add = jax.jit(
            lambda rows: [jnp.sum(r, 0, dtype=r.dtype) for r in rows], out_shardings=self.replicated
        )
        for variable, value in zip(moved, add(rows), strict=True):
            variable.assign(value)

    def extremes(self, numbers) -> tuple[np.ndarray, np.ndarray]:
        """The largest and the smallest of each of some numbers below 2^32, over all processes."""
        rows = np.tile(np.asarray(numbers, np.uint32), (len(self.local_devices), 1))
        rows = self.place(rows, self.split)
        largest, smallest = jax.jit(
            lambda rows: (rows.max(0), rows.min(0)), out_shardings=self.replicated
        )(rows)
        return np.asarray(largest), np.asarray(smallest)

    def leave(self) -> None:
        """To be called where an error ends this process: it ends without those that go on."""
        if self.num_workers > 1:
            internals.end_without_jax_workers(_LEAVING)


def get_strategy(
    name: str, tpu: str | None = None, num_virtual_devices: int | None = None
) -> DataParallel:
    """See `etfzoo.runtime.strategy.get_strategy`; `mirrored` and `tpu` are all devices of this
    process, `multiworker` those of all.

    Raises:
        EtfzooError: a machine that does not have it, workers that do not come, or a TPU elsewhere.
    """
    if tpu not in (None, "local"):
        raise EtfzooError("under JAX a run uses the TPU of its own machine: leave out `tpu`")
    # What TensorFlow does here is reading data; it would claim the memory of all GPUs for it.
    with contextlib.suppress(RuntimeError):  # too late: it has computed
        tf.config.set_visible_devices([], "GPU")
    if name == "multiworker":
        return _of_all_workers()
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


def _of_all_workers() -> DataParallel:
    workers = cluster.read()
    if workers is None and not cluster.local_tpu():
        raise cluster.unknown_workers()
    known: dict = {}  # on TPUs without TF_CONFIG JAX asks the metadata of the slice
    if workers is not None:
        if workers.index == 0:  # the others take ports as they need them
            workers.check_port()
        workers.wait_for_first(limit=_JOINING)
        known = {
            "coordinator_address": workers.addresses[0],
            "num_processes": len(workers.addresses),
            "process_id": workers.index,
            # Under Slurm it would take one GPU alone; here a process has all that it sees.
            "cluster_detection_method": "deactivate",
        }
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(
            **known,
            initialization_timeout=_JOINING,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_DISMISSING,
        )
    except (RuntimeError, ValueError) as error:
        raise EtfzooError(
            f"the workers cannot be joined: {first_line(error)}; start a new process"
        ) from error
    counts = Counter(device.process_index for device in _devices(jax.devices))
    if len(set(counts.values())) > 1:
        raise EtfzooError(
            "all workers must have equally many devices; in their order they have "
            + ", ".join(str(counts[index]) for index in sorted(counts))
        )
    strategy = DataParallel(jax.devices())
    # The first collective of CPUs gives up after 30 s: here all are there, later one may be late.
    strategy.extremes([0])
    return strategy


def _devices(which=jax.local_devices):
    try:
        return which()
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
