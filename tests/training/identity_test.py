"""Which run a workdir belongs to: ids, hashes, locks and data."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest

from etfzoo.data.sources import resolve
from etfzoo.errors import EtfzooError
from etfzoo.models import checkpoint
from etfzoo.training import identity, loop
from etfzoo.training.config import TrainConfig
from etfzoo.training.settings import setting
from etfzoo.workdir import Workdir
from testing import held_by_another_process, make_image_folder

pytestmark = pytest.mark.small_rn18

SMALL = {"backbone": "rn18", "image_size": 8, "epochs": 1, "augment": "none", "crop": 1.0}


@pytest.fixture(scope="module")
def config(embedded_dir):
    return TrainConfig("digits", data_dir=str(embedded_dir), batch_size=200, **SMALL)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = Workdir(tmp_path_factory.mktemp("identity") / "run")
    loop.train_and_evaluate(config, workdir)
    return workdir


@pytest.fixture
def run(trained, tmp_path):
    """A run that was killed after its last step: what resumes it restores, and ends at once."""
    copy = Workdir(shutil.copytree(trained, tmp_path / "run"))
    copy.result.unlink()
    return copy


def read(workdir):
    return json.loads(workdir.config.read_text())


def state_of(workdir):
    (path,) = checkpoint.CheckpointManager(workdir).paths()
    return checkpoint.read(path, only_state=True)[1]


def forget(workdir):
    """Makes it a workdir of the time before runs had an identity."""
    document = {k: v for k, v in read(workdir).items() if k not in ("run", "settings")}
    workdir.config.write_text(json.dumps(document))
    workdir.data.unlink()
    (path,) = checkpoint.CheckpointManager(workdir).paths()
    with np.load(path) as archive:
        arrays = dict(archive)
    state = json.loads(arrays["state"].tobytes())
    del state["run"], state["settings"]
    arrays["state"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    np.savez(path, **arrays)


def test_config_and_checkpoints_name_their_run(trained, config):
    found, state = read(trained), state_of(trained)
    assert len(found["run"]) == 32 and state["run"] == found["run"]
    assert found["settings"] == state["settings"] == identity.settings_hash(config)
    assert TrainConfig.load(trained.config) == config


def test_more_epochs_are_another_run(tmp_path):
    config = TrainConfig("digits", backbone="rn18", epochs=2)
    identity.claim(config, tmp_path, {})
    longer = dataclasses.replace(config, epochs=3)
    for finished in (False, True):
        with pytest.raises(EtfzooError, match="epochs 2 there, 3 here") as error:
            identity.check(longer, tmp_path)
        assert ("fine-tune that with `keep_head`" in str(error.value)) == finished
        (tmp_path / "result.json").write_text("{}")
    with pytest.raises(EtfzooError) as error:  # fewer are no way to go on
        identity.check(dataclasses.replace(config, epochs=1), tmp_path)
    assert "keep_head" not in str(error.value)


def test_the_hash_of_settings_survives_json_and_new_settings(config):
    @dataclasses.dataclass(frozen=True)
    class Later(TrainConfig):
        brightness: float = setting("Data", 0.0, "a later setting", low=0, high=1)

    old = TrainConfig("digits", backbone="rn18", epochs=2, scale=3, label_smoothing=0.1)
    assert identity.settings_hash(old) == "ed55fe87ab3f6ab6473ae584f88710c1"  # at version 0.2.0
    for other in ({"class_balance": 0.9}, {"logit_adjustment": 1.0}, {"imbalance": 10}):
        assert identity.settings_hash(dataclasses.replace(old, **other)) != (
            identity.settings_hash(old)
        )
    known = identity.settings_hash(config)
    later = Later(**dataclasses.asdict(config))
    assert identity.settings_hash(later) == known
    assert identity.settings_hash(dataclasses.replace(later, brightness=0.5)) != known
    again = TrainConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert identity.settings_hash(again) == known
    whole, real = (dataclasses.replace(config, learning_rate=x) for x in (1, 1.0))
    assert identity.settings_hash(whole) == identity.settings_hash(real) != known
    assert identity.settings_hash(dataclasses.replace(config, data_dir="/elsewhere")) == known


def test_a_second_process_is_told_who_holds_the_workdir(run, config):
    before = sorted(path.name for path in run.path.iterdir())
    with held_by_another_process(run) as process:
        with pytest.raises(EtfzooError, match=f"a run is at work in .*process {process.pid} on"):
            loop.train_and_evaluate(config, run)
    assert sorted(path.name for path in run.path.iterdir()) == before


def test_a_config_that_was_edited(run, config):
    document = read(run) | {"seed": 5}
    run.config.write_text(json.dumps(document))
    for seed in (0, 5):
        with pytest.raises(EtfzooError, match="was changed after its run began"):
            loop.train_and_evaluate(dataclasses.replace(config, seed=seed), run)


def test_a_config_that_was_deleted(run, config, trained):
    run.config.unlink()
    with pytest.raises(EtfzooError, match="checkpoints of a run with other settings"):
        loop.train_and_evaluate(dataclasses.replace(config, seed=5), run)
    assert not run.config.exists()
    assert loop.train_and_evaluate(config, run) == trained.read_result()
    assert read(run) == read(trained)  # it has its id back
    forget(run)
    run.result.unlink()
    run.config.unlink()  # nothing tells now whose checkpoints these are
    with pytest.raises(EtfzooError, match="or of none that is known"):
        loop.train_and_evaluate(config, run)


def test_checkpoints_of_another_run(run, config, tmp_path):
    document = read(run) | {"run": "0" * 32}
    run.config.write_text(json.dumps(document))
    with pytest.raises(EtfzooError, match=f"are of run {state_of(run)['run']}, .* of run 0000"):
        loop.train_and_evaluate(config, run)


def test_a_workdir_that_is_deleted_while_its_run_goes_on(config, tmp_path, monkeypatch):
    workdir = Workdir(tmp_path / "run")
    evaluate = loop.Trainer._evaluate

    def deleted(trainer):
        shutil.rmtree(workdir)
        return evaluate(trainer)

    monkeypatch.setattr(loop.Trainer, "_evaluate", deleted)
    with pytest.raises(EtfzooError, match="was deleted or replaced while its run went on"):
        loop.train_and_evaluate(config, workdir)
    assert not workdir.path.exists()


def test_data_that_changed_and_data_that_moved(run, config, embedded_dir, tmp_path):
    moved = shutil.copytree(embedded_dir, tmp_path / "moved")
    loop.train_and_evaluate(dataclasses.replace(config, data_dir=str(moved)), run)
    run.result.unlink()
    document = json.loads(run.data.read_text())
    document["split train"]["images"] -= 1
    run.data.write_text(json.dumps(document))
    message = "data set digits has changed since .*split train was .*, is "
    with pytest.raises(EtfzooError, match=message):
        loop.train_and_evaluate(config, run)
    assert json.loads(run.data.read_text()) == document


def test_a_run_of_an_earlier_version_gets_its_identity(run, config, trained):
    forget(run)
    assert loop.train_and_evaluate(config, run) == trained.read_result()
    assert len(read(run)["run"]) == 32 and run.data.exists()


def test_fingerprints_of_folders(tmp_path):
    def fingerprint():
        return resolve(f"folder:{photos}", None).fingerprint()

    photos = make_image_folder(tmp_path / "photos", {"a": 12, "b": 12})
    before = fingerprint()
    photos = photos.rename(tmp_path / "moved")
    assert fingerprint() == before
    (photos / "a/000.png").rename(photos / "a/zzz.png")
    renamed = fingerprint()
    assert renamed != before and renamed["classes"] == before["classes"]
    (photos / "b").rename(photos / "c")
    assert identity._changes(before, fingerprint())[0] == 'classes was ["a", "b"], is ["a", "c"]'


def test_a_setting_that_is_new_changes_no_hash():
    plain = TrainConfig("digits", head="linear")
    # By hand: of the settings that are no defaults.
    values = json.dumps({"dataset": "digits", "head": "linear"}).encode()
    assert identity.settings_hash(plain) == hashlib.sha256(values).hexdigest()[:32]
    off = dataclasses.replace(plain, projector_layers=0, projector_width=None)
    on = dataclasses.replace(plain, projector_layers=1)
    assert identity.settings_hash(off) == identity.settings_hash(plain)
    assert identity.settings_hash(on) != identity.settings_hash(plain)
