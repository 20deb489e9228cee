"""The sweep of a table: backbones x methods x targets x seeds, each cell a workdir of its own.

`<root>/source/<backbone>_<method>_s<seed>` holds a pretraining,
`<root>/<target>/<backbone>_<method>_s<seed>/<mode>` what it is worth on a target, and
`<root>/<source>/<backbone>_<method>_s<seed>/evaluate` on its own data (see `results.place`).
`etfzoo.experiments.runner` runs the cells, `etfzoo.experiments.report` makes tables of them.
"""

import dataclasses
import itertools
import logging
import math
from pathlib import Path

from etfzoo.data.datasets import DATASETS
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError, unknown
from etfzoo.experiments import results
from etfzoo.experiments.methods import METHODS, OF_THE_PAPER, TABLES
from etfzoo.layers import frames
from etfzoo.models.table import BACKBONES, get_backbone
from etfzoo.training import evaluation, protocols, search
from etfzoo.training.config import TrainConfig
from etfzoo.training.job import EVALUATE, MODES, Job
from etfzoo.workdir import Workdir

log = logging.getLogger("etfzoo")

TARGETS = (
    "cifar100", "cifar10", "stl10", "svhn_cropped", "oxford_iiit_pet", "oxford_flowers102", "dtd",
)  # fmt: skip
FINISHED, RESUMABLE, TO_DO = "finished", "resumable", "to do"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is swept over, and under which settings; each setting counts for every method.

    Attributes:
        root: directory of the sweep.
        table: what is made of it, a key of `etfzoo.experiments.methods.TABLES`. Of all but
            `"table1"` each pretraining is evaluated too (`etfzoo.training.evaluation.evaluate`),
            `targets` may be empty, and the pretraining's rate is always searched.
        source: data set of the pretraining.
        backbones, methods, targets, seeds, modes: the table; a target's seed is its pretraining's.
        imbalances: of the long tail that is made of the source, see TrainConfig; 1 is none.
        ood_datasets: data sets of other things, that the source is told apart from.
        protocol: a row of `etfzoo.training.protocols.PROTOCOLS`.
        data_dir: TFDS data directory; None is TFDS's default.
        learning_rates: grid of the fine-tuning, widened where the best lies at its edge; empty is
            a third, once and three times the protocol's rate. One value is taken as it is.
        source_learning_rates: grid of the pretraining; empty is the protocol's rate (of other
            tables than `"table1"`: a third, once and three times it), one value is taken as it is.
            Several are searched, for each method and imbalance with the first backbone and the
            first seed, and what is picked is taken for the other backbones and seeds.
        source_search_epochs: of each candidate of the pretraining; None is all epochs.
        epochs, batch_size, finetune_epochs, finetune_batch_size, image_size, eval_every,
            mixed_precision, cache, deterministic: as in TrainConfig; None is the protocol's or the
            default.
        image_size_schedule: of the pretraining, as in TrainConfig.
    """

    root: str
    table: str = "table1"
    source: str = "imagenet2012"
    backbones: tuple[str, ...] = ("rn50", "rn101")
    methods: tuple[str, ...] = tuple(OF_THE_PAPER)
    targets: tuple[str, ...] = TARGETS
    seeds: tuple[int, ...] = (0,)
    modes: tuple[str, ...] = MODES
    imbalances: tuple[float, ...] = (1.0,)
    ood_datasets: tuple[str, ...] = ()
    protocol: str = "paper_lowres"
    data_dir: str | None = None
    learning_rates: tuple[float, ...] = ()
    source_learning_rates: tuple[float, ...] = ()
    source_search_epochs: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    finetune_epochs: int | None = None
    finetune_batch_size: int | None = None
    image_size: int | None = None
    image_size_schedule: tuple[tuple[int, int], ...] = ()
    eval_every: int | None = None
    mixed_precision: str | None = None
    cache: str | None = None
    deterministic: bool | None = None

    def __post_init__(self):
        if self.table not in TABLES:
            raise unknown("table", self.table, TABLES)
        optional = {"ood_datasets"} | ({"targets"} if self.evaluates else set())
        for name, kind, choices in (
            ("backbones", "backbone", BACKBONES),
            ("methods", "method", METHODS),
            ("modes", "mode", MODES),
            ("targets", "target", None),
            ("seeds", "seed", None),
            ("imbalances", "imbalance", None),
            ("ood_datasets", "data set of other things", None),
        ):
            values = tuple(dict.fromkeys(getattr(self, name)))
            if not values and name not in optional:
                raise EtfzooError(f"the sweep has no {kind}; pass `{name}`")
            for value in values:
                if choices is not None and value not in choices:
                    raise unknown(kind, value, choices)
            object.__setattr__(self, name, values)
        protocol = protocols.get_protocol(self.protocol)
        rates = self.learning_rates or _around(protocol.finetune["learning_rate"])
        object.__setattr__(self, "learning_rates", tuple(dict.fromkeys(rates)))
        rates = self.source_learning_rates
        if not rates and self.evaluates:
            rates = _around(protocol.pretrain["learning_rate"])
        object.__setattr__(self, "source_learning_rates", tuple(dict.fromkeys(rates)))
        for name in ("learning_rates", "source_learning_rates"):
            if not all(0 < rate < math.inf for rate in getattr(self, name)):
                raise EtfzooError(f"{name} must be positive; got {_text(getattr(self, name))}")
        if self.source_search_epochs is not None and self.source_search_epochs < 1:
            raise EtfzooError("source_search_epochs must be at least 1")

    @property
    def evaluates(self) -> bool:
        """Whether each pretraining is evaluated by itself."""
        return self.table != "table1"


def _around(rate):
    return tuple(float(f"{rate * x:.1g}") for x in (1 / 3, 1, 3))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One pretraining, or one way to use it on one target.

    Attributes:
        job: what is trained; with several rates the learning rate is one of them.
        method: of the pretraining.
        needs: cells that must be finished before.
        rate_of: the cell whose search tells the learning rate.
    """

    job: Job
    method: str
    needs: tuple["Cell", ...] = ()
    rate_of: "Cell | None" = None

    @property
    def config(self) -> TrainConfig:
        return self.job.config

    @property
    def workdir(self) -> Path:
        return Path(self.job.workdir)

    @property
    def mode(self) -> str:
        """`pretrain`, `full`, `linear_probe`, `knn` or `evaluate`."""
        return self.job.mode if self.config.init else "pretrain"

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates that are searched; none or one is no search."""
        return self.job.learning_rates

    @property
    def name(self) -> str:
        return "/".join(self.workdir.parts[-2 if self.mode == "pretrain" else -3 :])

    @property
    def finished(self) -> bool:
        """Whether there is a result, with all that is asked of it."""
        workdir = Workdir(self.workdir)
        if not (workdir.finished and self.job.ood_datasets):
            return workdir.finished
        result = workdir.usable_result()
        return result is not None and not evaluation.missing(result, self.job.ood_datasets)

    def ready_job(self) -> Job:
        """The job with the learning rate that the search of another cell has picked by now."""
        rate = picked_rate(self.rate_of) if self.rate_of is not None else None
        if rate is None:
            return self.job
        config = dataclasses.replace(self.config, learning_rate=rate)
        return dataclasses.replace(self.job, config=config)

    def runs(self) -> list[tuple[Path, TrainConfig]]:
        """Workdir and configuration of each training, candidates first; none of other modes."""
        if self.mode not in ("pretrain", "full"):
            return []
        candidates: list[tuple[Path, TrainConfig]] = []
        for rate in self.rates if len(self.rates) > 1 else ():
            candidate = dataclasses.replace(self.config, learning_rate=rate)
            trial = search.trial(candidate, self.job.search_epochs)
            candidates.append((search.folder(self.workdir, candidate).path, trial))
        return [*candidates, (self.workdir, self.config)]


def _text(values):
    return ",".join(map(str, values))


def cells(sweep: Sweep) -> list[Cell]:
    """All cells, each after those that it needs.

    Raises:
        EtfzooError: a name or a setting that cannot be.
    """
    for name in (sweep.source, *sweep.targets, *sweep.ood_datasets):
        if name not in DATASETS:
            resolve(name, sweep.data_dir)
    _check_frames(sweep)
    sources = {}
    for method, imbalance in itertools.product(sweep.methods, sweep.imbalances):
        first = None
        for backbone, seed in itertools.product(sweep.backbones, sweep.seeds):
            known = {"backbone": backbone, "imbalance": imbalance, "method": method, "seed": seed}
            cell = _source_cell(sweep, known, first)
            first = first or cell
            sources[seed, backbone, imbalance, method] = cell, known
    order = itertools.product(sweep.seeds, sweep.backbones, sweep.imbalances, sweep.methods)
    pretrained = [sources[key] for key in order]
    uses = [(sweep.source, EVALUATE)] * sweep.evaluates
    uses += itertools.product(sweep.targets, sweep.modes)
    return [cell for cell, _ in pretrained] + [
        _target_cell(sweep, cell, known, target, mode)
        for cell, known in pretrained
        for target, mode in uses
    ]


def fitting(source: str, backbones, methods, data_dir=None) -> list[str]:
    """Those methods whose fixed classifier is there for the classes of a data set.

    Args:
        source: the data set.
        backbones: names; it must be there for the features of each.
        methods: keys of `METHODS`.
        data_dir: TFDS data directory.
    """
    row = DATASETS.get(source)
    classes = row.num_classes if row else resolve(source, data_dir).num_classes
    dims = [get_backbone(backbone).feature_dim for backbone in backbones]
    return [
        method
        for method in methods
        if METHODS[method]["head"] != "etf"
        or all(
            frames.fits(METHODS[method].get("frame", "simplex_etf"), classes, dim) for dim in dims
        )
    ]


def _check_frames(sweep):
    fit = fitting(sweep.source, sweep.backbones, sweep.methods, sweep.data_dir)
    others = [method for method in sweep.methods if method not in fit]
    # A softmax code of few classes is the simplex: no gain, and no harm.
    wrong = [method for method in others if METHODS[method].get("frame") != "softmax_code"]
    if wrong:
        raise EtfzooError(
            f"{wrong[0]} has no classifier of so many classes as {sweep.source} has in the "
            f"features of {_text(sweep.backbones)}: leave it out of `methods`"
        )


def _config(sweep, task, dataset, backbone, own) -> dict:
    """Fields of TrainConfig: the protocol's, then the sweep's, then a cell's own."""
    names = (
        "data_dir", "image_size", "eval_every", "mixed_precision", "cache", "deterministic",
    )  # fmt: skip
    given = {name: getattr(sweep, name) for name in names} | own
    defaults = protocols.settings(sweep.protocol, task, backbone, DATASETS.get(dataset))
    return defaults | {"dataset": dataset} | {k: v for k, v in given.items() if v is not None}


def _source_cell(sweep, known, first):
    backbone = known["backbone"]
    own = METHODS[known["method"]] | {name: known[name] for name in ("backbone", "seed")}
    own |= {"imbalance": known["imbalance"], "image_size_schedule": sweep.image_size_schedule}
    own |= {"epochs": sweep.epochs, "batch_size": sweep.batch_size}
    fields = _config(sweep, "pretrain", sweep.source, backbone, own)
    fields["neural_collapse_every"] = fields["epochs"]
    rates, rate_of = sweep.source_learning_rates, None
    if rates:
        fields["learning_rate"] = rates[0]
    if len(rates) > 1 and first is not None:
        rates, rate_of = (), first
        fields["learning_rate"] = picked_rate(first) or fields["learning_rate"]
    job = Job(
        TrainConfig(**fields),
        str(Path(sweep.root) / results.place(**known, dataset=sweep.source, mode="source")),
        learning_rates=rates,
        widen=len(rates) > 1,
        search_epochs=sweep.source_search_epochs if len(rates) > 1 else None,
    )
    return Cell(job, known["method"], () if rate_of is None else (rate_of,), rate_of)


def _target_cell(sweep, source, known, target, mode):
    start, full = source.config, mode == "full"
    own = {"seed": start.seed, "init": str(source.workdir.absolute()), "head": "linear"}
    if mode == EVALUATE:
        own |= {"head": start.head, "keep_head": True, "imbalance": start.imbalance}
    own |= {"epochs": sweep.finetune_epochs, "batch_size": sweep.finetune_batch_size}
    own |= {name: getattr(start, name) for name in ("backbone", "norm", "mean", "std")}
    own |= {"learning_rate": sweep.learning_rates[0]} if full else {}
    rates = sweep.learning_rates if full else ()
    job = Job(
        TrainConfig(**_config(sweep, "finetune", target, start.backbone, own)),
        str(Path(sweep.root) / results.place(**known, dataset=target, mode=mode)),
        mode,
        learning_rates=rates,
        widen=len(rates) > 1,
        feature_cache=str(Path(sweep.root) / "features")
        if mode in ("linear_probe", "knn")
        else None,
        ood_datasets=sweep.ood_datasets if mode == EVALUATE else (),
    )
    return Cell(job, source.method, (source,))


def picked_rate(cell: Cell) -> float | None:
    """The learning rate that a cell's search picked; None before it is finished."""
    workdir = Workdir(cell.workdir)
    return TrainConfig.load(workdir.config).learning_rate if workdir.finished else None


def state(cell: Cell) -> str:
    """`FINISHED`, `RESUMABLE` or `TO_DO`.

    Raises:
        EtfzooError: the workdir holds a run with other settings or another search.
    """
    workdir = Workdir(cell.workdir)
    if not workdir.config.exists():
        return RESUMABLE if workdir.begun else TO_DO
    there, here = TrainConfig.load(workdir.config), cell.config
    finished = workdir.usable_result() is not None and cell.finished
    if len(cell.rates) > 1 or (cell.rate_of is not None and picked_rate(cell.rate_of) is None):
        here = dataclasses.replace(here, learning_rate=there.learning_rate)
    if finished and there.init and Path(there.init).parts[-2:] == Path(here.init).parts[-2:]:
        here = dataclasses.replace(here, init=there.init)  # the sweep may have been moved
    differences = there.differences(here)
    if len(cell.rates) > 1:
        try:
            differences += _other_search(cell)
        except EtfzooError as error:  # the search goes through its candidates again
            log.warning("%s", error)
            finished = False
    if differences:
        raise EtfzooError(
            f"{cell.workdir} holds a run with other settings ({'; '.join(differences[:4])}); "
            "choose another `workdir` or delete it"
        )
    return FINISHED if finished else RESUMABLE


def _other_search(cell):
    rows = Workdir(cell.workdir).read_selection()
    tried = sorted({row["learning_rate"] for row in rows if not row.get("widened")})
    if tried == sorted(cell.rates):
        return []
    return [f"learning rates {_text(tried) or 'not searched'} there, {_text(cell.rates)} here"]
