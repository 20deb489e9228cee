"""Where a run computes: tf.distribute strategies by name."""

import glob
import os

import tensorflow as tf

from etfzoo.errors import EtfzooError, unknown

STRATEGIES = ("auto", "one_device", "tpu")


def get_strategy(name: str = "auto", tpu: str | None = None) -> tf.distribute.Strategy:
    """The strategy of that name.

    Args:
        name: `"one_device"` (the first GPU, else the CPU), `"tpu"`, or `"auto"` (a TPU where
            TensorFlow sees one, else one device).
        tpu: name or grpc address of the TPU; None or `"local"` is the one in this machine.

    Raises:
        EtfzooError: unknown name, or `"tpu"` where there is none.
    """
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES)
    if name == "tpu" or (name == "auto" and (tpu or _local_tpu())):
        return _tpu_strategy(tpu)
    return tf.distribute.get_strategy()


def _local_tpu() -> bool:
    # Asking the resolver where there is no TPU waits for a cloud metadata server; the driver's
    # device files tell at once.
    return bool(glob.glob("/dev/accel[0-9]*")) or (
        bool(glob.glob("/dev/vfio/[0-9]*")) and "TPU_ACCELERATOR_TYPE" in os.environ
    )


def _tpu_strategy(tpu):
    address = tpu or os.environ.get("TPU_NAME")
    if address in (None, "local") and not _local_tpu():
        raise EtfzooError(
            "no TPU found on this machine: run on a TPU VM with tensorflow-tpu installed "
            "(pip install 'etfzoo[tpu]'), name one with --tpu=NAME, or use --strategy=one_device"
        )
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=address or "local")
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (ValueError, OSError, RuntimeError, tf.errors.OpError) as error:
        message = str(error).strip().splitlines()[0]
        raise EtfzooError(
            f"TPU {address or 'local'} cannot be reached: {message}; check --tpu, or use "
            "--strategy=one_device"
        ) from error
