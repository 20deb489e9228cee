"""Every kind of damaged or hostile model is refused in one line; benchmarks/hostile.py has more."""

import random

import pytest

import etfzoo
import mutations
import server as http
from etfzoo import download
from testing import randomize


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A version and one of another network; and a server of the folder `site` beside them."""
    root = tmp_path_factory.mktemp("hostile")
    for name, classes in (("model", 5), ("other", 7)):
        model = etfzoo.build_classifier("rn18", classes, input_shape=(32, 32, 3))
        etfzoo.publish(randomize(model, seed=classes, fixed=True), root / name)
    with http.serve(root / "world/site") as server:
        yield root / "world", root / "model/1", root / "other/1", server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(download, "WAITS", (0.01,))
    for name in ("ETFZOO_HOME", "ETFZOO_INDEX"):
        monkeypatch.setenv(name, "")  # so that it is set back
    monkeypatch.setenv("ETFZOO_TIMEOUT", "5")
    monkeypatch.delenv("ETFZOO_OFFLINE", raising=False)


@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_refused(models, name):
    world = mutations.World(*models)
    where, mutate = mutations.MUTATIONS[name]
    what = mutate(random.Random(f"test {name}"), world)
    faults, message = mutations.refusal(world, where)
    assert not faults, (what, faults, message)


@pytest.mark.parametrize("where", ["folder", "address", "pinned", "index"])
def test_what_is_not_mutated_loads(models, where, monkeypatch):
    """So that the refusals above are no accident of the set-up."""
    world = mutations.World(*models)
    monkeypatch.setenv("ETFZOO_HOME", str(world.root / "cache"))
    monkeypatch.setenv("ETFZOO_INDEX", str(world.root / "index.json"))
    assert etfzoo.load(world.handle(where)).spec.num_classes == 5
