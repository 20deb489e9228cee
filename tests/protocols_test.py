"""Every protocol gives a valid configuration; what is said of `strong` is what it does."""

import dataclasses

import pytest

from etfzoo import protocols
from etfzoo.config import TrainConfig
from etfzoo.data.datasets import DATASETS
from etfzoo.errors import EtfzooError


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
    finetune = protocols.settings("strong", "finetune", "rn50", None)
    standard = protocols.settings("standard", "finetune", "rn50", None)
    assert finetune | {"protocol": "standard"} == standard
    assert not {"mixup", "cutmix", "rand_augment", "ema"} & finetune.keys()


def test_an_unknown_protocol():
    with pytest.raises(EtfzooError, match="unknown protocol 'stong'; did you mean strong"):
        protocols.get_protocol("stong")
