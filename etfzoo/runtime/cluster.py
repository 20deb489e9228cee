"""The workers that train together: TF_CONFIG or a Slurm job step names them, on both backends."""

import dataclasses
import errno
import glob
import json
import logging
import os
import socket
import time

from etfzoo import internals
from etfzoo.errors import EtfzooError, first_line

log = logging.getLogger("etfzoo")

_SLURM_PORT = 8888  # of the first task of a machine
_HELP = (
    "set TF_CONFIG on each worker, as in "
    '\'{"cluster": {"worker": ["host0:12345", "host1:12345"]}, '
    '"task": {"type": "worker", "index": 0}}\', or start the workers with srun'
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run.

    Attributes:
        addresses: `host:port` of each; the first one writes files and shows progress.
        index: which of them this process is.
    """

    addresses: list[str]
    index: int

    def check_port(self) -> None:
        """Raises EtfzooError when the port of this worker is taken."""
        _check_port(self.addresses[self.index])

    def wait_for_first(self, every: float = 20, limit: float = float("inf")) -> None:
        """Returns when the first worker listens, or here is the first one.

        TensorFlow and JAX would wait as well, but holding Python's lock: nothing could be said, and
        Ctrl-C would not be heard. That is how the first one then waits for the others.

        Args:
            every: seconds between two warnings.
            limit: seconds to wait.

        Raises:
            EtfzooError: the first worker has not come by the limit.
        """
        if self.index == 0:
            log.info("worker 0 waits until all have started: %s", ", ".join(self.addresses))
            return
        address = self.addresses[0]
        host, _, port = address.rpartition(":")
        start = told = time.monotonic()
        while True:
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
            if (waited := time.monotonic() - start) > limit:
                raise EtfzooError(
                    f"worker {self.index} has waited {waited:.0f} s for {address} in vain: start "
                    "the first worker there, or correct its address"
                )
            if time.monotonic() - told > every:
                told = time.monotonic()
                log.warning("worker %d has waited %.0f s for %s", self.index, waited, address)


def read() -> Cluster | None:
    """The workers of TF_CONFIG, else of a Slurm job step; None where nothing names them.

    TF_CONFIG is set from the step, for TensorFlow.

    Raises:
        EtfzooError: one of them cannot be used.
    """
    if not os.environ.get("TF_CONFIG") and "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ["TF_CONFIG"] = _slurm_tf_config()
    text = os.environ.get("TF_CONFIG")
    return _from_tf_config(text) if text else None


def unknown_workers() -> EtfzooError:
    """The error where nothing names the workers."""
    return EtfzooError(f"`strategy=multiworker` does not know the workers: {_HELP}")


def local_tpu() -> bool:
    """Whether this machine has a TPU.

    Asking TensorFlow's resolver where there is none waits for a cloud metadata server; the driver's
    device files tell at once.
    """
    return bool(glob.glob("/dev/accel[0-9]*")) or (
        bool(glob.glob("/dev/vfio/[0-9]*")) and "TPU_ACCELERATOR_TYPE" in os.environ
    )


def _slurm_tf_config() -> str:
    """The TF_CONFIG of a task of a Slurm job step."""
    try:
        tasks = internals.slurm_tasks(
            os.environ["SLURM_STEP_NODELIST"], os.environ["SLURM_STEP_TASKS_PER_NODE"]
        )
        workers = [f"{host}:{_SLURM_PORT + i}" for host, count in tasks for i in range(count)]
        index = int(os.environ["SLURM_PROCID"])
    except (KeyError, ValueError) as error:
        raise EtfzooError(
            f"the Slurm step cannot be read ({type(error).__name__}: {first_line(error)}): start "
            "the workers with srun, or set TF_CONFIG"
        ) from error
    return json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})


def _from_tf_config(text) -> Cluster:
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        kind, index = task["type"], int(task["index"])
        jobs = {job: list(addresses) for job, addresses in cluster.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EtfzooError(
            f"TF_CONFIG cannot be read ({type(error).__name__}: {error}); {_HELP}"
        ) from error
    strange = sorted(jobs.keys() - {"worker", "chief"})
    if strange or not jobs:
        raise EtfzooError(
            f"TF_CONFIG must name workers (and a chief, if you like), not {strange or 'nothing'}; "
            f"{_HELP}"
        )
    if kind not in jobs or not 0 <= index < len(jobs[kind]):
        raise EtfzooError(
            f"TF_CONFIG says that this is {kind} {index}, and its cluster has no such task; {_HELP}"
        )
    chiefs = jobs.get("chief", [])
    addresses = [*chiefs, *jobs.get("worker", [])]
    for address in addresses:
        if not isinstance(address, str) or not address.rpartition(":")[2].isdigit():
            raise EtfzooError(f"TF_CONFIG has {address!r} where host:port belongs")
    if len(set(addresses)) != len(addresses):
        raise EtfzooError("TF_CONFIG has the same address twice; give each worker its own port")
    return Cluster(addresses, index if kind == "chief" else len(chiefs) + index)


def _check_port(address) -> None:
    port = int(address.rpartition(":")[2])
    for family, everywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((everywhere, port))
        except PermissionError as error:
            raise EtfzooError(f"port {port} of this worker may not be used: {error}") from error
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # no IPv6 here
                continue
            raise EtfzooError(
                f"port {port} of this worker is in use: end the process that has it, or name "
                "another port in every worker's TF_CONFIG"
            ) from error
