"""Numbers that come from publications, written here a second time from where they stand.

A protocol or a table of the paper that is changed by accident makes no run fail and no other test:
these do.
"""

import dataclasses

import numpy as np
import pytest

from etfzoo.data.datasets import DATASETS
from etfzoo.experiments import figures, random_features, report, results, sweep
from etfzoo.models.table import BACKBONES, METHODS
from etfzoo.training import protocols, search, transfer
from etfzoo.training.config import TrainConfig

# Tiomoko Ali et al., table 1, as it is printed: Trainable, SW, Fixed ETF; each ResNet50 / 101.
TABLE_1 = """
imagenet2012       75.25 / 79.20  77.93 / 79.13  76.72 / 77.29
cifar100           61.59 / 59.86  62.55 / 60.30  62.33 / 62.38
cifar10            89.56 / 87.93  88.68 / 88.43  89.33 / 88.38
stl10              60.03 / 56.32  63.32 / 61.91  63.73 / 65.17
svhn_cropped       95.10 / 95.56  95.67 / 95.67  94.40 / 95.02
oxford_iiit_pet    40.50 / 46.47  39.22 / 45.10  48.32 / 53.17
oxford_flowers102  38.05 / 37.09  41.56 / 44.07  60.30 / 57.03
dtd                29.09 / 28.24  24.62 / 30.74  40.90 / 34.68
"""


def test_table_1_of_the_paper():
    printed = {}
    for line in TABLE_1.strip().splitlines():
        name, *figures_of_row = line.replace("/", " ").split()
        pairs = np.array(figures_of_row, float).reshape(3, 2)
        printed[name] = dict(zip(("linear", "sw", "etf"), map(tuple, pairs), strict=True))
    assert printed == report.PAPER
    assert report.PAPER_BACKBONES == ("rn50", "rn101")


def test_the_sweep_is_that_of_table_1():
    plan = sweep.Sweep("root")
    assert (plan.source, *plan.targets) == tuple(
        line.split()[0] for line in TABLE_1.split("\n")[1:-1]
    )
    assert plan.backbones == ("rn50", "rn101") and plan.methods == ("linear", "sw", "etf")
    assert plan.modes == ("full", "linear_probe", "knn")
    assert (plan.protocol, plan.seeds) == ("paper_lowres", (0,))
    assert plan.learning_rates == (0.003, 0.01, 0.03)  # a third, once and three times 0.01
    assert plan.source_learning_rates == ()
    small = sweep.Sweep("root", protocol="quickstart")
    assert small.learning_rates == (0.007, 0.02, 0.06)


def test_networks():
    assert METHODS == {"linear": ("linear", "bn"), "sw": ("linear", "sw"), "etf": ("etf", "bn")}
    # He et al. 2015, table 1; layers with weights: those of the blocks, the stem and the head.
    for name, layers, width in (("rn18", 18, 512), ("rn34", 34, 512), ("rn50", 50, 2048)):
        row = BACKBONES[name]
        a_block = {"basic_block": 2, "block": 3}[row.block_type]
        assert a_block * sum(row.blocks) + 2 == layers and row.feature_dim == width
    assert BACKBONES["rn18"].blocks == (2, 2, 2, 2) and BACKBONES["rn34"].blocks == (3, 4, 6, 3)
    filters = (64, 128, 256, 512)
    assert all(row.filters == filters for row in BACKBONES.values())
    assert dataclasses.astuple(BACKBONES["rn50"]) == ("block", (3, 4, 6, 3), filters)
    assert dataclasses.astuple(BACKBONES["rn101"]) == ("block", (3, 4, 23, 3), filters)
    assert len(BACKBONES) == 4


# Every setting that decides what a run computes, where a recipe says nothing of it.
PLAIN = {
    "train_split": "train", "eval_split": "test", "head": "etf", "norm": "bn", "keep_head": False,
    "feature_norm": "none", "scale": None, "frame": "simplex_etf", "learn_scale": False,
    "guided": False, "projector_layers": 0, "projector_width": None, "projector_kind": "trained",
    "entropy_weight": 0.0, "optimizer": "sgd", "clip_norm": 0.0,
    "accumulate_steps": 1, "freeze": (), "layer_decay": 1.0, "early_stopping": 0,
    "class_weights": (),
    "initializer": "glorot_uniform", "zero_gamma": False,
    "mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375), "image_size": 224,
    "image_size_schedule": (), "crop": 0.875, "augment": "resized_crop", "min_area": 0.08,
    "antialias": True, "flip": True, "epochs": 100, "batch_size": 128, "learning_rate": 0.01,
    "learning_rate_scaling": "none", "schedule": "cosine", "warmup_epochs": 0.0,
    "step_epochs": (30, 60, 90), "step_factor": 0.1, "momentum": 0.9, "nesterov": False,
    "weight_decay": 0.0002, "decay_all": False, "loss": "cross_entropy",
    "logit_adjustment": 0.0, "class_balance": 0.0, "label_smoothing": 0.0, "mixup": 0.0,
    "cutmix": 0.0, "rand_augment": 0.0, "random_erasing": 0.0, "ema": 0.0,
    "mixed_precision": "none", "seed": 0, "deterministic": True, "cache": "none",
    "synchronize_norms": True, "eval_every": 1,
    "neural_collapse_every": 0, "imbalance": 1.0, "skip_corrupt": False,
}  # fmt: skip
KORNBLITH = {
    "epochs": 50, "batch_size": 64, "learning_rate": 0.01, "nesterov": True,
    "weight_decay": 0.0001, "min_area": 0.25,
}  # fmt: skip
AT_32 = {"augment": "shift", "crop": 1.0, "image_size": 32}
AT_64 = AT_32 | {"image_size": 64}
TINY = {
    "image_size": 64, "min_area": 0.25, "crop": 1.0, "warmup_epochs": 2.0, "weight_decay": 0.0005,
    "mixed_precision": "bfloat16",
}  # fmt: skip
CIFAR10 = {"mean": (125.3, 123.0, 113.9), "std": (63.0, 62.1, 66.7)}

# What each recipe says beyond that: protocol, task, backbone, data set; and its settings.
RECIPES = [
    # Tiomoko Ali et al.: ResNet50 for 180 epochs, ResNet101 for 100, at 0.01.
    ("paper", "pretrain", "rn50", "imagenet2012", {"epochs": 180}),
    ("paper", "pretrain", "rn101", "imagenet2012", {"epochs": 100}),
    ("paper", "finetune", "rn50", "cifar10", {"min_area": 0.25}),
    ("paper_lowres", "pretrain", "rn50", "imagenet2012", AT_64 | {"epochs": 180}),
    ("paper_lowres", "pretrain", "rn101", "imagenet2012", AT_64),
    ("paper_lowres", "finetune", "rn50", "cifar10", AT_32 | CIFAR10),
    ("paper_lowres", "finetune", "rn101", "svhn_cropped", AT_32 | {"flip": False}),
    # Goyal et al. 2017: 90 epochs, 0.1 for batches of 256, five epochs of warm-up, decay 1e-4.
    (
        "standard", "pretrain", "rn50", "imagenet2012",
        {
            "epochs": 90, "batch_size": 256, "learning_rate": 0.1, "warmup_epochs": 5.0,
            "weight_decay": 0.0001,
        },
    ),
    ("standard", "finetune", "rn50", "dtd", KORNBLITH),
    # Vryniotis 2021 without label, with RandAugment of A2; 224 of 232 pixels.
    (
        "strong", "pretrain", "rn50", "imagenet2012",
        {
            "epochs": 600, "batch_size": 1024, "learning_rate": 0.5, "warmup_epochs": 5.0,
            "weight_decay": 0.00002, "label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0,
            "rand_augment": 7.0, "ema": 0.99997, "crop": 0.965,
        },
    ),
    ("strong", "finetune", "rn50", "dtd", KORNBLITH),
    # Pan et al. 2019: batch 256, 0.1 times 0.1 at 30, 60 and 90 of 100 epochs, decay 1e-4 on all.
    (
        "sw_official", "pretrain", "rn50", "imagenet2012",
        {
            "batch_size": 256, "learning_rate": 0.1, "schedule": "step", "weight_decay": 0.0001,
            "decay_all": True, "initializer": "he_fan_out",
        },
    ),
    ("sw_official", "finetune", "rn101", "dtd", KORNBLITH),
    ("small", "pretrain", "rn18", "tiny_imagenet", TINY | {"epochs": 20, "learning_rate": 0.1}),
    ("small", "finetune", "rn18", "dtd", TINY | {"epochs": 30, "batch_size": 64}),
    (
        "quickstart", "pretrain", "rn18", None,
        AT_32 | {"epochs": 8, "learning_rate": 0.05, "weight_decay": 0.0},
    ),
    (
        "quickstart", "finetune", "rn18", "stl10",
        AT_32 | {"epochs": 20, "batch_size": 64, "learning_rate": 0.02, "weight_decay": 0.0},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    "protocol, task, backbone, dataset, recipe",
    RECIPES,
    ids=["-".join(map(str, r[:4])) for r in RECIPES],
)
def test_recipes(protocol, task, backbone, dataset, recipe):
    values = protocols.settings(protocol, task, backbone, DATASETS.get(dataset))
    config = TrainConfig("x", backbone=backbone, **values)
    wanted = PLAIN | recipe
    if config.augment != "resized_crop":
        wanted["min_area"] = config.min_area  # of no effect
    found = config.results_in()
    named = {"dataset": "x", "init": None, "backbone": backbone, "protocol": protocol}
    assert found == wanted | named


def test_every_protocol_is_written_here():
    assert {(p, t) for p, t, *_ in RECIPES} == {
        (p, t) for p in protocols.PROTOCOLS for t in ("pretrain", "finetune")
    }


def test_grids_of_transfer():
    assert transfer.PROBE_GRID == pytest.approx((1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10))
    assert transfer.KNN_GRID == (1, 5, 10, 20, 50, 100, 200)
    assert transfer.KNN_TEMPERATURE == 0.07  # Wu et al. 2018
    assert search.EXTENSIONS == 3


def test_metrics_of_targets():
    """Kornblith et al. 2019, table 1; what it has not is scored by top-1."""
    by_class = {name for name in DATASETS if results.headline_metric(name) == "mean_per_class"}
    assert by_class == {"oxford_iiit_pet", "oxford_flowers102"}
    assert results.headline_metric("folder:mine") == "top1"


def test_figure_2_and_3():
    assert random_features.PROJECTIONS == ("gaussian", "haar", "etf")
    assert random_features.GRID == pytest.approx(
        (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100)
    )
    at = np.array([-2.0, 0.5])
    closed = {
        "linear": [-2, 0.5], "relu": [0, 0.5], "abs": [2, 0.5],
        "cos": [-0.41614684, 0.87758256], "sin": [-0.90929743, 0.47942554],
        "exp": [0.13533528, 0.88249690],
    }  # fmt: skip
    assert closed.keys() == random_features.ACTIVATIONS.keys()
    for name, values in closed.items():
        np.testing.assert_allclose(random_features.ACTIVATIONS[name](at), values, atol=1e-8)
    np.testing.assert_allclose(random_features.polynomial(0.3)(at), [-0.8, 0.575])
    np.testing.assert_allclose(random_features.polynomial(0.3, 2.0)(at), [-2.8, 1.075])
    assert figures.FIRST == 100
