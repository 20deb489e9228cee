"""Tests of folders of images and TFDS data sets as sources."""

import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from etfzoo.data import shapes, sources
from etfzoo.data.readable import readable
from etfzoo.errors import EtfzooError
from testing import make_image_folder

ROLES = ("train", "fit", "select", "test")
FIELDS = {"image", "label", "key", "record"}


def resolve_folder(root):
    return sources.resolve(f"folder:{root}")


def names(source, split):
    """Record names in file order."""
    return [r["record"].numpy().decode() for r in source.records(split)]


def columns(source, split, shuffle_seed=None):
    records = list(source.records(split, shuffle_seed).as_numpy_iterator())
    # Sources held in memory say where in the split a record stands, too.
    assert all(r.keys() - {"index"} == FIELDS for r in records)
    return {k: np.array([r[k] for r in records], object) for k in records[0]}


def members(source):
    return {role: set(names(source, role)) for role in ROLES}


def one_line(error):
    return "\n" not in str(error.value)


# -------------------------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("flat"), {"b": 20, "a": 40, "c": 10})


def test_flat_folder(flat):
    source = resolve_folder(flat)
    assert source.class_names == ("a", "b", "c") and source.num_classes == 3
    parts = members(source)
    files = {p.relative_to(flat).as_posix() for p in flat.rglob("*.png")}
    assert parts["train"] | parts["test"] == files and not parts["train"] & parts["test"]
    assert parts["fit"] | parts["select"] == parts["train"] and not parts["fit"] & parts["select"]
    # Stratified: a fifth to test, a tenth of the rest to select, class by class.
    for role, wanted in {"test": (8, 4, 2), "select": (3, 2, 1), "fit": (29, 14, 7)}.items():
        counts = np.bincount(columns(source, role)["label"].astype(int)).tolist()
        assert tuple(counts) == wanted, role
        assert source.size(role) == sum(wanted)


def test_records_of_a_folder(flat):
    source = resolve_folder(flat)
    for role in ROLES:
        data = columns(source, role)
        assert names(source, role) == sorted(names(source, role))
        for name, label, image in zip(data["record"], data["label"], data["image"], strict=True):
            assert source.class_names[label] == name.decode().split("/")[0]
            assert image == (flat / name.decode()).read_bytes()


def test_splits_are_fixed_and_no_image_changes_side(flat, tmp_path):
    before = members(resolve_folder(flat))
    assert members(resolve_folder(flat)) == before
    moved = tmp_path / "elsewhere"
    shutil.copytree(flat, moved)
    assert members(resolve_folder(moved)) == before
    make_image_folder(moved, {"b": 37, "new": 25})
    after = members(resolve_folder(moved))
    for role in ROLES:
        old, new = ({n for n in part[role] if n[0] in "ac"} for part in (before, after))
        assert old == new, role


def test_held_out_images_are_no_run_of_names(flat):
    # Numbered files come in the order of their making: a test split must not be a tail of it.
    numbers = sorted(int(n[-7:-4]) for n in names(resolve_folder(flat), "test") if n[0] == "a")
    assert max(np.diff(numbers)) > 1 and numbers[0] < 20 <= numbers[-1]


LAYOUTS = {
    ("train",): {"test": 4, "train": 16, "fit": 14, "select": 2},
    ("train", "val"): {"test": 6, "train": 20, "fit": 18, "select": 2},
    ("train", "validation"): {"test": 6, "train": 20, "fit": 18, "select": 2},
    ("train", "valid"): {"test": 6, "train": 20, "fit": 18, "select": 2},
    ("train", "test"): {"test": 6, "train": 20, "fit": 18, "select": 2},
    ("train", "val", "test"): {"test": 6, "train": 20, "fit": 20, "select": 6},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    for split in layout:
        count = 10 if split == "train" else 3
        make_image_folder(tmp_path / split, {"a": count, "b": count})
    source = resolve_folder(tmp_path)
    parts = members(source)
    assert {role: len(part) for role, part in parts.items()} == LAYOUTS[layout]
    assert not parts["train"] & parts["test"] and not parts["fit"] & parts["select"]
    assert not parts["select"] & parts["test"] and parts["fit"] <= parts["train"]
    if len(layout) > 1:
        assert {n.split("/")[0] for n in parts["train"]} == {"train"}
        assert {n.split("/")[0] for n in parts["test"]} == {layout[-1]}


def test_a_class_may_lack_test_images(tmp_path):
    make_image_folder(tmp_path / "train", {"a": 4, "b": 4})
    make_image_folder(tmp_path / "test", {"b": 3})
    data = columns(resolve_folder(tmp_path), "test")
    assert data["label"].tolist() == [1, 1, 1]


def test_subfolders_and_suffixes(tmp_path):
    make_image_folder(tmp_path / "a", {"x": 2, "y/z": 2}, suffix=".PNG")
    make_image_folder(tmp_path, {"b": 2}, suffix=".jpg")
    make_image_folder(tmp_path, {"b": 1}, suffix=".JPEG")
    make_image_folder(tmp_path, {"b": 1}, suffix=".bmp")
    make_image_folder(tmp_path, {"b": 1}, suffix=".GIF")
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    (tmp_path / "b" / "folder.png").mkdir()
    (tmp_path / "README.png").write_bytes(b"outside of every class")
    source = resolve_folder(tmp_path)
    assert source.class_names == ("a", "b")
    assert set(names(source, "train")) | set(names(source, "test")) == {
        *("a/x/000.PNG", "a/x/001.PNG", "a/y/z/000.PNG", "a/y/z/001.PNG"),
        *("b/000.jpg", "b/001.jpg", "b/000.JPEG", "b/000.bmp", "b/000.GIF"),
    }


def test_hidden_folders_are_no_classes(tmp_path):
    make_image_folder(tmp_path, {"a": 3, "b": 3, ".thumbnails": 3})
    assert resolve_folder(tmp_path).class_names == ("a", "b")


def test_hidden_files_are_no_images(tmp_path):
    # What macOS and Jupyter leave behind carries the suffix of an image.
    make_image_folder(tmp_path, {"a": 3, "b": 3, "a/.ipynb_checkpoints": 1})
    (tmp_path / "b" / "._000.png").write_bytes(b"AppleDouble")
    parts = members(resolve_folder(tmp_path))
    assert not [n for part in parts.values() for n in part if "/." in n]


def test_names_with_spaces_and_accents(tmp_path):
    make_image_folder(tmp_path, {"été 1": 3, "c*[x]": 3})
    source = resolve_folder(tmp_path)
    assert source.class_names == ("c*[x]", "été 1")
    assert len(columns(source, "train")["image"]) == 4


def test_home_folder(tmp_path, monkeypatch):
    make_image_folder(tmp_path / "pictures", {"a": 3, "b": 3})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_folder("~/pictures").num_classes == 2


def test_the_only_image_of_a_class_is_for_training(tmp_path):
    make_image_folder(tmp_path, {"a": 1, "b": 10, "c": 2})
    source = resolve_folder(tmp_path)
    counts = {
        role: np.bincount(columns(source, role)["label"].astype(int), minlength=3).tolist()
        for role in ROLES
    }
    assert counts == {"train": [1, 8, 1], "test": [0, 2, 1], "fit": [1, 7, 1], "select": [0, 1, 0]}


def test_a_folder_with_nothing_to_hold_out(tmp_path):
    make_image_folder(tmp_path, {"a": 1, "b": 1})
    with pytest.raises(EtfzooError):
        names(resolve_folder(tmp_path), "test")


def no_folder(root):
    return "missing"


def empty_folder(root):
    pass


def only_loose_files(root):
    make_image_folder(root, {"": 4})


def one_class(root):
    make_image_folder(root, {"a": 4})


def empty_class(root):
    make_image_folder(root, {"a": 4, "b": 4})
    (root / "empty").mkdir()


def empty_training_class(root):
    make_image_folder(root / "train", {"a": 4, "b": 4})
    (root / "train" / "c").mkdir()
    make_image_folder(root / "test", {"a": 4, "b": 4, "c": 4})


def class_only_in_test(root):
    make_image_folder(root / "train", {"a": 4, "b": 4})
    make_image_folder(root / "test", {"a": 4, "z": 4})


def empty_test(root):
    make_image_folder(root / "train", {"a": 4, "b": 4})
    (root / "test").mkdir()


@pytest.mark.parametrize(
    "prepare, message",
    [
        (no_folder, "image folder .*missing does not exist"),
        (empty_folder, r"no images in .* \(train\): expected one subfolder a class"),
        (only_loose_files, r"no images in .* \(train\): expected one subfolder a class"),
        (one_class, "needs at least two class folders.*found 1"),
        (empty_class, "each with training images; found 3, empty: empty"),
        (empty_training_class, "each with training images; found 3, empty: c"),
        (class_only_in_test, "test split of .* has class folders that the training split lacks: z"),
        (empty_test, r"no images in .* \(test\)"),
    ],
)
def test_folders_that_cannot_be_used(prepare, message, tmp_path):
    with pytest.raises(EtfzooError, match=message) as error:
        resolve_folder(tmp_path / (prepare(tmp_path) or ""))
    assert one_line(error)


def test_several_splits_of_a_folder(flat):
    flat = resolve_folder(flat)
    parts = {split: names(flat, split) for split in ("train", "test", "fit", "select")}
    assert names(flat, "train+test") == parts["train"] + parts["test"]
    assert flat.size("all") == len(set(parts["train"] + parts["test"])) > len(parts["train"])
    assert sorted(names(flat, "all")) == sorted(names(flat, "test+train"))
    assert names(flat, "train+fit") == parts["train"]  # each image once
    for split in ("", "train+", "+", "train+nope", "all+test"):
        with pytest.raises(EtfzooError, match="no split '.*'; it has: train, test, .* all or sev"):
            flat.size(split)


def test_unknown_split_of_a_folder(flat):
    source = resolve_folder(flat)
    for call in (source.size, source.records):
        with pytest.raises(EtfzooError, match="no split 'validation'; it has: train, test, fit"):
            call("validation")


def check_order(source, split, correlation=None):
    """A seed's order is a permutation of the file order, always the same, of its own."""
    in_order = columns(source, split)
    shuffled, again, other = (columns(source, split, seed) for seed in (5, 5, 6))
    for key in ("record", "label", "key", "image"):
        assert (shuffled[key] == again[key]).all()
    assert sorted(shuffled["record"]) == sorted(in_order["record"])
    where = {record: i for i, record in enumerate(in_order["record"])}
    for data in (shuffled, other):
        places = [where[record] for record in data["record"]]
        for key in ("label", "key", "image"):
            assert (data[key] == in_order[key][places]).all()
        # Evenly mixed: no correlation with the file order beyond five standard deviations.
        limit = correlation or 5 / np.sqrt(len(places))
        assert abs(np.corrcoef(places, range(len(places)))[0, 1]) < limit
    assert (shuffled["record"] != other["record"]).mean() > 0.9


def test_order_of_a_folder(flat):
    check_order(resolve_folder(flat), "train")


def test_keys_of_a_folder(flat, tmp_path):
    source = resolve_folder(flat)
    keys = {
        record: key
        for split in ("train", "test")
        for record, key in zip(*(columns(source, split)[k] for k in ("record", "key")), strict=True)
    }
    assert len(set(keys.values())) == len(keys) == 70
    assert all(0 <= key < 2**31 for key in keys.values())
    # An image keeps its key when others come.
    copy = tmp_path / "copy"
    shutil.copytree(flat, copy)
    make_image_folder(copy, {"0": 9})
    data = columns(resolve_folder(copy), "train")
    after = dict(zip(data["record"], data["key"], strict=True))
    assert all(after[record] == key for record, key in keys.items() if record in after)
    assert len(after.keys() & keys.keys()) == 56


# ----------------------------------------------------------------------------------------- TFDS


@pytest.fixture(scope="module")
def digits(embedded_dir):
    return sources.resolve("digits", str(embedded_dir))


def test_tfds_source(digits, embedded_dir):
    assert digits.class_names == tuple("0123456789") and digits.num_classes == 10
    assert [digits.size(role) for role in ROLES] == [200, 200, 300, 1297]
    assert digits.size("train+validation") == 500 and digits.size("test[:10]") == 10
    data = columns(digits, "select")
    builder = tfds.builder("digits", data_dir=embedded_dir)
    read = tfds.ReadConfig(interleave_cycle_length=1)
    wanted = list(tfds.as_numpy(builder.as_dataset(split="validation", read_config=read)))
    assert data["label"].tolist() == [example["label"] for example in wanted]
    for image, example in zip(data["image"][:20], wanted, strict=False):
        np.testing.assert_array_equal(decode_png(image), example["image"])


def decode_png(encoded):
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(encoded)))


def test_splits_of_tfds_are_disjoint(digits):
    parts = members(digits)
    assert parts["train"] == parts["fit"]
    for one, other in (("train", "test"), ("train", "select"), ("select", "test")):
        assert not parts[one] & parts[other]
    halves = [set(names(digits, split)) for split in ("train[:30%]", "train[30%:]")]
    assert not halves[0] & halves[1] and halves[0] | halves[1] == parts["train"]


def test_keys_of_tfds(digits, embedded_dir):
    data = columns(digits, "train+validation+test")
    keys = dict(zip(data["record"], data["key"], strict=True))
    assert len(set(keys.values())) == len(keys) == 1797
    assert all(0 <= key < 2**31 for key in keys.values())
    # Whatever the split expression, the order and the process' state.
    part = columns(sources.resolve("digits", str(embedded_dir)), "test[100:200]", 3)
    assert len(part["key"]) == 100
    assert all(keys[r] == k for r, k in zip(part["record"], part["key"], strict=True))


def test_order_of_tfds_in_memory(digits):
    check_order(digits, "train")


def test_streaming(digits, embedded_dir, monkeypatch):
    wanted = columns(digits, "select")
    monkeypatch.setattr("etfzoo.data.tfds_source.MEMORY_BYTES", 0)
    streamed = sources.resolve("digits", str(embedded_dir))
    data = columns(streamed, "select")
    assert streamed.memory == {} and digits.memory
    for key in FIELDS:
        assert (data[key] == wanted[key]).all()
    # A buffer of one shuffles nothing; the order must still be a fixed permutation.
    shuffled, again = (columns(streamed, "select", 5) for _ in range(2))
    assert (shuffled["record"] == again["record"]).all()
    assert sorted(shuffled["record"]) == sorted(data["record"])


def test_streaming_shuffles_through_a_buffer(digits, embedded_dir, monkeypatch):
    # Small enough to stream, large enough for a buffer of about half the examples.
    wanted = columns(digits, "test")
    monkeypatch.setattr("etfzoo.data.tfds_source.MEMORY_BYTES", digits._bytes("test") // 2)
    streamed = sources.resolve("digits", str(embedded_dir))
    assert streamed.size("test") == 1297
    # One file through half a shuffle: later examples cannot come first.
    check_order(streamed, "test", correlation=0.6)
    assert streamed.memory == {}
    assert sorted(columns(streamed, "test", 5)["record"]) == sorted(wanted["record"])


def counted(source, split):
    found = source.class_counts(split)
    assert found.dtype == np.int64 and found.sum() == source.size(split)
    labels = columns(source, split)["label"].tolist()
    assert found.tolist() == [labels.count(label) for label in range(source.num_classes)]
    return found


def test_examples_of_each_class(digits, embedded_dir, flat, monkeypatch):
    whole = counted(digits, "train")
    assert (whole == counted(digits, "train[:45%]") + counted(digits, "train[45%:]")).all()
    assert 0 in counted(digits, "train[:5%]")  # one that is not there is counted, too
    assert len(set(counted(resolve_folder(flat), "train"))) > 1
    with pytest.raises(EtfzooError, match="has no split"):
        digits.class_counts("nope")
    monkeypatch.setattr("etfzoo.data.tfds_source.MEMORY_BYTES", 0)
    streamed = sources.resolve("digits", str(embedded_dir))
    assert (streamed.class_counts("train") == whole).all() and streamed.memory == {}


def test_counting_classes_decodes_nothing_and_leaves_out_what_is_left_out(tmp_path):
    root = make_image_folder(tmp_path, {"a": 9, "b": 30})
    source = resolve_folder(root)
    broken = next(name for name in names(source, "train") if name.startswith("b/"))
    (root / broken).write_bytes(b"no image")
    before = counted(source, "train")
    assert (before - readable(source).class_counts("train")).tolist() == [0, 1]


@pytest.mark.parametrize("split", ["nope", "train[:90%", "val", "trainx"])
def test_unknown_split_of_tfds(digits, split):
    for call in (digits.size, digits.records):
        with pytest.raises(EtfzooError, match="has no split .*; it has: train, validation, test"):
            call(split)


@pytest.mark.parametrize(
    "name, message",
    [
        ("digitz", "unknown data set 'digitz'; did you mean digits"),
        ("cifar", "unknown data set 'cifar'; did you mean cifar10 or cifar100"),
        ("qqqq", "unknown data set 'qqqq'; known: .*cifar10"),
    ],
)
def test_unknown_data_set(name, message, embedded_dir):
    for data_dir in (None, str(embedded_dir)):
        with pytest.raises(EtfzooError, match=message) as error:
            sources.resolve(name, data_dir)
        assert one_line(error)


def test_missing_data_directory(tmp_path):
    with pytest.raises(EtfzooError, match="nowhere does not exist; check `data_dir`"):
        sources.resolve("digits", str(tmp_path / "nowhere"))


def test_embedded_data_sets_are_prepared_on_the_spot(tmp_path):
    source = sources.resolve("shapes/outlines", str(tmp_path))
    assert [source.size(role) for role in ROLES] == [300, 300, 100, 500]
    assert source.class_names[0] == "kite"
    # Nothing but what was asked for.
    assert {p.parent.parent.name for p in tmp_path.rglob("*.tfrecord*")} == {"outlines"}


def test_imagenet_has_to_be_fetched_by_hand(tmp_path):
    with pytest.raises(EtfzooError) as error:
        sources.resolve("imagenet2012", str(tmp_path))
    message = str(error.value)
    assert one_line(error) and f"not prepared under {tmp_path}" in message
    assert "ILSVRC2012_img_train.tar" in message and "tfds build imagenet2012" in message


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, embedded_dir):
    """A data directory with a prepared data set whose code TFDS does not know."""
    root = tmp_path_factory.mktemp("foreign")
    shutil.copytree(embedded_dir / "digits", root / "scans")
    return root


def test_prepared_folder_without_code(foreign, digits, monkeypatch, tmp_path):
    versioned, elsewhere = foreign / "scans" / "1.0.0", tmp_path
    monkeypatch.chdir(foreign)
    for name, data_dir in (
        ("scans", str(foreign)),
        ("scans/1.0.0", str(foreign)),
        (str(versioned), None),
        (str(versioned), str(foreign)),
        ("scans/1.0.0", None),
        ("scans/1.0.0", str(elsewhere)),  # a path from the current folder
    ):
        source = sources.resolve(name, data_dir)
        assert source.name == name and source.class_names == digits.class_names
        assert [source.size(role) for role in ROLES] == [200, 200, 300, 1297]
        assert names(source, "train[:5]") == names(digits, "train[:5]")


def test_path_of_a_prepared_folder_without_its_version(foreign):
    assert sources.resolve(str(foreign / "scans")).num_classes == 10


def write_data_set(root, features, splits, disable_shuffling=False, shards=1):
    """Writes a data set that has no row and no code: 20 blank images a split."""
    blank = {"image": np.zeros((20, 4, 4, 3), np.uint8), "label": np.zeros(20, np.int64)}
    examples = tf.data.Dataset.from_tensor_slices({key: blank[key] for key in features})
    tfds.dataset_builders.store_as_tfds_dataset(
        name="made",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets=dict.fromkeys(splits, examples),
        data_dir=root,
        disable_shuffling=disable_shuffling,
        download_config=tfds.download.DownloadConfig(num_shards=shards),
    )


IMAGE, LABEL = tfds.features.Image(shape=(4, 4, 3)), tfds.features.ClassLabel(num_classes=3)


def test_streaming_shuffles_the_files(tmp_path, monkeypatch):
    write_data_set(tmp_path, {"image": IMAGE, "label": LABEL}, ("train", "test"), shards=5)
    assert len(list((tmp_path / "made" / "1.0.0").glob("made-train.tfrecord*"))) == 5
    wanted = columns(sources.resolve("made", str(tmp_path)), "train")
    monkeypatch.setattr("etfzoo.data.tfds_source.MEMORY_BYTES", 0)
    streamed = sources.resolve("made", str(tmp_path))
    # File order is one file after the other, streamed or not.
    in_order = columns(streamed, "train")["record"]
    assert (in_order == wanted["record"]).all() and (in_order == sorted(in_order)).all()
    # With a buffer of one, only the order of the files is left to shuffle.
    orders = []
    for seed in range(4):
        order = columns(streamed, "train", seed)["record"]
        assert (order == columns(streamed, "train", seed)["record"]).all()
        assert sorted(order) == sorted(in_order)
        orders.append(tuple(order))
    assert len(set(orders)) == 4 and streamed.memory == {}


@pytest.mark.parametrize(
    "splits, roles",
    [
        (("train",), ("train[:80%]", "train[:70%]", "train[70%:80%]", "train[80%:]")),
        (("train", "test"), ("train", "train[:90%]", "train[90%:]", "test")),
        (("train", "validation"), ("train", "train[:90%]", "train[90%:]", "validation")),
        (("train", "validation", "test"), ("train", "train", "validation", "test")),
    ],
)
def test_roles_are_derived_from_the_splits(splits, roles, tmp_path):
    write_data_set(tmp_path, {"image": IMAGE, "label": LABEL}, splits)
    source = sources.resolve("made", str(tmp_path))
    assert tuple(source.split(role) for role in ROLES) == roles
    assert source.class_names == ("0", "1", "2")
    assert all(source.size(role) == len(names(source, role)) > 0 for role in ROLES)
    assert source.split("train[:5]") == "train[:5]"


@pytest.mark.parametrize(
    "features, splits, message",
    [
        ({"image": IMAGE}, ("train",), "no class label feature"),
        ({"label": LABEL}, ("train",), "no image feature"),
        ({"image": IMAGE, "label": LABEL}, ("test",), "no train split; it has: test"),
    ],
)
def test_data_sets_for_something_else(features, splits, message, tmp_path):
    write_data_set(tmp_path, features, splits)
    with pytest.raises(EtfzooError, match=message):
        sources.resolve("made", str(tmp_path))


def test_a_data_set_in_order_of_its_classes_is_not_sliced(tmp_path):
    write_data_set(tmp_path, {"image": IMAGE, "label": LABEL}, ("train",), disable_shuffling=True)
    with pytest.raises(EtfzooError, match="written without shuffling"):
        sources.resolve("made", str(tmp_path))


def test_prepare_is_what_resolve_reads(digits):
    # The embedded names are exactly the ones that the builders know.
    assert set(shapes.EMBEDDED) == {"digits"} | {
        f"shapes/{config.name}" for config in shapes.Shapes.BUILDER_CONFIGS
    }
