"""Which run a workdir belongs to, and with what it was made.

A run has an id, drawn when it begins, and a hash of its settings; both stand in `config.json` and
in each checkpoint. What a run's data looked like is in `data.json`. So it is noticed when two runs
meet in one folder, when a config was edited or deleted, and when data changed.
"""

import dataclasses
import hashlib
import json
import uuid

from etfzoo import files
from etfzoo.errors import EtfzooError
from etfzoo.models import checkpoint
from etfzoo.training.config import TrainConfig
from etfzoo.training.settings import kind_of
from etfzoo.workdir import Workdir

_RUN, _SETTINGS = "run", "settings"  # keys of config.json, and of a checkpoint's state


def settings_hash(config: TrainConfig) -> str:
    """Hash of the settings that results depend on; one at its default counts as not there."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata["runtime"] or value == field.default:
            continue
        number = isinstance(value, int) and kind_of(field)[0] is float
        values[field.name] = float(value) if number else value
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def check(config: TrainConfig, workdir) -> None:
    """Raises EtfzooError when a workdir holds a run with other settings; writes nothing."""
    workdir = Workdir(workdir)
    if workdir.config.exists():
        there = TrainConfig.load(workdir.config)
        recorded = files.read_json(workdir.config).get(_SETTINGS)
        if recorded not in (None, settings_hash(there)):
            raise EtfzooError(
                f"{workdir.config} was changed after its run began: undo that, or choose another "
                "`workdir` for the new settings"
            )
        differences = there.differences(config)
        if differences:
            longer = workdir.finished and config.epochs > there.epochs
            further = "; to train its model further, fine-tune that with `keep_head`"
            raise EtfzooError(
                f"{workdir} holds a run with other settings ({'; '.join(differences[:4])}); "
                f"choose another `workdir` or delete it{further if longer else ''}"
            )
        return
    state = _last_state(workdir)
    if state is not None and state.get(_SETTINGS) != settings_hash(config):
        raise EtfzooError(
            f"{workdir} holds checkpoints of a run with other settings, or of none that is known, "
            f"and its {workdir.config.name} is gone: choose another `workdir` or delete it"
        )


def claim(config: TrainConfig, workdir, data: dict) -> dict:
    """Makes a workdir the place of a run, or tidies up there after one that was killed.

    Args:
        config: the run.
        workdir: its directory, which `check` has let pass.
        data: what its data looks like, see `etfzoo.data.source.Source.fingerprint`.

    Returns:
        the run's id and the hash of its settings, as they go into each checkpoint.

    Raises:
        EtfzooError: the data is not what it was when the run began.
    """
    workdir = Workdir(workdir)
    if workdir.data.exists():
        before = files.read_json(workdir.data)
        if not isinstance(before, dict):
            raise EtfzooError(
                f"{workdir.data} is damaged: it does not tell what the data was; delete it if the "
                "data is still the same"
            )
        changed = _changes(before, json.loads(json.dumps(data)))
        if changed:
            raise EtfzooError(
                f"the data set {config.dataset} has changed since the run in {workdir} began "
                f"({'; '.join(changed[:4])}): bring it back, or choose another `workdir`"
            )
    known = files.read_json(workdir.config) if workdir.config.exists() else _last_state(workdir)
    run = (known or {}).get(_RUN) or uuid.uuid4().hex
    identity = {_RUN: run, _SETTINGS: settings_hash(config)}
    workdir.claim()
    document = identity | dataclasses.asdict(config)
    files.write_text(workdir.config, json.dumps(document, indent=2) + "\n")
    files.write_text(workdir.data, json.dumps(data, indent=2) + "\n")
    return identity


def run_of(workdir) -> str | None:
    """The id of a workdir's run; None of one that was made before there were any."""
    return files.read_json(Workdir(workdir).config).get(_RUN)


def check_state(identity: dict, state: dict, workdir) -> None:
    """Raises EtfzooError where a checkpoint is of another run than a workdir's."""
    if state.get(_RUN, identity[_RUN]) != identity[_RUN]:
        raise EtfzooError(
            f"the checkpoints in {workdir} are of run {state[_RUN]}, its config is of run "
            f"{identity[_RUN]}: one of them was copied here; delete it"
        )


def check_claim(identity: dict, workdir) -> None:
    """Raises EtfzooError where a workdir is not that of a run any more."""
    path = Workdir(workdir).config
    try:
        found = files.read_json(path)[_RUN]
    except (EtfzooError, KeyError, TypeError):
        found = None
    if found != identity[_RUN]:
        raise EtfzooError(
            f"{path} was deleted or replaced while its run went on: the run ends here, and saves "
            "no more into that folder"
        )


def _last_state(workdir) -> dict | None:
    found = checkpoint.latest(checkpoint.CheckpointManager(workdir).paths(), only_state=True)
    return found and found[2]


def _changes(there: dict, here: dict) -> list[str]:
    texts = []
    for name in there | here:
        before, now = (json.dumps(values.get(name)) for values in (there, here))
        if before != now:
            texts.append(f"{name} was {before[:80]}, is {now[:80]}")
    return texts
