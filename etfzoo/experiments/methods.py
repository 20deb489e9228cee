"""What sweeps compare: named ways to pretrain, and the tables that are made of them."""

from etfzoo.models.table import METHODS as OF_THE_PAPER
from etfzoo.models.table import PROJECTOR_LAYERS

_LINEAR, _ETF = {"head": "linear"}, {"head": "etf"}

# By name the settings of a pretraining (see `etfzoo.training.config`); all others are the sweep's.
# The paper's three, then their variants.
METHODS: dict[str, dict] = {
    name: {"head": head, "norm": norm} for name, (head, norm) in OF_THE_PAPER.items()
}
METHODS |= {
    "etf_centred": _ETF | {"frame": "centred_etf"},
    "etf_orthogonal": _ETF | {"frame": "orthogonal"},
    "etf_hadamard": _ETF | {"frame": "hadamard"},
    "etf_softmax_code": _ETF | {"frame": "softmax_code"},
    "etf_learned_scale": _ETF | {"learn_scale": True},
    "etf_bn": _ETF | {"feature_norm": "bn"},
    "etf_l2": _ETF | {"feature_norm": "l2"},
    "etf_l2_learned_scale": _ETF | {"feature_norm": "l2", "learn_scale": True},
    "etf_guided": _ETF | {"guided": True},
    "etf_dot_regression": _ETF | {"feature_norm": "l2", "loss": "dot_regression"},
    "linear_squared_error": _LINEAR | {"loss": "squared_error"},
    "etf_squared_error": _ETF | {"loss": "squared_error"},
    "linear_adjusted": _LINEAR | {"logit_adjustment": 1.0},
    "etf_adjusted": _ETF | {"logit_adjustment": 1.0},
    "linear_balanced": _LINEAR | {"class_balance": 0.9999},
    "etf_balanced": _ETF | {"class_balance": 0.9999},
}
METHODS |= {
    f"{name}_projector{layers}": head | {"projector_layers": layers}
    for name, head in (("linear", _LINEAR), ("etf", _ETF))
    for layers in range(1, PROJECTOR_LAYERS + 1)
}
# As Harun et al. 2025 have it: frozen ETFs behind the features, which are kept apart.
METHODS["linear_etf_projector"] = _LINEAR | {
    "projector_layers": 1, "projector_kind": "etf", "entropy_weight": 0.05,
}  # fmt: skip

# On classes of very different size.
LONG_TAIL = ("linear", "linear_adjusted", "etf", "etf_dot_regression", "etf_adjusted")
# On classes of one size, where adjustment and balance have nothing to do.
VARIANTS = ("linear", "etf") + tuple(
    name
    for name in METHODS
    if name not in OF_THE_PAPER and not name.endswith(("_adjusted", "_balanced"))
)

# The tables that a sweep can be for, and what each is called.
TABLES = {
    "table1": "Table 1: transfer from {source}, protocol {protocol}",
    "table_longtail": "Long tails of {source}, protocol {protocol}",
    "table_variants": "Variants of the classifier on {source}, protocol {protocol}",
}
