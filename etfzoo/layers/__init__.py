"""Keras layers that plug into any backbone."""

from etfzoo.layers.etf_classifier import ETFClassifier

__all__ = ["ETFClassifier"]
