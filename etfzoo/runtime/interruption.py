"""How a training process ends before its time: by a signal, or because another worker is gone."""

import contextlib
import logging
import os
import re
import signal
import sys

import keras
import tensorflow as tf

from etfzoo.runtime.strategy import num_workers

log = logging.getLogger("etfzoo")

EXIT_STOPPED = 75  # EX_TEMPFAIL: saved and stopped by a signal; start again to go on
EXIT_WORKER_LOST = 76  # another worker is gone; start all again to go on

# What TensorFlow raises in a collective when another worker is gone.
_WORKER_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)
# What JAX's errors begin with then: it raises several kinds, some of them ValueErrors.
_WORKER_LOST_JAX = re.compile(
    "(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNKNOWN): "
)


class Stopped(SystemExit):
    """SIGTERM or Ctrl-C: the run was saved at its exact step and can be started again."""

    def __init__(self):
        super().__init__(EXIT_STOPPED)


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a request that the loop looks at after each step."""

    def __init__(self):
        self.requested = False
        self._previous = {}

    def __enter__(self):
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def exit_if_worker_lost(strategy):
    """Ends the process with EXIT_WORKER_LOST when a collective fails in this block.

    Its collectives cannot go on, and an orderly exit would wait for the worker that is gone. What
    else is raised in the block goes on its way, and if it ends this worker alone, then at once.

    JAX has a watch of its own, which aborts the process. It may be faster where the first worker is
    gone, and is where another one is and no collective fails by it, see `strategy_jax`.
    """
    try:
        yield
    except BaseException as error:
        if num_workers(strategy) == 1:
            raise
        if not _is_worker_lost(error):
            if _on_jax():
                strategy.leave()
            raise
        log.error(
            "another worker is gone (%s: %s): see what it said, then start all again to go on from "
            "the last checkpoint",
            type(error).__name__,
            _reason(error),
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_WORKER_LOST)


def _is_worker_lost(error) -> bool:
    if not _on_jax():
        return isinstance(error, _WORKER_LOST)
    return isinstance(error, RuntimeError | ValueError) and bool(_WORKER_LOST_JAX.match(str(error)))


def _on_jax() -> bool:
    return keras.backend.backend() == "jax"


def _reason(error) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "aborted by" in line]
    return (told or lines or ["no reason given"])[0].split("aborted by: ")[-1][:200]
