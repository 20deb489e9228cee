"""The recipes as a user calls them; in a process of their own where that is the point."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import etfzoo
from etfzoo.cli import configs, flags
from testing import (
    CHECKOUT,
    finish,
    last_checkpoint,
    run_recipe,
    small_disk,
    small_rn18,
    start_recipe,
)

ROOT = CHECKOUT
TINY = ("--protocol=quickstart", "--epochs=1", "--batch_size=50")
RN18 = ("--backbone=rn18", *TINY)


def _assert_one_line(err, message):
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err and "Traceback" not in err


def test_from_a_bare_clone_one_line_names_the_way():
    # -S: no site-packages, as with a system Python that has nothing installed
    command = [sys.executable, "-S", str(ROOT / "recipes" / "pretrain.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    _assert_one_line(done.stderr, "make demo")
    assert ".venv/bin/python" in done.stderr


def test_import_without_tensorflow_names_the_extra():
    command = [sys.executable, "-S", "-c", "import etfzoo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "pip install 'etfzoo[cpu]'" in done.stderr.splitlines()[-1]


def test_an_unknown_backend_is_one_line():
    err = finish("pretrain", start_recipe("pretrain", KERAS_BACKEND="jaxx"), code=2)
    assert "KERAS_BACKEND=jaxx cannot be used" in err


def test_strategy_tpu_without_a_tpu(tmp_path):
    err = run_recipe("pretrain", "--head=etf", "--strategy=tpu", code=2, cwd=tmp_path)
    assert "no TPU found" in err
    assert not os.listdir(tmp_path)


def test_help_is_grouped():
    out = run_recipe("pretrain", "--help")
    for text in ("Model:", "Data:", "Training:", "Machine:", "--head: etf", "(default: paper)"):
        assert text in out


@pytest.mark.parametrize("command", [[], ["pretrain"]])
def test_help_may_be_read_in_part(command):
    start = [sys.executable, "-m", "etfzoo.cli", *command, "--help"]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()  # as `head -0` does
    assert process.stderr.read() == b"" and process.wait() == 0


def test_suggestions_are_commands_of_the_kind_that_ran(capsys, monkeypatch):
    for started, suggested in (
        ("recipes/pretrain.py", "python recipes/evaluate.py"),
        ("etfzoo pretrain", "etfzoo evaluate"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        configs.print_next("evaluate", model="my model", dataset=None)
        assert capsys.readouterr().out == f"next: {suggested} '--model=my model'\n"
        text = "train with `python recipes/pretrain.py --head=etf`"
        assert suggested.split("eval")[0] in flags.as_flags(text)


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("pretrain", ["--hed=etf"], "Did you mean: head"),
        ("pretrain", ["--epochs=many"], "--epochs"),
        ("pretrain", ["etf"], "unexpected argument 'etf'"),
        ("pretrain", ["--dataset=folder:no/such/place"], "does not exist"),
        ("pretrain", ["--protocol=papr"], "did you mean paper"),
        ("finetune", ["--model=rn50_eft"], "did you mean rn50_etf"),
        ("evaluate", [], "--model"),
    ],
)
def test_bad_flags(tmp_path, recipe, flags, message):
    assert message in run_recipe(recipe, *flags, code=2, cwd=tmp_path)
    assert not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def pretrained(embedded_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    flags = ("--dataset=digits", f"--data_dir={embedded_dir}", *RN18)
    with small_rn18():
        out = run_recipe("pretrain", "--head=etf", *flags, f"--workdir={workdir}")
    assert "top-1" in out and "Epoch 1/1 - 4/4" in out
    return workdir


@pytest.mark.slow
def test_config_json_repeats_the_run_bit_for_bit(small_network, pretrained, tmp_path):
    run_recipe("pretrain", f"--config={pretrained}/config.json", f"--workdir={tmp_path / 'again'}")
    _assert_bit_equal(pretrained, tmp_path / "again")


@pytest.mark.slow
def test_finetune_probe_evaluate_publish_load(small_network, pretrained, embedded_dir, tmp_path):
    data = ("--dataset=shapes/outlines", f"--data_dir={embedded_dir}")
    tuned, probed = tmp_path / "tuned", tmp_path / "probed"
    rates = "--learning_rate=0.001,0.02"
    out = run_recipe("finetune", f"--model={pretrained}", *data, *TINY, rates, f"--workdir={tuned}")
    assert "picked learning rate" in out
    run_recipe(
        "finetune", f"--model={pretrained}", *data, *TINY, "--mode=linear_probe",
        f"--workdir={probed}",
    )  # fmt: skip
    for workdir in (tuned, probed):
        report = tmp_path / f"report_{workdir.name}"
        run_recipe("evaluate", f"--model={workdir}", *data, f"--output={report}")
        metrics = json.loads((report / "metrics.json").read_text())
        result = json.loads((workdir / "result.json").read_text())
        assert metrics["top1"] == pytest.approx(result["top1"], abs=1e-9)
        assert metrics["examples"] == 500
        assert (report / "per_class.csv").read_text().count("\n") == 11
        for picture in ("confusion.png", "reliability.png"):
            assert Image.open(report / picture).size[0] > 300
    err = run_recipe("evaluate", f"--model={tuned}", "--dataset=shapes/source",
                  f"--data_dir={embedded_dir}", code=2, cwd=tmp_path)  # fmt: skip
    assert "has 10 classes" in err


@pytest.mark.slow
def test_collapse_measures_and_knn(small_network, pretrained, embedded_dir, tmp_path):
    data = f"--data_dir={embedded_dir}"
    flags = (f"--model={pretrained}", data, "--feature_cache=cache")
    out = run_recipe(
        "neural_collapse", *flags, "--dataset=digits", "--ood_dataset=shapes/textures",
        "--output=nc.json", cwd=tmp_path,
    )  # fmt: skip
    assert {"nc1_equal", "nc1_ratio_unbiased"} <= set(out.split()) and "written to nc.json" in out
    assert not {"nc1", "nc1_ratio", "cdnv"} & set(out.split())  # of splits of different size
    splits = json.loads((tmp_path / "nc.json").read_text())["splits"]
    assert [splits[s]["examples"] for s in ("train", "test")] == [200, 1297]
    assert {"nc1", "nc4", "nc5"} <= splits["test"].keys()
    run_recipe("neural_collapse", *flags, "--dataset=shapes/source", "--split=test", cwd=tmp_path)
    (path,) = (tmp_path / "runs/neural_collapse").glob("run@*/shapes_source_test.json")
    splits = json.loads(path.read_text())["splits"]
    assert splits.keys() == {"test"} and "nc3" not in splits["test"]  # 16 classes, not 10
    flags += ("--dataset=shapes/outlines", "--mode=knn", *TINY, "--workdir=knn")
    out = run_recipe("finetune", *flags, cwd=tmp_path)
    assert "on 500 images" in out and "next:" not in out
    result = json.loads((tmp_path / "knn/result.json").read_text())
    assert result["examples"] == 500 and result["k"] >= 1
    err = run_recipe("neural_collapse", "--dataset=digits", code=2, cwd=tmp_path)
    assert "say which model" in err


def _photos(root, broken=0):
    rng = np.random.RandomState(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.randint(256, size=(40, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg")
    for i in range(broken):
        path = root / "cat" / f"{i}.jpg"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_own_images_with_truncated_jpegs(small_network, tmp_path):
    _photos(tmp_path / "photos", broken=3)
    flags = (f"--dataset=folder:{tmp_path}/photos", *RN18, "--batch_size=8", "--epochs=2")
    err = run_recipe("pretrain", *flags, f"--workdir={tmp_path}/a", code=2)
    assert "is not a readable image" in err
    assert "cat/" in err
    out = run_recipe("pretrain", *flags, f"--workdir={tmp_path}/b", "--skip_corrupt")
    assert "corrupt images of the" in out and "top-1" in out
    by_split = json.loads((tmp_path / "b" / "corrupt.json").read_text())
    assert sorted(sum(by_split.values(), [])) == ["cat/0.jpg", "cat/1.jpg", "cat/2.jpg"]


def test_an_empty_image_folder(tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    err = run_recipe("pretrain", "--dataset=folder:photos", "--backbone=rn18", code=2, cwd=tmp_path)
    assert "no images in photos" in err
    assert os.listdir(tmp_path) == ["photos"]


def _assert_bit_equal(a, b):
    for workdir in (a, b):
        assert (workdir / "result.json").exists()
    (arrays, state), (others, other_state) = map(last_checkpoint, (a, b))
    assert state == other_state and arrays.keys() == others.keys()
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], others[name], name)


def _wait_for(process, condition, what):
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"no sign of {what}"
        time.sleep(0.002)


MOMENTS = {
    "inside an epoch": lambda w: len(list(w.glob("checkpoints/step-*.npz"))) >= 1,
    "while a checkpoint is written": lambda w: list(w.glob("checkpoints/.step-*.tmp")),
    "between epochs": lambda w: (w / "metrics.jsonl").exists(),
}


REGULARISERS = ("--mixup=0.2", "--cutmix=1", "--rand_augment=7", "--ema=0.99")


@pytest.fixture(scope="module")
def long_run(embedded_dir, tmp_path_factory):
    """A function that gives flags of a run, and the workdir where these went through once."""
    done = {}

    def flags_and_workdir(regularisers):
        flags = ("--dataset=digits", f"--data_dir={embedded_dir}", *RN18, "--epochs=3",
                 "--batch_size=20", "--checkpoint_every=3", *regularisers)  # fmt: skip
        if regularisers not in done:
            done[regularisers] = tmp_path_factory.mktemp("whole") / "run"
            run_recipe("pretrain", *flags, f"--workdir={done[regularisers]}")
        return flags, done[regularisers]

    return flags_and_workdir


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment, regularisers", [*((m, ()) for m in MOMENTS), ("inside an epoch", REGULARISERS)]
)
def test_sigkill_and_restart_ends_bit_equal(moment, regularisers, long_run, tmp_path):
    flags, whole = long_run(regularisers)
    killed = tmp_path / "killed"
    process = start_recipe("pretrain", *flags, f"--workdir={killed}")
    _wait_for(process, lambda: MOMENTS[moment](killed), moment)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (killed / "result.json").exists()
    run_recipe("pretrain", *flags, f"--workdir={killed}")
    assert not list(killed.rglob(".*.tmp"))
    _assert_bit_equal(whole, killed)


@pytest.mark.slow
def test_sigterm_saves_exits_75_and_resumes_bit_equal(embedded_dir, tmp_path):
    flags = ("--dataset=digits", f"--data_dir={embedded_dir}", *RN18, "--epochs=2")
    run_recipe("pretrain", *flags, f"--workdir={tmp_path}/whole")
    stopped = tmp_path / "stopped"
    process = start_recipe("pretrain", *flags, "--checkpoint_every=1", f"--workdir={stopped}")
    _wait_for(process, lambda: MOMENTS["inside an epoch"](stopped), "a step")
    process.terminate()
    assert "run the same command to go on" in finish("pretrain", process, code=75)
    run_recipe("pretrain", *flags, f"--workdir={stopped}")
    _assert_bit_equal(tmp_path / "whole", stopped)


def test_a_full_disk_while_training(small_network, embedded_dir, tmp_path):
    with small_disk(tmp_path / "disk", "300k") as disk:
        flags = ("--dataset=digits", f"--data_dir={embedded_dir}", *RN18)
        err = run_recipe("pretrain", *flags, f"--workdir={disk}/run", code=2)
        assert "No space left on device" in err
        assert not list(disk.rglob("*.npz")) and not list(disk.rglob("*.tmp"))


@pytest.mark.slow
def test_switchable_whitening_from_pretraining_to_fine_tuning(
    small_network, embedded_dir, tmp_path
):
    data, run = f"--data_dir={embedded_dir}", tmp_path / "run"
    flags = ("--head=linear", "--norm=sw", "--backbone=rn18", "--protocol=sw_official", data)
    flags += ("--image_size=32", "--epochs=1", "--batch_size=50", "--dataset=digits")
    out = run_recipe("pretrain", *flags, f"--workdir={run}")
    assert "top-1" in out and "note: unlike the script's network" in out and "assumed" not in out
    config = json.loads((run / "config.json").read_text())
    assert (config["schedule"], config["decay_all"], config["weight_decay"]) == ("step", True, 1e-4)
    assert (config["norm"], config["head"], config["learning_rate"]) == ("sw", "linear", 0.1)
    assert (config["initializer"], config["zero_gamma"]) == ("he_fan_out", False)
    model = etfzoo.load(run)
    etfzoo.publish(model, tmp_path / "rn18_sw.digits")
    flags = (f"--model={tmp_path}/rn18_sw.digits", "--dataset=shapes/outlines", data, *TINY)
    run_recipe("finetune", *flags, f"--workdir={tmp_path}/tuned")
    tuned = etfzoo.load(tmp_path / "tuned")
    assert tuned.spec.norm == "sw" and tuned.spec.num_classes == 10
    before, after = (m.get_layer("conv1_bn").moving_covariance for m in (model, tuned))
    assert np.abs(np.asarray(before) - np.asarray(after)).max() > 1e-3
    err = run_recipe("pretrain", "--norm=ws", code=2, cwd=tmp_path)
    assert "unknown norm 'ws'; did you mean sw" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "precision"), [("rn50", "none"), ("rn50", "bfloat16"), ("rn101", "none")]
)
def test_deep_resnets_train_publish_and_load_at_64_px(backbone, precision, embedded_dir, tmp_path):
    flags = ("--dataset=digits", f"--data_dir={embedded_dir}", *TINY, f"--backbone={backbone}")
    flags += ("--image_size=64", f"--mixed_precision={precision}", f"--workdir={tmp_path}/run")
    out = run_recipe("pretrain", *flags)
    assert "Epoch 1/1 - 4/4" in out
    model = etfzoo.load(tmp_path / "run")
    published = etfzoo.publish(model, tmp_path / f"{backbone}_etf.digits")
    loaded = etfzoo.load(tmp_path / f"{backbone}_etf.digits")
    assert loaded.spec == model.spec and loaded.spec.input_shape == (64, 64, 3)
    images = np.random.RandomState(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    np.testing.assert_array_equal(model(images), loaded(images))
    stored = sum(p.stat().st_size for p in (published / "variables").iterdir())
    assert stored < 1.02 * sum(4 * int(np.prod(v.shape)) for v in model.variables)
