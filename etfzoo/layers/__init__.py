"""Keras layers that plug into any backbone."""

from etfzoo.layers.etf_classifier import ETFClassifier
from etfzoo.layers.fused_batch_normalization import FusedBatchNormalization
from etfzoo.layers.switchable_whitening import SwitchableWhitening

__all__ = ["ETFClassifier", "FusedBatchNormalization", "SwitchableWhitening"]
