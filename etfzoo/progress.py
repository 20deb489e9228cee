"""Progress of long work, on a terminal and in log files."""

import logging
import sys
import time

from etfzoo.errors import printable

_log = logging.getLogger("etfzoo")


def notify(message: str, *args) -> None:
    """Logs one line for a person; without any logging configuration it shows on stderr."""
    if not _log.hasHandlers():
        _log.addHandler(logging.StreamHandler(sys.stderr))
    if _log.level == logging.NOTSET:
        _log.setLevel(logging.INFO)
    _log.info("%s", printable(message % args))


class Progress:
    """Keras's progress bar on a terminal; in a log file a plain line every half minute.

    Args:
        title: what is going on.
        steps: number of steps.
        quiet: whether nothing is shown (another process shows it).
        unit: what a step is.
    """

    def __init__(self, title, steps, quiet=False, unit="step"):
        self._title = title
        self._steps = steps
        self._quiet = quiet
        self._start = self._last = time.monotonic()
        self._first = None
        self._bar = None
        if not quiet and sys.stdout.isatty():
            print(title, flush=True)
            import keras  # late: a download alone needs no Keras

            metrics = ["loss", "top1", "val_top1"]
            self._bar = keras.utils.Progbar(steps, stateful_metrics=metrics, unit_name=unit)

    def update(self, step, metrics=dict):
        """Shows that `step` steps are done; `metrics()` gives values by name."""
        if self._quiet:
            return
        # Reading the metrics waits for the device: only when they will be shown.
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if step == self._steps or now - self._last < (0.5 if self._bar else 30):
            return
        self._last = now
        if self._bar:
            self._bar.update(step, list(metrics().items()), finalize=False)
            return
        since, begin = self._first
        eta = (self._steps - step) * (now - begin) / max(step - since, 1)
        self._print(step, f"ETA {eta:.0f}s", metrics())

    def finish(self, metrics=None):
        """Shows the end, with the final values."""
        metrics = metrics or {}
        if self._quiet:
            return
        if self._bar:
            self._bar.update(self._steps, list(metrics.items()), finalize=True)
        else:
            self._print(self._steps, f"{time.monotonic() - self._start:.0f}s", metrics)

    def _print(self, step, seconds, metrics):
        values = "".join(f" - {name}: {value:.4f}" for name, value in metrics.items())
        print(f"{self._title} - {step}/{self._steps} - {seconds}{values}", flush=True)
