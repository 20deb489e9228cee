"""Jobs: their files, the command that stands for them, and `python -m etfzoo.training`."""

import json
import subprocess
import sys

import pytest

from etfzoo.errors import EtfzooError
from etfzoo.training.config import TrainConfig
from etfzoo.training.job import Job
from etfzoo.workdir import Workdir

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


def run_module(*arguments):
    command = [sys.executable, "-m", "etfzoo.training", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_job_runs_as_a_module_and_records_a_command_that_repeats_it(embedded_dir, tmp_path):
    config = TrainConfig("digits", data_dir=str(embedded_dir), **SMALL)
    Job(config, str(tmp_path / "run")).save(tmp_path / "job.json")
    done = run_module(f"--config={tmp_path / 'job.json'}")
    assert done.returncode == 0, done.stderr
    workdir = Workdir(tmp_path / "run")
    assert TrainConfig.load(workdir.config) == config
    assert f"top-1 {100 * workdir.read_result()['top1']:.2f} %" in done.stdout
    command = json.loads(workdir.machine.read_text())["command"]
    assert command.startswith("etfzoo pretrain --dataset=digits --protocol=quickstart")
    assert "--image_size=8" in command and str(tmp_path) not in command
    # A finished run's settings again, at another place.
    done = run_module(f"--config={workdir.config}", f"--workdir={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    assert Workdir(tmp_path / "again").read_result() == workdir.read_result()
    done = run_module(f"--config={tmp_path / 'none.json'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
