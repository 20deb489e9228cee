"""A job: one run with its search, as a command or a cell of a sweep asks for it."""

import dataclasses
import json
import os
from pathlib import Path

from etfzoo import files
from etfzoo.data.datasets import DATASETS
from etfzoo.errors import EtfzooError, unknown
from etfzoo.models.spec import HEAD_FIELDS
from etfzoo.training import protocols
from etfzoo.training.config import TrainConfig

MODES = ("full", "linear_probe", "knn")
EVALUATE = "evaluate"
# What a pretrained model tells by itself.
_FROM_MODEL = ("init", "backbone", "norm", "mean", "std")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, where, and which values are searched before.

    Attributes:
        config: the run; its own rate and decay count where no candidates are given.
        workdir: directory of the run.
        mode: `"full"` trains all weights; `"linear_probe"` and `"knn"` fit frozen features of
            `config.init`, see `etfzoo.training.transfer`; `"evaluate"` trains nothing, see
            `etfzoo.training.evaluation.evaluate`.
        learning_rates, weight_decays, widen, search_epochs: see `etfzoo.training.search.pick`.
        feature_cache: directory of features of frozen networks; None keeps none.
        ood_datasets: data sets of other things, for `"evaluate"`.
    """

    config: TrainConfig
    workdir: str
    mode: str = "full"
    learning_rates: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = ()
    widen: bool = False
    search_epochs: int | None = None
    feature_cache: str | None = None
    ood_datasets: tuple[str, ...] = ()

    def __post_init__(self):
        if self.mode not in (*MODES, EVALUATE):
            raise unknown("mode", self.mode, (*MODES, EVALUATE))
        for name in ("learning_rates", "weight_decays", "ood_datasets"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))

    def run(self) -> dict:
        """Does it, or goes on where it was stopped; returns the figures of `result.json`."""
        from etfzoo.training import evaluation, loop, search, transfer

        if self.mode == EVALUATE:
            return evaluation.evaluate(self.config, self.workdir, self.ood_datasets)
        if self.mode == "linear_probe":
            return transfer.linear_probe(
                self.config, self.workdir, feature_cache=self.feature_cache
            )
        if self.mode == "knn":
            return transfer.knn(self.config, self.workdir, feature_cache=self.feature_cache)
        if self.config.init:
            return transfer.finetune(
                self.config, self.workdir, self.learning_rates, self.weight_decays, self.widen
            )
        best = search.pick(
            self.config,
            self.workdir,
            self.learning_rates,
            self.weight_decays,
            self.widen,
            self.search_epochs,
        )
        return loop.train_and_evaluate(best, self.workdir)

    def save(self, path) -> None:
        """Writes it as JSON, atomically."""
        values = dataclasses.asdict(self) | {"workdir": str(self.workdir)}
        files.write_text(Path(path), json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, path) -> "Job":
        """Reads what `save` wrote.

        Raises:
            EtfzooError: no such file, not JSON, or no job.
        """
        values = files.read_json(path)
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or not {"config", "workdir"} <= values.keys() <= known:
            raise EtfzooError(f"{path} is no job: it needs config and workdir, beside {known}")
        return cls(**values | {"config": TrainConfig.from_dict(values["config"], path)})

    @property
    def command(self) -> str:
        """The command of `etfzoo` that does it."""
        if self.mode == EVALUATE:
            return EVALUATE
        return "finetune" if self.config.init else "pretrain"

    def arguments(self) -> list[str]:
        """Flags of that command: all that its protocol and its model don't tell."""
        config, task = self.config, self.command
        if self.mode == EVALUATE:
            flags = {"model": _short(config.init), "dataset": config.dataset}
            flags |= {"data_dir": config.data_dir, "split": config.eval_split}
            flags |= {"ood_dataset": self.ood_datasets, "batch_size": config.batch_size}
            flags |= {"output": self.workdir}
            return [_argument(name, value) for name, value in flags.items() if value]
        given: dict = {"dataset": config.dataset, "protocol": config.protocol}
        if config.init:
            given = {"model": _short(config.init), "mode": self.mode, "head": config.head} | given
        else:
            given |= {"backbone": config.backbone, "head": config.head}
        row = DATASETS.get(config.dataset)
        usual = protocols.settings(config.protocol, task, config.backbone, row)
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            known = field.name in given or (config.init and field.name in _FROM_MODEL)
            known = known or (config.keep_head and field.name in HEAD_FIELDS)
            if not known and value != usual.get(field.name, field.default):
                given[field.name] = value
        for name, values in (
            ("learning_rate", self.learning_rates),
            ("weight_decay", self.weight_decays),
        ):
            given |= {name: values} if len(values) > 1 else {}
        given |= {"widen": True} if self.widen else {}
        given |= {"search_epochs": self.search_epochs} if self.search_epochs else {}
        given |= {"feature_cache": self.feature_cache} if self.feature_cache else {}
        return [_argument(name, value) for name, value in given.items()] + [
            f"--workdir={self.workdir}"
        ]


def _short(handle):
    """A path below the current folder without that folder."""
    here = os.path.join(os.getcwd(), "")
    return handle.removeprefix(here)


def _argument(name, value):
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no{name}"
    if isinstance(value, tuple):
        parts = [":".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value]
        return f"--{name}={','.join(parts)}"
    return f"--{name}={value}"
