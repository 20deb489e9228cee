"""Jobs: their files, the command that stands for them, and `python -m etfzoo.training`."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from etfzoo.errors import EtfzooError
from etfzoo.training.__main__ import main
from etfzoo.training.config import TrainConfig
from etfzoo.training.job import Job
from etfzoo.workdir import Workdir
from testing import CHECKOUT, as_a_process

SMALL = {"backbone": "rn18", "protocol": "quickstart", "epochs": 1, "image_size": 8}


def test_a_job_survives_its_file(tmp_path):
    job = Job(
        TrainConfig("digits", init="rn18_etf", image_size_schedule=((8, 2),), epochs=4),
        str(tmp_path),
        "knn",
        (0.1, 0.2, 0.1),
        (1e-4,),
        True,
        3,
        "features",
    )
    assert job.learning_rates == (0.1, 0.2)
    job.save(tmp_path / "job.json")
    assert Job.load(tmp_path / "job.json") == job


def test_what_a_kept_head_tells_is_no_flag():
    fields = {"feature_norm": "l2", "projector_layers": 2, "projector_width": 24}
    config = TrainConfig("digits", init="runs/a", keep_head=True, **fields)
    flags = [text.partition("=")[0] for text in Job(config, "b").arguments()]
    assert "--keep_head" in flags and not {f"--{name}" for name in fields} & set(flags)
    new = TrainConfig("digits", **fields)
    assert {"--projector_layers=2", "--projector_width=24"} < set(Job(new, "b").arguments())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no job"),
        ({"config": {"dataset": "digits"}}, "no job"),
        ({"config": {"dataset": "digits"}, "workdir": "x", "mod": "knn"}, "no job"),
        ({"config": {"datset": "digits"}, "workdir": "x"}, "no training configuration"),
        ({"config": {"dataset": "digits"}, "workdir": "x", "mode": "kn"}, "mode 'kn'; .* knn"),
    ],
)
def test_files_that_hold_no_job(content, message, tmp_path):
    (tmp_path / "job.json").write_text(json.dumps(content))
    with pytest.raises(EtfzooError, match=message):
        Job.load(tmp_path / "job.json")


def call_module(*arguments):
    """Exit code, stdout and stderr, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with as_a_process(["etfzoo.training", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def test_a_job_runs_and_records_a_command_that_repeats_it(small_network, embedded_dir, tmp_path):
    config = TrainConfig("digits", data_dir=str(embedded_dir), **SMALL)
    Job(config, str(tmp_path / "run")).save(tmp_path / "job.json")
    code, out, _ = call_module(f"--config={tmp_path / 'job.json'}")
    assert code == 0
    workdir = Workdir(tmp_path / "run")
    assert TrainConfig.load(workdir.config) == config
    assert f"top-1 {100 * workdir.read_result()['top1']:.2f} %" in out
    command = json.loads(workdir.machine.read_text())["command"]
    assert command.startswith("etfzoo pretrain --dataset=digits --protocol=quickstart")
    assert "--image_size=8" in command and str(tmp_path) not in command
    # A finished run's settings again, at another place.
    code, _, _ = call_module(f"--config={workdir.config}", f"--workdir={tmp_path / 'again'}")
    assert code == 0
    assert Workdir(tmp_path / "again").read_result() == workdir.read_result()


def test_a_file_that_is_not_there_is_one_line_of_the_module(tmp_path):
    command = [sys.executable, "-m", "etfzoo.training", f"--config={tmp_path / 'none.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
