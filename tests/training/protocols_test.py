"""Every protocol gives a valid configuration; what is said of its source is so."""

import dataclasses
import re

import numpy as np
import pytest

import etfzoo
from etfzoo.data.datasets import DATASETS
from etfzoo.errors import EtfzooError
from etfzoo.experiments import report
from etfzoo.training import protocols
from etfzoo.training.config import TrainConfig


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_every_row_is_a_configuration(name, task):
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    for row in (None, *DATASETS.values()):
        for backbone in ("rn18", "rn50", "rn101"):
            values = protocols.settings(name, task, backbone, row)
            config = TrainConfig(dataset="x", backbone=backbone, **values)
            assert config.protocol == name
    assert set(protocols.assumed(name, task)) <= fields
    assert set(protocols.get_protocol(name).notes) <= {"pretrain", "finetune", "sw"}


@pytest.mark.parametrize("name", ["paper", "paper_lowres"])
def test_all_that_the_paper_does_not_say_is_assumed(name):
    """What remains is what it gives: SGD's rate, batch, momentum and decay, epochs."""
    given = {"protocol", "learning_rate", "batch_size", "momentum", "weight_decay", "epochs"}
    values = protocols.settings(name, "pretrain", "rn50", DATASETS["imagenet2012"])
    assert values.keys() - given <= set(protocols.assumed(name, "pretrain"))
    assert {"initializer", "zero_gamma", "decay_all", "label_smoothing", "warmup_epochs"} <= set(
        protocols.assumed(name, "pretrain")
    )
    # Of fine-tuning it gives nothing; mean and deviation are the model's.
    values = protocols.settings(name, "finetune", "rn50", DATASETS["oxford_iiit_pet"])
    assert values.keys() - {"protocol", "mean", "std"} <= set(protocols.assumed(name, "finetune"))
    assert {"head", "warmup_epochs", "label_smoothing"} <= set(protocols.assumed(name, "finetune"))
    used = "min_area" in protocols.assumed(name, "finetune")
    assert used == (values["augment"] == "resized_crop")


def test_the_papers_switchable_whitening_is_another_recipe():
    (plain,) = protocols.notes("paper", "pretrain")
    assert "names no framework" in plain
    _, note = protocols.notes("paper", "pretrain", "sw")
    errors = [float(x) for x in re.findall(r"\b2\d\.\d\d\b", note)]
    assert errors == [22.07, 20.87]  # of their README, ResNet50 and 101
    assert [100 - e for e in errors] == pytest.approx(report.PAPER["imagenet2012"]["sw"])
    assert not protocols.notes("quickstart", "pretrain", "sw")


def test_sw_official_is_its_script():
    """imagenet.py and experiments/resnet50_sw/run.sh of its authors give every one of these."""
    config = TrainConfig("x", **protocols.settings("sw_official", "pretrain", "rn50", None))
    assert (config.image_size, config.crop, config.augment) == (224, 224 / 256, "resized_crop")
    assert (config.min_area, config.flip, config.label_smoothing) == (0.08, True, 0.0)
    assert (config.epochs, config.batch_size, config.learning_rate) == (100, 256, 0.1)
    assert (config.schedule, config.step_epochs, config.step_factor) == ("step", (30, 60, 90), 0.1)
    assert (config.momentum, config.nesterov, config.warmup_epochs) == (0.9, False, 0)
    assert (config.weight_decay, config.decay_all) == (1e-4, True)
    assert (config.initializer, config.zero_gamma) == ("he_fan_out", False)
    np.testing.assert_allclose(np.array(config.mean) / 255, (0.485, 0.456, 0.406), atol=1e-9)
    np.testing.assert_allclose(np.array(config.std) / 255, (0.229, 0.224, 0.225), atol=1e-9)
    assert protocols.assumed("sw_official", "pretrain") == ()


def test_what_sw_official_says_of_its_network_is_so():
    (note,) = protocols.notes("sw_official", "pretrain")
    model = etfzoo.build_classifier("rn50", 4, input_shape=(32, 32, 3))
    layer = model.get_layer
    assert layer("v2_stack_1_block1_1_conv").strides == (2, 2) and "first 1x1" in note
    assert layer("v2_stack_1_block1_2_conv").strides == (1, 1) and "not in the 3x3" in note
    assert layer("v2_stack_1_block1_1_bn").epsilon == 1.001e-5 and "1.001e-5" in note
    assert layer("conv1_conv").padding == "same" and "SAME" in note


def test_fine_tuning_of_standard_is_assumed_where_its_source_has_other_values():
    assumed = set(protocols.assumed("standard", "finetune"))
    assert {"batch_size", "epochs", "weight_decay", "min_area"} <= assumed
    assert not {"nesterov", "schedule", "momentum"} & assumed  # given in its source
    assert (
        "`initializer=he_fan_out` with `zero_gamma`" in protocols.notes("standard", "pretrain")[0]
    )


def test_strong_is_torchvisions_recipe_with_rand_augment():
    row = protocols.PROTOCOLS["strong"]
    config = TrainConfig("x", **protocols.settings("strong", "pretrain", "rn50", None))
    assert (config.epochs, config.batch_size, config.learning_rate) == (600, 1024, 0.5)
    assert (config.schedule, config.warmup_epochs, config.momentum) == ("cosine", 5.0, 0.9)
    assert (config.weight_decay, config.label_smoothing, config.decay_all) == (2e-5, 0.1, False)
    assert (config.mixup, config.cutmix, config.rand_augment) == (0.2, 1.0, 7.0)
    # 0.99998 in their script: every 32 steps, corrected by images a step and epochs.
    every_32 = 1 - (1 - 0.99998) * 1024 * 32 / 600
    assert config.ema == pytest.approx(every_32 ** (1 / 32), abs=5e-6)
    for missing in ("random erasing", "repeated augmentation", "LAMB", "stochastic depth"):
        assert missing in row.source
    # The warm-up of the averaging, as it is computed, and until when it counts.
    assert "warm-up of its own, (1 + t) / (10 + t)" in row.source
    steps = np.array([299_000, 301_000])
    np.testing.assert_array_equal((1 + steps) / (10 + steps) < config.ema, [True, False])
    finetune = protocols.settings("strong", "finetune", "rn50", None)
    standard = protocols.settings("standard", "finetune", "rn50", None)
    assert finetune | {"protocol": "standard"} == standard
    assert not {"mixup", "cutmix", "rand_augment", "ema"} & finetune.keys()


def test_an_unknown_protocol():
    with pytest.raises(EtfzooError, match="unknown protocol 'stong'; did you mean strong"):
        protocols.get_protocol("stong")
