"""A network of keras.applications by the recipes, from its pretraining to the C++ loader."""

import io

import numpy as np
import pytest
from PIL import Image

import etfzoo
from c_api import Loader
from etfzoo.models import checkpoint
from etfzoo.zoo import index
from testing import assert_close, last_checkpoint, random_pixels, run_recipe

COMMON = ("--dataset=digits", "--protocol=quickstart", "--image_size=32", "--batch_size=64")


@pytest.mark.slow
def test_from_pretraining_to_serving(embedded_dir, tmp_path, monkeypatch):
    name = "EfficientNetB0"
    data, run, short = f"--data_dir={embedded_dir}", tmp_path / "run", name.lower()
    begin = ("pretrain", *COMMON, data, f"--backbone=keras:{name}", f"--workdir={run}")
    begin = (*begin, "--epochs=2", "--eval_every=2", "--keep_checkpoints=9", "--checkpoint_every=1")
    run_recipe(*begin)
    arrays, state = last_checkpoint(run)
    assert [v[1] for k, v in arrays.items() if "seed_" in k] == [6] * 9  # a draw a step
    (run / "result.json").unlink()
    for path in checkpoint.CheckpointManager(run).paths()[:3]:
        path.unlink()
    run_recipe(*begin)
    resumed, again = last_checkpoint(run)
    assert again == state and resumed.keys() == arrays.keys()
    assert all(np.array_equal(resumed[path], array) for path, array in arrays.items())

    tuned = tmp_path / "tuned"
    flags = (f"--model={run}", f"--workdir={tuned}", "--epochs=1")
    assert "top-1" in run_recipe("finetune", *COMMON, data, *flags)
    listing = tmp_path / "index.json"
    flags = (f"--models_dir={tmp_path}", f"--index={listing}", "--licence=CC0-1.0")
    run_recipe("publish", f"--workdir={tuned}", f"--name={short}_linear.digits", *flags)
    assert f"{short}_linear.digits" in index.load(listing).models
    folder = tmp_path / f"{short}_linear.digits" / "1"
    monkeypatch.setenv("ETFZOO_INDEX", str(listing))
    assert etfzoo.info(folder)["spec"]["backbone"] == f"keras:{name}"

    model, images = etfzoo.load(folder), random_pixels(3)
    content = io.BytesIO()
    Image.fromarray(images[0].astype("uint8")).save(content, "PNG")
    with Loader(folder) as served:
        assert_close(served.run("serving_default", images=images)["logits"], model(images), 1e-4)
        assert set(served.run("features", images=images)) == {"features", "map"}
        answer = served.run("serving_bytes", image_bytes=np.array([content.getvalue()], object))
    wanted = np.asarray(model(images[:1].astype("uint8").astype("float32")))[0]
    assert answer["class_ids"][0][0] == wanted.argmax()
