"""Where a run computes: tf.distribute strategies by name, and what workers must agree on."""

import functools
import json
import os
import zlib

import keras
import numpy as np
import tensorflow as tf

from etfzoo import internals
from etfzoo.errors import EtfzooError, first_line, unknown
from etfzoo.runtime import cluster
from etfzoo.runtime.strategies import STRATEGIES


@functools.cache
def get_strategy(
    name: str = "auto", tpu: str | None = None, num_virtual_devices: int | None = None
) -> tf.distribute.Strategy:
    """The strategy of that name; the same object when asked again.

    To be called before TensorFlow computes anything. Under KERAS_BACKEND=jax the result is an
    `etfzoo.runtime.strategy_jax.DataParallel`, which has what is used of a tf.distribute strategy
    here.

    Args:
        name: `"one_device"` (the first GPU, else the CPU), `"mirrored"` (all GPUs of this
            machine), `"multiworker"` (the machines of TF_CONFIG, or of a Slurm job step; under JAX
            also the hosts of a TPU slice),
            `"tpu"`, or `"auto"` (a TPU where TensorFlow sees one, else several GPUs, else one
            device; see `best_here`).
        tpu: name or grpc address of the TPU; None or `"local"` is the one in this machine.
        num_virtual_devices: for `"mirrored"`: split the CPU in so many devices, to try it out.

    Raises:
        EtfzooError: unknown name, a machine that does not have it, or a TF_CONFIG that cannot be
            used.
    """
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES)
    if num_virtual_devices is not None and name != "mirrored":
        raise EtfzooError("`num_virtual_devices` goes with `strategy=mirrored`")
    if _on_jax():
        from etfzoo.runtime import strategy_jax

        return strategy_jax.get_strategy(name, tpu, num_virtual_devices)
    if name == "auto":
        name = best_here(tpu)
    if name == "tpu":
        return _tpu_strategy(tpu)
    if name == "multiworker":
        return _multiworker_strategy()
    if name == "mirrored":
        return _mirrored_strategy(num_virtual_devices)
    return tf.distribute.get_strategy()


def best_here(tpu: str | None = None) -> str:
    """The name of the strategy that `auto` stands for."""
    if _on_jax():
        from etfzoo.runtime import strategy_jax

        return strategy_jax.best_here()
    if tpu or cluster.local_tpu():
        return "tpu"
    return "mirrored" if len(tf.config.list_physical_devices("GPU")) > 1 else "one_device"


def num_workers(strategy) -> int:
    """Number of processes that train together."""
    if _on_jax():
        return strategy.num_workers
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 1
    cluster = strategy.cluster_resolver.cluster_spec()
    return sum(len(cluster.job_tasks(job)) for job in cluster.jobs)


def is_chief(strategy) -> bool:
    """Whether this process is the one that writes files and shows progress."""
    if _on_jax():
        return strategy.worker == 0
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    resolver = strategy.cluster_resolver
    if "chief" in resolver.cluster_spec().jobs:
        return resolver.task_type == "chief"
    return resolver.task_id == 0


def check_batch_size(batch_size: int, strategy, parts: int = 1) -> None:
    """Raises EtfzooError when a global batch cannot be split evenly over the replicas.

    Args:
        batch_size, strategy: of the run.
        parts: those in which a replica takes its share.
    """
    replicas = strategy.num_replicas_in_sync
    if batch_size % replicas:
        raise EtfzooError(
            f"`batch_size={batch_size}` is the batch of all {replicas} replicas together and must "
            f"be a multiple of {replicas}"
        )
    if batch_size // replicas % parts:
        raise EtfzooError(
            f"`batch_size={batch_size}` gives {batch_size // replicas} images to each of "
            f"{replicas} replicas, which `accumulate_steps={parts}` does not divide"
        )


def check_agreement(strategy, values: dict) -> None:
    """Compares values over all workers.

    Args:
        strategy: the strategy of all workers.
        values: JSON values by name; the names are the same on all workers.

    Raises:
        EtfzooError: on every worker, naming the values in which they differ.
    """
    if num_workers(strategy) == 1:
        return
    hashes = [zlib.crc32(json.dumps(v, sort_keys=True).encode()) for v in values.values()]
    largest, smallest = strategy.extremes(hashes) if _on_jax() else _extremes(strategy, hashes)
    differ = [
        f"{name} (here {values[name]!r})"
        for name, high, low in zip(values, largest, smallest, strict=True)
        if high != low
    ]
    if differ:
        raise EtfzooError(
            f"the workers disagree on {', '.join(differ)}: start all with one command"
        )


def wait_for_all(strategy) -> None:
    """Returns when every worker has called it."""
    check_agreement(strategy, {"barrier": 0})


def chief_first(strategy, work):
    """`work()` at the chief, then at the other workers: what makes files is done once."""
    result = work() if is_chief(strategy) else None
    wait_for_all(strategy)
    return result if is_chief(strategy) else work()


def _extremes(strategy, numbers):
    """The largest and the smallest of each of some numbers, over all replicas."""
    largest, smallest = (
        strategy.run(_largest_over_replicas, (tf.constant(sign * np.array(numbers), tf.int64),))
        for sign in (1, -1)
    )
    largest, smallest = (strategy.experimental_local_results(v)[0] for v in (largest, smallest))
    return largest.numpy(), -smallest.numpy()


@tf.function
def _largest_over_replicas(values):
    # Collectives sum; a row a replica makes the largest one of them.
    context = tf.distribute.get_replica_context()
    row = tf.one_hot(context.replica_id_in_sync_group, context.num_replicas_in_sync, dtype=tf.int64)
    rows = context.all_reduce(tf.distribute.ReduceOp.SUM, row[:, None] * values)
    return tf.reduce_max(rows, axis=0)


def _on_jax() -> bool:
    return keras.backend.backend() == "jax"


def _mirrored_strategy(num_virtual_devices):
    if num_virtual_devices is None:
        gpus = tf.config.list_logical_devices("GPU")
        if not gpus:
            raise EtfzooError(
                "no GPU found for `strategy=mirrored`; try it out on CPU devices with "
                "`num_virtual_devices=2`, or use `strategy=one_device`"
            )
        return tf.distribute.MirroredStrategy([gpu.name for gpu in gpus])
    if num_virtual_devices < 1:
        raise EtfzooError(f"`num_virtual_devices` must be at least 1; got {num_virtual_devices}")
    cpu = tf.config.list_physical_devices("CPU")[0]
    virtual = [tf.config.LogicalDeviceConfiguration()] * num_virtual_devices
    try:
        tf.config.set_logical_device_configuration(cpu, virtual)
    except RuntimeError as error:
        raise EtfzooError(
            "virtual devices must be made before TensorFlow computes anything; start a new process"
        ) from error
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(num_virtual_devices)])


def _multiworker_strategy():
    workers = cluster.read()
    if workers is None:
        raise cluster.unknown_workers()
    workers.check_port()
    workers.wait_for_first()
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except RuntimeError as error:
        raise EtfzooError(
            "the workers must be joined before TensorFlow computes anything; start a new process "
            f"({first_line(error)})"
        ) from error
    except (ValueError, tf.errors.OpError) as error:
        raise EtfzooError(f"the workers cannot be joined: {first_line(error)}") from error
    # Joining has taken SIGTERM out of Python's hands: nobody would hear it until training begins.
    internals.take_back_sigterm()
    return strategy


def _tpu_strategy(tpu):
    address = tpu or os.environ.get("TPU_NAME")
    if address in (None, "local") and not cluster.local_tpu():
        raise EtfzooError(
            "no TPU found on this machine: run on a TPU VM with tensorflow-tpu installed "
            "(pip install 'etfzoo[tpu]'), name one with `tpu=NAME`, or use `strategy=one_device`"
        )
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=address or "local")
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (ValueError, OSError, RuntimeError, tf.errors.OpError) as error:
        raise EtfzooError(
            f"TPU {address or 'local'} cannot be reached: {first_line(error)}; check `tpu`, or "
            "use `strategy=one_device`"
        ) from error
