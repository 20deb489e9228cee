"""The sweep of Table 1: backbones x methods x targets x seeds, each cell a workdir of its own.

`<root>/source/<backbone>_<method>_s<seed>` holds a pretraining,
`<root>/<target>/<backbone>_<method>_s<seed>/<mode>` what it is worth on a target.
`etfzoo.experiments.runner` runs the cells, `etfzoo.experiments.report` makes tables of them.
"""

import dataclasses
import functools
import logging
import math
import re
from pathlib import Path

from etfzoo.data.datasets import DATASETS
from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError, unknown
from etfzoo.models.table import BACKBONES, METHODS
from etfzoo.runtime import hardware
from etfzoo.training import protocols, search
from etfzoo.training.config import TrainConfig
from etfzoo.training.job import MODES, Job
from etfzoo.workdir import Workdir, folder_name

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
        source: data set of the pretraining.
        backbones, methods, targets, seeds, modes: the table; a target's seed is its pretraining's.
        protocol: a row of `etfzoo.training.protocols.PROTOCOLS`.
        data_dir: TFDS data directory; None is TFDS's default.
        learning_rates: grid of the fine-tuning, widened where the best lies at its edge; empty is
            a third, once and three times the protocol's rate. One value is taken as it is.
        source_learning_rates: grid of the pretraining; empty is the protocol's rate, one value is
            taken as it is. Several are searched, for each method with the first backbone and the
            first seed, and what is picked is taken for the other backbones and seeds.
        source_search_epochs: of each candidate of the pretraining; None is all epochs.
        epochs, batch_size, finetune_epochs, finetune_batch_size, image_size, eval_every,
            mixed_precision, cache, deterministic: as in TrainConfig; None is the protocol's or the
            default.
        image_size_schedule: of the pretraining, as in TrainConfig.
    """

    root: str
    source: str = "imagenet2012"
    backbones: tuple[str, ...] = ("rn50", "rn101")
    methods: tuple[str, ...] = tuple(METHODS)
    targets: tuple[str, ...] = TARGETS
    seeds: tuple[int, ...] = (0,)
    modes: tuple[str, ...] = MODES
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
        for name, kind, choices in (
            ("backbones", "backbone", BACKBONES),
            ("methods", "method", METHODS),
            ("modes", "mode", MODES),
            ("targets", "target", None),
            ("seeds", "seed", None),
        ):
            values = tuple(dict.fromkeys(getattr(self, name)))
            if not values:
                raise EtfzooError(f"the sweep has no {kind}; pass `{name}`")
            for value in values:
                if choices is not None and value not in choices:
                    raise unknown(kind, value, choices)
            object.__setattr__(self, name, values)
        middle = protocols.get_protocol(self.protocol).finetune["learning_rate"]
        rates = self.learning_rates or (float(f"{middle * x:.1g}") for x in (1 / 3, 1, 3))
        object.__setattr__(self, "learning_rates", tuple(dict.fromkeys(rates)))
        rates = tuple(dict.fromkeys(self.source_learning_rates))
        object.__setattr__(self, "source_learning_rates", rates)
        for name in ("learning_rates", "source_learning_rates"):
            if not all(0 < rate < math.inf for rate in getattr(self, name)):
                raise EtfzooError(f"{name} must be positive; got {_text(getattr(self, name))}")
        if self.source_search_epochs is not None and self.source_search_epochs < 1:
            raise EtfzooError("source_search_epochs must be at least 1")


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
        """`pretrain`, `full`, `linear_probe` or `knn`."""
        return self.job.mode if self.config.init else "pretrain"

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates that are searched; none or one is no search."""
        return self.job.learning_rates

    @property
    def name(self) -> str:
        return "/".join(self.workdir.parts[-2 if self.mode == "pretrain" else -3 :])

    def ready_job(self) -> Job:
        """The job with the learning rate that the search of another cell has picked by now."""
        rate = picked_rate(self.rate_of) if self.rate_of is not None else None
        if rate is None:
            return self.job
        config = dataclasses.replace(self.config, learning_rate=rate)
        return dataclasses.replace(self.job, config=config)

    def runs(self) -> list[tuple[Path, TrainConfig]]:
        """Workdir and configuration of each training, candidates first; none for frozen modes."""
        if self.mode in ("linear_probe", "knn"):
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
    for name in (sweep.source, *sweep.targets):
        if name not in DATASETS:
            resolve(name, sweep.data_dir)
    sources = {}
    for method in sweep.methods:
        first = None
        for backbone in sweep.backbones:
            for seed in sweep.seeds:
                cell = _source_cell(sweep, backbone, method, seed, first)
                first = first or cell
                sources[backbone, method, seed] = cell
    pretrained = [
        sources[backbone, method, seed]
        for seed in sweep.seeds
        for backbone in sweep.backbones
        for method in sweep.methods
    ]
    return pretrained + [
        _target_cell(sweep, source, target, mode)
        for source in pretrained
        for target in sweep.targets
        for mode in sweep.modes
    ]


def _config(sweep, task, dataset, backbone, own) -> dict:
    """Fields of TrainConfig: the protocol's, then the sweep's, then a cell's own."""
    names = (
        "data_dir", "image_size", "eval_every", "mixed_precision", "cache", "deterministic",
    )  # fmt: skip
    given = {name: getattr(sweep, name) for name in names} | own
    defaults = protocols.settings(sweep.protocol, task, backbone, DATASETS.get(dataset))
    return defaults | {"dataset": dataset} | {k: v for k, v in given.items() if v is not None}


def _source_cell(sweep, backbone, method, seed, first):
    head, norm = METHODS[method]
    own = {"backbone": backbone, "head": head, "norm": norm, "seed": seed}
    own |= {"epochs": sweep.epochs, "batch_size": sweep.batch_size}
    own |= {"image_size_schedule": sweep.image_size_schedule}
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
        str(Path(sweep.root) / "source" / f"{backbone}_{method}_s{seed}"),
        learning_rates=rates,
        widen=len(rates) > 1,
        search_epochs=sweep.source_search_epochs if len(rates) > 1 else None,
    )
    return Cell(job, method, () if rate_of is None else (rate_of,), rate_of)


def _target_cell(sweep, source, target, mode):
    start, full = source.config, mode == "full"
    own = {"seed": start.seed, "init": str(source.workdir.absolute()), "head": "linear"}
    own |= {"epochs": sweep.finetune_epochs, "batch_size": sweep.finetune_batch_size}
    own |= {name: getattr(start, name) for name in ("backbone", "norm", "mean", "std")}
    own |= {"learning_rate": sweep.learning_rates[0]} if full else {}
    rates = sweep.learning_rates if full else ()
    job = Job(
        TrainConfig(**_config(sweep, "finetune", target, start.backbone, own)),
        str(Path(sweep.root) / folder_name(target) / source.workdir.name / mode),
        mode,
        learning_rates=rates,
        widen=len(rates) > 1,
        feature_cache=None if full else str(Path(sweep.root) / "features"),
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
    finished = workdir.usable_result() is not None
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


# What cells cost.


@functools.cache
def examples(dataset: str, role: str, data_dir: str | None = None) -> int:
    """Number of examples of a role: those that are there, else those that the row states."""
    row = DATASETS.get(dataset)
    try:
        return resolve(dataset, data_dir, prepare=False).size(role)
    except EtfzooError:
        if row is None:
            raise
    total = 0
    for part in getattr(row, role).split("+"):
        name, start, stop = re.fullmatch(r"(\w+)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", part).groups()
        count = row.counts[name]
        total += round(count * int(stop or 100) / 100) - round(count * int(start or 0) / 100)
    return total


def steps(config: TrainConfig) -> int:
    """Number of training steps of a run."""
    size = examples(config.dataset, config.train_split, config.data_dir)
    return config.epochs * (size // config.batch_size)


def _run_images(config: TrainConfig) -> float:
    """Images that a training takes; one that is only evaluated counts as a third."""
    train, test = (
        examples(config.dataset, split, config.data_dir)
        for split in (config.train_split, config.eval_split)
    )
    seen = -(-config.epochs // config.eval_every) * test
    if config.neural_collapse_every:
        seen += -(-config.epochs // config.neural_collapse_every) * (train + test)
    return steps(config) * config.batch_size + seen / 3


def _work(cell: Cell) -> list[tuple[Path, float, float]]:
    """Workdir, images and the share of them that is done, of each run of a cell."""
    runs = cell.runs()
    if runs:
        return [(path, _run_images(config), _done(path, config)) for path, config in runs]
    config, roles = cell.config, ("fit", "select", "train", "test")
    images = sum(examples(config.dataset, role, config.data_dir) for role in roles) / 3
    return [(cell.workdir, images, float(Workdir(cell.workdir).finished))]


def _done(workdir, config) -> float:
    """Share of a training that is done: whole epochs."""
    workdir = Workdir(workdir)
    try:
        return 1.0 if workdir.finished else len(workdir.history()) / config.epochs
    except EtfzooError:  # of a log: the run writes it again
        return 0.0


def remaining_images(cell: Cell) -> float:
    """Images that are left of a cell, without a widening of its search."""
    if Workdir(cell.workdir).finished:
        return 0.0
    return sum(images * (1 - done) for _, images, done in _work(cell))


def kind(cell: Cell) -> tuple:
    """What cells must have in common to take as long for an image."""
    mode = cell.mode if not cell.runs() else "train"
    return mode, cell.config.backbone, cell.config.norm, cell.config.image_size


def measured_rates(all_cells) -> dict[tuple, float]:
    """Images a second by `kind`, of whole and partial runs in the sweep's directory."""
    totals = {}
    for cell in all_cells:
        for path, images, done in _work(cell):
            seconds = hardware.read(path).get("seconds", 0)
            if done and seconds:
                before = totals.get(kind(cell), (0, 0))
                totals[kind(cell)] = before[0] + done * images, before[1] + seconds
    return {key: images / seconds for key, (images, seconds) in totals.items()}
