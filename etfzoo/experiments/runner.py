"""Runs the cells of a sweep, each in a process of its own, several at a time."""

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from etfzoo import files, internals, locks
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError
from etfzoo.experiments import costs, sweep
from etfzoo.runtime.interruption import EXIT_STOPPED, Stopped, StopRequest
from etfzoo.version import __version__
from etfzoo.workdir import Workdir

_ROOT = Path(__file__).resolve().parents[2]  # where processes of cells find this package
_ORPHANS = 120  # seconds that the cells of a killed sweep get to save and end


@dataclasses.dataclass
class _Running:
    cell: sweep.Cell
    slot: int
    process: subprocess.Popen
    log: Path
    offset: int  # where in the log this process began
    start: float
    images: float


def _write_settings(settings, command):
    """Writes `sweep.json`: all arguments, the command and the version of etfzoo."""
    root = files.make_directory(settings.root)
    files.remove_temporaries(root)
    document = dataclasses.asdict(settings)
    del document["root"]
    document |= {"command": command, "version": __version__}
    files.write_text(root / "sweep.json", json.dumps(document, indent=2) + "\n")


def run(settings: sweep.Sweep, command: str, jobs: int = 1, gpus: int = 0) -> list[str]:
    """Runs all cells that are not finished, after writing `sweep.json`.

    A cell that fails is told in one line, those that need it are left out, the others go on.

    Args:
        settings: the sweep.
        command: that started it, for the report.
        jobs: processes at a time; they share the CPU cores.
        gpus: number of GPUs that they are spread over.

    Returns:
        a line for each cell that is not finished at the end.

    Raises:
        EtfzooError: bad settings, missing data, or another sweep in the same directory.
        Stopped: SIGTERM or SIGINT arrived; running cells were told to save, and have ended.
    """
    with locks.lock(settings.root, "a sweep", _ORPHANS) as held:
        cells = sweep.cells(settings)
        states = {cell: sweep.state(cell) for cell in cells}
        open_cells = [cell for cell in cells if states[cell] != sweep.FINISHED]
        # Before the first cell, and not by several of them at a time; a signal ends it at once.
        names = [cell.config.dataset for cell in open_cells]
        names += [name for cell in open_cells for name in cell.job.ood_datasets]
        for name in dict.fromkeys(names):
            resolve(name, settings.data_dir)
        for cell in open_cells:  # a long tail may leave nothing of a class
            costs.remaining_images(cell)
        _write_settings(settings, command)
        with StopRequest() as stop:
            return _Runner(settings, cells, open_cells, jobs, gpus, held, stop).run()


class _Runner:
    def __init__(self, settings, cells, open_cells, jobs, gpus, held, stop):
        self.root, self.cells, self.held, self.stop = Path(settings.root), cells, held, stop
        self.waiting, self.jobs, self.gpus = list(open_cells), jobs, gpus
        self.running, self.failed = [], {}
        self.walls = {}
        self.start = time.monotonic()

    def run(self):
        finished = len(self.cells) - len(self.waiting)
        print(
            f"{len(self.cells)} cells, {finished} finished; output of each: {self.root}/logs",
            flush=True,
        )
        files.make_directory(self.root / "logs")
        while (self.waiting or self.running) and not self.stop.requested:
            self._start_ready()
            self._collect()
            time.sleep(0.1)
        if self.stop.requested:
            self._end()
        return [f"{cell.name}: {reason}" for cell, reason in self.failed.items()]

    def _start_ready(self):
        free = sorted(set(range(self.jobs)) - {r.slot for r in self.running})
        busy = {r.cell for r in self.running} | set(self.waiting)
        for cell in list(self.waiting):
            lost = [need.name for need in cell.needs if need in self.failed]
            if lost:
                self.waiting.remove(cell)
                self.failed[cell] = f"left out: it needs {lost[0]}"
                busy.discard(cell)
            elif free and not any(need in busy for need in cell.needs):
                self.waiting.remove(cell)
                busy.add(cell)
                begun = Workdir(cell.workdir).begun
                self.running.append(self._launch(cell, free.pop(0)))
                self._say(f"{cell.name}: {'goes on' if begun else 'starts'}")

    def _launch(self, cell, slot):
        log = self.root / "logs" / (cell.name.replace("/", "_") + ".log")
        job = log.with_suffix(".json")
        cell.ready_job().save(job)
        command = [sys.executable, "-m", "etfzoo.training", f"--config={job}"]
        images = costs.remaining_images(cell)
        with self._opened(log) as output:
            offset = output.tell()
            output.write((shlex.join(command) + "\n").encode())
            output.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ
                | _environment(slot, self.jobs, self.gpus)
                | {"PYTHONPATH": python_path()},
                pass_fds=() if self.held is None else (self.held,),
                start_new_session=True,  # Ctrl-C arrives here alone, and is handed on once
                # It saves and ends, if this process is killed.
                preexec_fn=internals.end_with_parent if sys.platform == "linux" else None,
            )
        return _Running(cell, slot, process, log, offset, time.monotonic(), images)

    def _opened(self, log):
        try:
            return files.open_regular(log, "ab")
        except OSError as error:
            raise EtfzooError(f"cannot write {log}: {error.strerror or error}") from error

    def _collect(self):
        for run in list(self.running):
            code = run.process.poll()
            if code is None:
                continue
            self.running.remove(run)
            seconds = time.monotonic() - run.start
            result = Workdir(run.cell.workdir).usable_result() if code == 0 else None
            if result is not None:
                before = self.walls.get(costs.kind(run.cell), (0.0, 0.0))
                self.walls[costs.kind(run.cell)] = (before[0] + run.images, before[1] + seconds)
                self._say(
                    f"{run.cell.name}: top-1 {100 * result['top1']:.2f} % after {clock(seconds)}"
                )
            elif not self.stop.requested:
                self.failed[run.cell] = _reason(run, code)
                self._say(f"{run.cell.name}: FAILED: {self.failed[run.cell]}")

    def _end(self):
        print("stopping: the running cells save and end", flush=True)
        for run in self.running:
            with contextlib.suppress(ProcessLookupError):
                run.process.send_signal(signal.SIGTERM)
        for run in self.running:
            run.process.wait()
        print("stopped by a signal; run the same command to go on", flush=True)
        raise Stopped

    def _say(self, text):
        ended = len(self.cells) - len(self.waiting) - len(self.running)
        elapsed = time.monotonic() - self.start
        print(
            f"[{ended}/{len(self.cells)} {clock(elapsed)} elapsed, {self._to_go()}] {text}",
            flush=True,
        )

    def _to_go(self):
        """From what cells of the same kind took in this call, else from what was measured."""
        rates, seconds, unknown = None, 0.0, False
        left = [(cell, costs.remaining_images(cell)) for cell in self.waiting]
        now = time.monotonic()
        for run in self.running:
            left.append((run.cell, run.images))
            seconds -= now - run.start
        for cell, images in left:
            if costs.kind(cell) in self.walls:
                done, wall = self.walls[costs.kind(cell)]
                seconds += images * wall / max(done, 1e-9)
                continue
            rates = costs.measured_rates(self.cells) if rates is None else rates
            rate = rates.get(costs.kind(cell))
            seconds, unknown = seconds + (images / rate if rate else 0), unknown or not rate
        if unknown:
            return "time to go not measured yet"
        return f"about {clock(max(seconds, 0) / self.jobs)} to go"


def _reason(run, code):
    with open(run.log, "rb") as file:
        file.seek(run.offset)
        lines = file.read().decode(errors="replace").splitlines()[1:]
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if code == EXIT_STOPPED:
        return "stopped by a signal"
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    last = (errors or lines or ["no output"])[-1].removeprefix("error: ")
    return f"{last} (exit code {code}, {run.log})"


def python_path() -> str:
    """PYTHONPATH of a process that runs `-m etfzoo.training`, wherever this one was started."""
    known = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(_ROOT), *([known] if known else [])])


def _environment(slot, jobs, gpus):
    """Its share of the machine, for a process."""
    if jobs == 1:
        return {}
    environment = {}
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(gpus)]
        environment["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
        environment["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = str(max(1, cores // jobs))
    names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
    return environment | dict.fromkeys(names, share)


def clock(seconds: float) -> str:
    """Seconds as a short text, e.g. `4 min`, `2 h 5 min`, `3 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
