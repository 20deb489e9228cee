"""The training loop in one process: resuming, stopping, diverging, schedules."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import etfzoo
from etfzoo import locks
from etfzoo.data import conversion
from etfzoo.data.augmentation import Augmentation
from etfzoo.data.pipeline import Pipeline
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError, TrainingDiverged
from etfzoo.measure import accuracy, features
from etfzoo.models import checkpoint
from etfzoo.runtime import hardware
from etfzoo.training import build, loop, search
from etfzoo.training.config import TrainConfig
from testing import last_checkpoint

pytestmark = pytest.mark.small_rn18


@pytest.fixture(scope="module")
def config(embedded_dir):
    return TrainConfig(
        dataset="digits",
        data_dir=str(embedded_dir),
        backbone="rn18",
        head="etf",
        initializer="he_fan_out",
        zero_gamma=True,
        image_size=16,
        crop=1.0,
        augment="shift",
        flip=False,
        epochs=2,
        batch_size=50,
        learning_rate=0.02,
        weight_decay=1e-3,
        warmup_epochs=0.5,
        mean=(127.5,) * 3,
        std=(64.0,) * 3,
        eval_split="select",
        checkpoint_every=1,
        keep_checkpoints=100,
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """An uninterrupted run that kept a checkpoint of each of its 8 steps."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, loop.train_and_evaluate(config, workdir)


def _final(workdir):
    return last_checkpoint(workdir)


def _step(workdir, step):
    return workdir / f"checkpoints/step-{step:010d}.npz"


def _assert_same_end(a, b):
    (arrays_a, state_a), (arrays_b, state_b) = _final(a), _final(b)
    assert state_a == state_b
    assert arrays_a.keys() == arrays_b.keys()
    for name in arrays_a:
        np.testing.assert_array_equal(arrays_a[name], arrays_b[name], name)


def test_a_run_leaves_complete_files(finished, config):
    workdir, result = finished
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and rows[-1] == result
    assert (workdir / "metrics.csv").read_text().count("\n") == 3
    assert TrainConfig.load(workdir / "config.json") == config
    assert list((workdir / "tensorboard").glob("events*"))
    assert len(checkpoint.CheckpointManager(workdir).paths()) == 8
    assert result["examples"] == 300 and result["step"] == 8
    recorded = hardware.read(workdir)
    assert recorded["hardware"] and recorded["command"].startswith("python ")
    assert 0 < recorded["seconds"] < 600


def _begin(workdir, target, step):
    """What a run that was killed leaves: its checkpoint of a step."""
    (target / "checkpoints").mkdir(parents=True)
    name = f"checkpoints/step-{step:010d}.npz"
    shutil.copy(workdir / name, target / name)


def _go_on(config, workdir):
    """Trains to the end; only the last step is saved."""
    return loop.train_and_evaluate(dataclasses.replace(config, checkpoint_every=100), workdir)


# Between the epochs, inside the second one, and dead between last checkpoint and log files.
@pytest.mark.parametrize("step", [4, 6, 8])
def test_resuming_ends_bit_equal(finished, config, tmp_path, step):
    workdir, _ = finished
    _begin(workdir, tmp_path, step)
    shutil.copy(workdir / "config.json", tmp_path)
    hardware.write(tmp_path, 1000)
    (tmp_path / ".metrics.csv.1a2b3c4d.tmp").touch()  # as a kill leaves it
    _go_on(config, tmp_path)
    _assert_same_end(workdir, tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))
    assert (tmp_path / "metrics.csv").read_text() == (workdir / "metrics.csv").read_text()
    assert hardware.read(tmp_path)["seconds"] > 1000 or step == 8  # with those before the stop


def test_a_run_with_a_projector(config, tmp_path):
    """It resumes bit-equal, with 16 bits too; what is measured are the features."""
    config = dataclasses.replace(
        config, projector_layers=2, projector_width=24, feature_norm="l2", ema=0.9,
        mixed_precision="bfloat16", neural_collapse_every=1,
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = loop.train_and_evaluate(config, whole)
    (start, _), (end, _) = (last_checkpoint(whole, _step(whole, n)) for n in (1, 8))
    moved = {name for name in end if not np.array_equal(start[name], end[name])}
    parts = {name for name in end if name.startswith("model/projector")}
    assert len(parts) == 10 and parts < moved and "model/logits/kernel" not in moved
    killed.mkdir()
    _begin(whole, killed, 6)
    shutil.copy(whole / "config.json", killed)
    _go_on(config, killed)
    _assert_same_end(whole, killed)
    # Behind the projector the head acts on something else than features.
    measured = {name.split("/")[2] for name in result if name.startswith("nc/train/")}
    assert {"nc1", "nc2_gram", "cdnv"} <= measured
    assert not {name for name in measured if name.startswith(("nc3", "nc4"))}
    model = etfzoo.load(whole)
    assert model.spec.projector_layers == 2 and model.spec.projector_width == 24
    source = resolve("digits", config.data_dir)
    data = Pipeline(source, 16, 16, 1.0, 50, Augmentation("none", flip=False), 0)
    found = features.Extractor(model).load(data, "train")
    assert found.features.shape[1] == 32
    assert result["nc/train/nc1"] == pytest.approx(features.collapse(found, 10)["nc1"], rel=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="array_record is there for Linux")
def test_a_run_that_reads_by_index_resumes_bit_equal_and_on_no_other_format(config, tmp_path):
    indexed, whole, killed = (tmp_path / name for name in ("data", "whole", "killed"))
    conversion.convert("digits", config.data_dir, indexed)
    there = dataclasses.replace(config, data_dir=str(indexed))
    loop.train_and_evaluate(there, whole)
    _begin(whole, killed, 6)
    for name in ("config.json", "data.json"):
        shutil.copy(whole / name, killed)
    with pytest.raises(EtfzooError, match='has changed since .*format was "array_record", is null'):
        loop.train_and_evaluate(config, killed)
    _go_on(there, killed)
    _assert_same_end(whole, killed)


def test_several_steps_an_execution_change_nothing(finished, config, tmp_path):
    several = dataclasses.replace(config, steps_per_execution=3)
    loop.train_and_evaluate(several, tmp_path)
    _assert_same_end(finished[0], tmp_path)
    steps = [p.stem for p in checkpoint.CheckpointManager(tmp_path).paths()]
    assert steps == [f"step-{n:010d}" for n in (8, 7, 4, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_float16_scales_its_loss_and_resumes_bit_equal(config, tmp_path, ema):
    half = dataclasses.replace(config, mixed_precision="float16", norm="sw", head="linear", ema=ema)
    whole, again = tmp_path / "whole", tmp_path / "again"
    result = loop.train_and_evaluate(half, whole)
    assert np.isfinite(result["train_loss"])
    arrays, _ = _final(whole)
    # Halved where 16 bits overflowed; 2^15 at first.
    assert 0 < arrays["optimizer/loss_scale/dynamic_scale"] <= 2**15
    assert arrays["optimizer/sgd/iteration"] >= 4
    _begin(whole, again, 3)
    _go_on(half, again)
    _assert_same_end(whole, again)


@pytest.fixture(scope="module")
def resized(config, tmp_path_factory):
    """A run of two sizes that averages its weights; its configuration, and what was read when."""
    workdir = tmp_path_factory.mktemp("resized")
    config = dataclasses.replace(config, image_size=24, image_size_schedule=((16, 1),), ema=0.8)
    shown = []
    read, predict = Pipeline.training, accuracy.predict

    def spied_training(self, *args, **kwargs):
        shown.append(("train", *self.preprocessing[:2]))
        return read(self, *args, **kwargs)

    def spied_predict(step, batches):
        batches = list(batches)
        shown.append(("evaluate", *batches[0][0].shape[1:3]))
        return predict(step, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "training", spied_training)
        patch.setattr(accuracy, "predict", spied_predict)
        loop.train_and_evaluate(config, workdir)
    return workdir, config, shown


def test_progressive_resizing_trains_each_epoch_at_its_size(resized, config, tmp_path):
    workdir, progressive, shown = resized
    full = ("evaluate", 24, 24)
    assert shown == [("train", 16, 16), full, ("train", 24, 24), full]
    three = {"image_size": 32, "image_size_schedule": ((16, 1), (24, 1)), "epochs": 3}
    longer = dataclasses.replace(config, **three)
    assert [longer.train_size(epoch) for epoch in range(3)] == [16, 24, 32]
    # The first stage is what a training at that size alone does, to the bit.
    alone = {"image_size": 16, "image_size_schedule": (), "checkpoint_every": 4}
    loop.train_and_evaluate(dataclasses.replace(progressive, **alone), tmp_path)
    first, plain = (
        checkpoint.read(folder / "checkpoints" / "step-0000000004.npz")[0]
        for folder in (workdir, tmp_path)
    )
    for name in first:
        np.testing.assert_array_equal(first[name], plain[name], name)


# Inside the first stage, and between the two.
@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_progressive_resizing_resumes_bit_equal(resized, tmp_path, step):
    workdir, config, _ = resized
    _begin(workdir, tmp_path, step)
    _go_on(config, tmp_path)
    _assert_same_end(workdir, tmp_path)


def test_a_search_of_fewer_epochs_shortens_the_stages(config):
    long = dataclasses.replace(config, epochs=20, image_size_schedule=((16, 10), (24, 4), (28, 1)))
    short = search.trial(long, epochs=5)
    assert short.image_size_schedule == ((16, 2), (24, 1)) and short.epochs == 5


@pytest.fixture(scope="module")
def regularised(config, tmp_path_factory):
    """A run with all regularisers and averaged weights, and its configuration."""
    workdir = tmp_path_factory.mktemp("regularised")
    changes = {"mixup": 0.2, "cutmix": 1.0, "rand_augment": 7.0, "random_erasing": 0.7, "ema": 0.8}
    config = dataclasses.replace(config, **changes, label_smoothing=0.1, epochs=1)
    return workdir, config, loop.train_and_evaluate(config, workdir)


def test_a_regularised_run_resumes_bit_equal(regularised, tmp_path):
    workdir, config, result = regularised
    _begin(workdir, tmp_path, 3)
    assert _go_on(config, tmp_path) == result
    _assert_same_end(workdir, tmp_path)


LOSSES = {
    "balanced": {"logit_adjustment": 1.0, "class_balance": 0.99, "mixup": 0.2},
    "dot": {"loss": "dot_regression", "feature_norm": "bn_l2", "class_balance": 0.9},
    "tail": {"imbalance": 5.0, "logit_adjustment": 1.0, "batch_size": 20},
    "adamw in parts": {"optimizer": "adamw", "accumulate_steps": 2, "ema": 0.9},
    "lamb, clipped": {"optimizer": "lamb", "clip_norm": 0.5, "decay_all": True},
    "frozen in part": {
        "freeze": ("stem",), "layer_decay": 0.7, "head": "linear", "ema": 0.9,
        "class_weights": tuple(range(1, 11)),
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", LOSSES.values(), ids=LOSSES)
def test_a_run_with_another_loss_resumes_bit_equal(config, tmp_path, changes):
    other = dataclasses.replace(config, **changes, epochs=1)
    whole, again = tmp_path / "whole", tmp_path / "again"
    result = loop.train_and_evaluate(other, whole)
    _begin(whole, again, 2)
    assert _go_on(other, again) == result
    _assert_same_end(whole, again)
    if "loss" in changes:  # of cosines: training tells half of their squared distance from 1
        assert result["train_loss"] < 2 < result["loss"]


def test_weights_of_classes_are_one_a_class(config, tmp_path):
    few = dataclasses.replace(config, class_weights=(1, 2, 3))
    with pytest.raises(EtfzooError, match="one for each of the 10 classes; got 3"):
        loop.train_and_evaluate(few, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_early_stopping_gives_the_best_epoch_and_resumes_bit_equal(config, tmp_path):
    """A head that moves less than any prediction needs: no epoch is better than the first."""
    still = dataclasses.replace(
        config, head="linear", freeze=("backbone",), learning_rate=1e-9, epochs=6, early_stopping=2,
        initializer="glorot_uniform", zero_gamma=False,  # a bias of 0, of which 1e-9 can be told
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = loop.train_and_evaluate(still, whole)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert result == rows[0] | {"stopped_after": 3}
    assert loop.train_and_evaluate(still, whole) == result
    (last, _), (first, state) = _final(whole), last_checkpoint(whole, _step(whole, 4))
    bias = "model/logits/bias"
    assert state["epoch"] == 1 and not np.array_equal(first[bias], last[bias])
    np.testing.assert_array_equal(etfzoo.load(whole).get_layer("logits").bias, first[bias])
    # Killed as soon as the best epoch was saved, before anything else said that it is the best.
    _begin(whole, killed, 4)
    assert _go_on(still, killed) == result
    _assert_same_end(whole, killed)
    np.testing.assert_array_equal(etfzoo.load(killed).get_layer("logits").bias, first[bias])


@pytest.mark.parametrize("split", ["train", "fit"])
def test_losses_count_the_classes_of_the_long_tail(config, split):
    tailed = dataclasses.replace(
        config, imbalance=5.0, logit_adjustment=2.0, class_balance=0.9, train_split=split
    )
    source = resolve("digits", config.data_dir)
    seen = build.run_source(tailed, source)
    counts = np.bincount([r["label"] for r in seen.records(split)])
    before = np.bincount([r["label"] for r in source.records(split)])
    assert counts.max() >= 4 * counts.min() and (before > counts).any()
    options = build.make_loss(tailed, None, seen).keywords
    wanted = 2 * np.log(counts / counts.sum())
    np.testing.assert_allclose(options["adjustment"], wanted, rtol=1e-6)
    weights = (1 - 0.9) / (1 - 0.9**counts)
    weights *= counts.sum() / (weights * counts).sum()
    np.testing.assert_allclose(options["class_weights"], weights, rtol=1e-6)


def test_averaged_weights_are_those_that_are_evaluated_and_loaded(regularised):
    workdir, config, result = regularised
    kept = [checkpoint.read(p)[0] for p in checkpoint.CheckpointManager(workdir).paths()[::-1]]
    assert len(kept) == 4
    names = [k.removeprefix("model/") for k in kept[-1] if k.startswith("model/")]
    assert len(names) == len([k for k in kept[-1] if k.startswith("trained/")]) > 40
    for step in range(2, 5):  # what the checkpoints hold is the recursion itself
        decay = min(config.ema, (1 + step) / (10 + step))
        for name in names:
            before, weight = kept[step - 2][f"model/{name}"], kept[step - 1][f"trained/{name}"]
            expected = decay * before.astype(float) + (1 - decay) * weight
            np.testing.assert_allclose(kept[step - 1][f"model/{name}"], expected, atol=1e-5)
    kernel = "logits/kernel"
    np.testing.assert_array_equal(kept[-1][f"model/{kernel}"], kept[0][f"trained/{kernel}"])
    loaded = etfzoo.load(workdir)
    for variable in loaded.variables:
        np.testing.assert_array_equal(variable.value, kept[-1][f"model/{variable.path}"])
    source = resolve(config.dataset, config.data_dir)
    labels, predicted, *_ = accuracy.evaluate(loaded, source, config.eval_split, 100)
    assert np.mean(labels == predicted) == pytest.approx(result["top1"], abs=1e-9)


def test_configurations_written_before_the_regularisers_still_load(finished, config, tmp_path):
    values = json.loads((finished[0] / "config.json").read_text())
    since = ("mixup", "cutmix", "rand_augment", "random_erasing", "ema")
    for name in (*since, "logit_adjustment", "class_balance"):
        assert values.pop(name) == 0
    assert values.pop("loss") == "cross_entropy" and values.pop("imbalance") == 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert TrainConfig.load(tmp_path / "config.json") == config


def test_a_finished_run_is_not_trained_again(finished, config):
    workdir, result = finished

    def times():
        return {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name != locks.NAME}

    before = times()
    assert loop.train_and_evaluate(config, workdir) == result
    assert before == times()


def test_a_workdir_of_another_run_is_refused(finished, config):
    workdir, _ = finished
    for change, message in (
        ({"learning_rate": 0.5}, r"other settings \(learning_rate 0.02 there, 0.5 here\)"),
        ({"initializer": "glorot_uniform"}, "initializer he_fan_out there, glorot_uniform here"),
    ):
        with pytest.raises(EtfzooError, match=message):
            loop.train_and_evaluate(dataclasses.replace(config, **change), workdir)


def test_the_etf_kernel_never_moves(finished, config):
    from etfzoo.layers.frames import simplex_etf

    arrays, _ = _final(finished[0])
    expected = simplex_etf(10, 32, config.seed).T.astype("float32")
    np.testing.assert_array_equal(arrays["model/logits/kernel"], expected)
    assert not [name for name in arrays if name.startswith("optimizer/") and "logits" in name]


def test_a_diverging_run_says_so_and_keeps_the_last_good_state(config, tmp_path):
    wild = dataclasses.replace(config, learning_rate=1e6, warmup_epochs=0.0)
    with pytest.raises(TrainingDiverged, match="lower `learning_rate`"):
        loop.train_and_evaluate(wild, tmp_path)
    for path in checkpoint.CheckpointManager(tmp_path).paths():
        arrays, _ = checkpoint.read(path)
        assert all(np.isfinite(a).all() for a in arrays.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 201}, "has 200 images, fewer than one batch; pass `batch_size=50`"),
        ({"dataset": "digit"}, "unknown data set 'digit'; did you mean digits"),
        ({"backbone": "rn102"}, "unknown backbone 'rn102'; did you mean rn101"),
        ({"head": "eft"}, "unknown head 'eft'; did you mean etf"),
        ({"train_split": "trian"}, "no split 'trian'"),
        ({"jit_compile": True}, "add `deterministic=False`"),
        ({"epochs": 0}, "epochs must be between 1 and"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"feature_norm": "l2", "head": "linear"}, "belong to the etf head"),
        ({"loss": "dot_regression"}, "`loss=dot_regression` compares cosines: it takes an etf"),
        ({"loss": "squared_error", "label_smoothing": 0.1}, "belong to the cross-entropy"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean adamw"),
        ({"mixup": 0.2, "batch_size": 25}, "an even number of images, .* pass a multiple of 2"),
        ({"imbalance": 300}, "`imbalance=300` leaves class 5 of split 'train' of digits without"),
        ({"cutmix": -1.0}, "cutmix must be between 0 and"),
        ({"rand_augment": 11}, "rand_augment must be between 0 and 10"),
        ({"ema": 1.0}, "ema must be between 0 and 0.9999999"),
        ({"init": "rn50_eft"}, "unknown model 'rn50_eft'; did you mean rn50_etf"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(config, tmp_path, change, message):
    workdir = tmp_path / "new"
    change = {"initializer": "glorot_uniform", "zero_gamma": False} | change
    with pytest.raises(EtfzooError, match=message) as error:
        loop.train_and_evaluate(dataclasses.replace(config, **change), workdir)
    assert "\n" not in str(error.value)
    assert not workdir.exists()


def test_more_classes_than_the_etf_can_hold(config, tmp_path):
    photos = tmp_path / "photos"
    for number in range(34):
        (photos / f"c{number:03d}").mkdir(parents=True)
        for copy in range(2):
            Image.new("RGB", (4, 4)).save(photos / f"c{number:03d}" / f"{copy}.png")
    with pytest.raises(EtfzooError, match="no simplex ETF of 34 classes exists in 32"):
        loop.train_and_evaluate(
            dataclasses.replace(config, dataset=f"folder:{photos}"), tmp_path / "run"
        )
