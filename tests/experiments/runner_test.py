"""The order of a sweep's processes, and what is made of their ends; each stands for a training."""

import contextlib
import json
import os
import signal
import types

import pytest

from etfzoo.experiments import costs, runner, sweep
from etfzoo.runtime.interruption import Stopped

# In place of `python -m etfzoo.training`: begins, and ends as the name of its workdir says.
STAND_IN = """
import json, os, pathlib, sys, time
path = pathlib.Path(sys.argv[1].removeprefix("--config="))
job = json.loads(path.read_text())
workdir = pathlib.Path(job["workdir"])
names = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
with open("calls", "a") as file:
    line = {"workdir": str(workdir), **{name: os.environ.get(name) for name in names}}
    file.write(json.dumps(line) + "\\n")
workdir.mkdir(parents=True)
(workdir / "config.json").write_text("{}")
if pathlib.Path("wait").exists():
    time.sleep(60)
print("one line of many")
if workdir.name == "rn18_linear_s0":
    print("error: no luck\\nand more")
    sys.exit(2)
(workdir / "result.json").write_text(json.dumps({"top1": 0.25, "examples": 500}))
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    package = tmp_path / "stand_in/etfzoo/training"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.setattr(runner, "_ROOT", tmp_path / "stand_in")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "resolve", lambda *args: None)
    monkeypatch.setattr(costs, "examples", lambda *args: 100)
    return sweep.Sweep(
        root=str(tmp_path / "root"), source="digits", targets=("shapes/outlines",), epochs=1,
        backbones=("rn18",), methods=("linear", "etf"), modes=("full", "knn"),
        protocol="quickstart", batch_size=50, finetune_epochs=1, finetune_batch_size=50,
    )  # fmt: skip


def calls():
    with open("calls") as file:
        return [json.loads(line) for line in file]


def started():
    return ["/".join(call["workdir"].split("/root/")[1:]) for call in calls()]


def test_what_fails_is_told_and_what_needs_it_is_left_out(settings, tmp_path, capsys):
    failures = runner.run(settings, "a command", jobs=1)
    lost = "left out: it needs source/rn18_linear_s0"
    assert failures[0].startswith("source/rn18_linear_s0: no luck (exit code 2, ")
    assert [line.partition(": ")[2] for line in failures[1:]] == [lost] * 2
    first, *others = started()
    assert first == "source/rn18_linear_s0" and others[0] == "source/rn18_etf_s0"
    assert sorted(others[1:]) == [
        "shapes_outlines/rn18_etf_s0/full", "shapes_outlines/rn18_etf_s0/knn",
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "6 cells, 0 finished" in out and "source/rn18_etf_s0: top-1 25.00 % after" in out
    assert "[1/6 " in out and "source/rn18_linear_s0: FAILED: no luck" in out
    assert "source/rn18_linear_s0: starts" in out
    document = json.loads((tmp_path / "root/sweep.json").read_text())
    assert document["methods"] == ["linear", "etf"] and document["command"] == "a command"
    assert "root" not in document and document["version"]
    log = (tmp_path / "root/logs/source_rn18_etf_s0.log").read_text()
    assert "-m etfzoo.training" in log and "one line of many" in log
    assert all(call["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS") for call in calls())


def test_several_at_a_time_share_the_machine(settings, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(runner.run(settings, "a command", jobs=2, gpus=4)) == 3
    found = calls()
    assert {call["OMP_NUM_THREADS"] for call in found} == {"3"}
    assert {call["CUDA_VISIBLE_DEVICES"] for call in found[:2]} == {"0", "1"}


def test_a_signal_ends_the_running_cells(settings, tmp_path, monkeypatch, capsys):
    (tmp_path / "wait").touch()
    stop = types.SimpleNamespace(requested=False)
    monkeypatch.setattr(runner, "StopRequest", lambda: contextlib.nullcontext(stop))
    collect = runner._Runner._collect

    def collecting(self):
        stop.requested = (tmp_path / "calls").exists()
        collect(self)

    monkeypatch.setattr(runner._Runner, "_collect", collecting)
    with pytest.raises(Stopped):
        runner.run(settings, "a command")
    assert started() == ["source/rn18_linear_s0"]
    assert "stopping: the running cells save and end" in capsys.readouterr().out


@pytest.mark.parametrize(
    "code, text, reason",
    [
        (2, "error: no luck\nand more", "no luck (exit code 2, {log})"),
        (1, "first\nlast", "last (exit code 1, {log})"),
        (1, "", "no output (exit code 1, {log})"),
        (-signal.SIGKILL, "x", "killed by SIGKILL (out of memory?)"),
        (-signal.SIGSEGV, "x", "killed by SIGSEGV"),
        (75, "x", "stopped by a signal"),
    ],
)
def test_reasons(code, text, reason, tmp_path):
    log = tmp_path / "log"
    log.write_text(f"error: of before\ncommand\n{text}")
    run = types.SimpleNamespace(log=log, offset=len("error: of before\n"))
    assert runner._reason(run, code) == reason.format(log=log)
