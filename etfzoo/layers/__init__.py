"""Keras layers that plug into any backbone."""

from etfzoo.layers.etf_classifier import ETFClassifier
from etfzoo.layers.switchable_whitening import SwitchableWhitening

__all__ = ["ETFClassifier", "SwitchableWhitening"]
