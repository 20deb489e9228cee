"""Processes that measure when told to, so that candidates of different interpreters take turns."""

import os
import sys
import tempfile
import time
from subprocess import PIPE, Popen

import numpy as np


def cpu_seconds(work, *args):
    start = time.process_time()
    work(*args)
    return time.process_time() - start


def serve(version, measure):
    """Says the version, then the measured number of each case that is named on stdin."""
    print(version, flush=True)
    for line in sys.stdin:
        print(measure(line.strip()), flush=True)


def load_tensorflow():
    """TensorFlow on one thread."""
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    return tf


class Worker:
    """A process that measures when told to.

    Args:
        script: file whose `--child=CHILD --folder=FOLDER` calls `serve`.
        child, folder: see there.
        python: interpreter.
        **environment: more variables.
    """

    def __init__(self, script, child, folder, python=sys.executable, **environment):
        self.errors = tempfile.TemporaryFile("w+")
        command = [python, script, f"--child={child}", f"--folder={folder}"]
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | environment
        self.process = Popen(
            command, env=environment, stdin=PIPE, stdout=PIPE, stderr=self.errors, text=True
        )
        self.version = self._answer()

    def ask(self, case):
        print(case, file=self.process.stdin, flush=True)
        return float(self._answer())

    def _answer(self):
        answer = self.process.stdout.readline().strip()
        if not answer:
            self.errors.seek(0)
            sys.exit(f"the measuring process ended:\n{self.errors.read()}")
        return answer


def medians(workers, case, rounds):
    """Milliseconds by candidate: the median over rounds in which they take turns."""
    times = [[w.ask(f"{name} {case}") for name, w in workers.items()] for _ in range(rounds)]
    return dict(zip(workers, 1e3 * np.median(times, axis=0), strict=True))
