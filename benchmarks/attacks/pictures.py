"""Images, data sets of images, and requests with images."""

import io
import json
import os
import shutil
import struct
import sys
import time
import zlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence  # noqa: F401 (the second registers what saves animations)

from attacks import core, hosts

SIDE = 32
FORMATS = ["JPEG"] * 4 + ["PNG"] * 4 + ["BMP"] * 2 + ["GIF"] * 2 + ["WEBP", "TIFF", "PPM"]
HEADERS = {"JPEG": (160, 30), "PNG": (33, 8), "BMP": (54, 2), "GIF": (13, 6), "WEBP": (30, 12)}


def encoded(rng, formats=FORMATS):
    """An image in some format, its name, and its pixels as Pillow reads them."""
    import testing

    height, width = rng.choice([1, 2, 7, 16, 33, 64, 200]), rng.choice([1, 2, 7, 16, 33, 64, 200])
    image = Image.fromarray(testing.smooth_image(height, width, rng.randrange(1000)))
    kind = rng.choice(formats)
    modes = {
        "JPEG": ["RGB", "RGB", "L", "CMYK"],
        "PNG": ["RGB", "L", "1", "P", "RGBA", "LA", "I;16"],
        "BMP": ["RGB", "L", "P", "1"],
        "GIF": ["P", "L"],
    }
    mode = rng.choice(modes.get(kind, ["RGB"]))
    image = image.convert("I;16" if mode == "I;16" else mode)
    options = {}
    if kind == "JPEG":
        options = {"progressive": rng.random() < 0.4, "quality": rng.randint(1, 100)}
        options |= {"restart_marker_blocks": rng.choice([0, 1, 5])}
        options |= {} if mode == "L" else {"subsampling": rng.choice([0, 1, 2])}
    if kind == "GIF" and rng.random() < 0.4:
        options = {"save_all": True, "append_images": [image.rotate(90), image], "loop": 0}
    if kind == "PNG" and rng.random() < 0.3:
        options = {"transparency": 0} if mode in ("L", "P") else {"compress_level": 0}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    content = buffer.getvalue()
    return kind, f"{kind} {mode} {height}x{width}", content, np.asarray(_read(content))


def _read(content):
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def lying(rng, kind, content):
    """The image with a header that is not its own, or otherwise damaged; and what it is."""
    import testing

    sides = [0, 1, 5, 100, 9000, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1]
    what = rng.choice(
        ["sides", "sides", "header", "header", "damage", "polyglot", "scans", "chunk"]
    )
    if what == "sides" and kind in ("JPEG", "PNG", "BMP", "GIF"):
        height, width = rng.choice(sides), rng.choice(sides)
        if kind in ("JPEG", "PNG"):
            most = 2**16 - 1 if kind == "JPEG" else 2**32 - 1
            return testing.claiming(
                content, min(height, most), min(width, most)
            ), f"claims {height}x{width}"
        if kind == "BMP":
            packed = struct.pack("<II", width, rng.choice([height, 2**32 - 1 - height]))
            return content[:18] + packed + content[26:], f"claims {height}x{width}"
        packed = struct.pack("<HH", width % 2**16, height % 2**16)
        return content[:6] + packed + content[10:], f"claims {height}x{width}"
    if what == "header":
        most, start = HEADERS.get(kind, (16, 0))
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 3, 10])):
            at = rng.randrange(start, min(most, len(changed)))
            changed[at] = rng.choice([0, 1, 255, 127, 128, rng.randrange(256)])
        return bytes(changed), "a changed header"
    if what == "polyglot":
        _, name, other, _ = encoded(rng)
        return rng.choice(
            [content + other, other[:20] + content, content[:20] + other]
        ), f"with {name}"
    if what == "scans" and kind == "JPEG":
        at = content.rfind(b"\xff\xda")
        return content[:at] + content[at:-2] * rng.choice([2, 100, 3000]) + content[
            -2:
        ], "many scans"
    if what == "chunk" and kind == "PNG":
        name = rng.choice([b"IDAT", b"IHDR", b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"acTL", b"IEND"])
        body = rng.choice([b"", rng.randbytes(40), b"x\0\0" + zlib.compress(bytes(10**7))])
        chunk = (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )
        return content[:33] + chunk * rng.choice([1, 2, 500]) + content[
            33:
        ], f"more {name.decode()}"
    return hosts.damaged(rng, content)


def _model(root):
    import etfzoo
    import testing

    model = testing.make_classifier(input_shape=(SIDE, SIDE, 3))
    return model, etfzoo.publish(model, root / "rn18_etf.x")


@core.group("images", 34)
def images(root):
    """All readers agree about an image: they refuse it, or read the same pixels."""
    import tensorflow as tf

    import etfzoo
    import testing
    from etfzoo.data import decoding, sources
    from etfzoo.data.pipeline import evaluation_pipeline

    with ExitStack() as stack:
        stack.enter_context(testing.small_rn18())
        model, folder = _model(root)
        serve = tf.saved_model.load(folder).signatures["serving_bytes"]
        photos = testing.make_image_folder(root / "photos", dict.fromkeys(testing.CLASS_NAMES, 4))

        def make(one):
            kind, name, content, truth = encoded(one.rng)
            mended = one.number % 4 == 0
            if not mended:
                content, how = lying(one.rng, kind, content)
                name += f", {how}"
            suffix = one.rng.choice([f".{kind.lower()}", ".jpg", ".png", ".gif", ".bmp"])
            data = Path(shutil.copytree(photos, one.place / "photos"))
            path = data / "ant" / f"new{suffix}"
            path.write_bytes(content)
            one.what, answers, start = f"{name} as {suffix}", {}, time.process_time()

            def ask(reader, call):
                try:
                    answers[reader] = call()
                except (etfzoo.EtfzooError, core.Refused) as error:
                    if path.name not in str(error):
                        raise core.Silent(f"{reader} does not name the file: {error}") from None
                    answers[reader] = str(error)
                except tf.errors.InvalidArgumentError as error:
                    answers[reader] = str(error)

            ask("preprocess", lambda: etfzoo.preprocess(model, str(path))[0])
            ask("decode", lambda: decoding.decode(content).numpy())
            listed = suffix in decoding.SUFFIXES
            if listed:

                def evaluated():
                    source = sources.resolve(f"folder:{data}")
                    pipeline = evaluation_pipeline(model.spec, source, 8)
                    names = [
                        r["record"].decode() for r in source.records("all").as_numpy_iterator()
                    ]
                    with pipeline.naming_corrupt_records("all"):
                        batches = list(pipeline.evaluation("all"))
                    pixels = np.concatenate([np.asarray(x) for x, _ in batches])
                    (place,) = [i for i, n in enumerate(names) if n.endswith(path.name)]
                    return pixels[place].astype("float32")

                ask("evaluation", evaluated)
                ask("predict", lambda: core.command("predict", f"--model={folder}", path) and None)
            if kind in ("JPEG", "PNG"):
                ask("serving", lambda: serve(tf.constant([content]))["scores"].numpy()[0])
            seconds = time.process_time() - start
            return _agree(model, answers, truth if mended else None, name, seconds)

        yield make


def _agree(model, answers, truth, name, seconds):
    # It reads the whole image, and the readers of users what evaluation keeps of it.
    found = answers.pop("decode")
    refused = {reader for reader, answer in answers.items() if isinstance(answer, str)}
    if seconds > 20:
        raise core.Silent(f"{seconds:.0f} s of CPU")
    if refused:
        if refused != set(answers):
            raise core.Silent(f"refused by {sorted(refused)} alone of {sorted(answers)}: {answers}")
        raise core.Refused(answers["preprocess"])
    if "evaluation" in answers and not np.array_equal(answers["preprocess"], answers["evaluation"]):
        raise core.Silent("evaluation sees other pixels than preprocess")
    if "serving" in answers:
        import tensorflow as tf

        logits = model(answers["preprocess"][None].astype("float32"))
        wanted = np.sort(tf.nn.softmax(logits).numpy()[0])[::-1][: len(answers["serving"])]
        if np.abs(wanted - answers["serving"]).max() > 1e-3:
            raise core.Silent("serving sees other pixels than preprocess")
    text = f"{', '.join(answers)} see the same pixels"
    # Pillow lays nothing behind transparent pixels either, but scales 16 bits and CMYK otherwise.
    if truth is None or any(mode in name for mode in ("CMYK", "I;16", "RGBA", "LA", " P ")):
        return text
    if (
        isinstance(found, str)
        or found.shape != truth.shape
        or np.abs(found.astype(int) - truth).max() > 4
    ):
        raise core.Silent("Pillow sees others")
    return f"{text}, which are Pillow's"


# --------------------------------------------------------------------------------------- TFDS


def _data_set(root):
    """A prepared data set of 12 images in 3 classes, which no code knows."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    import testing

    label = tfds.features.ClassLabel(names=["ant", "bee", "cat"])
    image = tfds.features.Image(shape=(None, None, 3))
    columns = {
        "image": np.stack([testing.smooth_image(6, 8, seed=i) for i in range(12)]),
        "label": np.arange(12) % 3,
    }
    examples = tf.data.Dataset.from_tensor_slices(columns)
    tfds.dataset_builders.store_as_tfds_dataset(
        name="made",
        version="1.0.0",
        features=tfds.features.FeaturesDict({"image": image, "label": label}),
        split_datasets={"train": examples, "test": examples},
        data_dir=root,
    )
    return root / "made" / "1.0.0"


def _read_all(folder):
    """Images and labels of all splits, as training and evaluation read them."""
    from etfzoo.data import sources
    from etfzoo.data.augmentation import Augmentation
    from etfzoo.data.pipeline import Pipeline

    source = sources.resolve(str(folder))
    found = {}
    for split in ("train", "test"):
        pipeline = Pipeline(source, 8, 8, 1.0, 4, Augmentation("none"), 0)
        with pipeline.naming_corrupt_records(split):
            batches = list(pipeline.evaluation(split))
        found[split] = [np.concatenate([np.asarray(b[i]) for b in batches]) for i in (0, 1)]
        if len(found[split][1]) != source.size(split):
            raise core.Silent(f"{len(found[split][1])} of {source.size(split)} images were read")
        if not all(0 <= label < source.num_classes for label in found[split][1]):
            raise core.Silent("a label is no class")
    return found, source.class_names


@core.group("tfds", 33)
def data_sets(root):
    """A prepared data set with a changed file: it is read as it was, or named; nothing runs."""
    from attacks.settings import text

    made = _data_set(root)
    truth, names = _read_all(made)
    (root / "planted.py").write_text(f"open({str(root / 'ran')!r}, 'w')\n")
    sys.path.append(str(root))
    files = [path.name for path in sorted(made.iterdir())]
    documents = ["features.json", "dataset_info.json"]

    def make(one):
        folder = Path(shutil.copytree(made, one.place / "made" / "1.0.0"))
        name = one.rng.choice(documents * 3 + files * 2)
        path, kind = folder / name, one.rng.randrange(8)
        if name in documents and kind < 5:
            document = json.loads(path.read_text())
            how = hosts.change_value(one.rng, document, one.rng.choice([text, _module]))
            path.write_text(json.dumps(document))
        elif kind == 5:
            path.unlink()
            how = one.rng.choice(["gone", "a pipe", "a folder", "a link out", "a device"])
            with one.preparing():
                if how == "a pipe":
                    os.mkfifo(path)
                elif how == "a folder":
                    path.mkdir()
                elif how != "gone":
                    path.symlink_to(one.outside / "file" if how == "a link out" else "/dev/zero")
        elif kind == 6:
            other = one.rng.choice(files)
            content = path.read_bytes()
            path.write_bytes((folder / other).read_bytes())
            (folder / other).write_bytes(content)
            how = f"changes places with {other}"
        else:
            content, how = hosts.damaged(one.rng, path.read_bytes())
            path.write_bytes(content)
        one.what = f"{name}: {how}"
        before = set(sys.modules)
        try:
            found, labels = _read_all(folder)
        finally:
            foreign = {m.partition(".")[0] for m in set(sys.modules) - before}
            foreign -= {"tensorflow_datasets", "tensorflow", "etfzoo", "importlib_resources"}
            if (root / "ran").exists() or "planted" in foreign:
                raise core.Silent(f"it has run code: {foreign}")
        if "splits" in how and "name" in how:
            return "roles of the splits that are left"
        expected = truth
        if kind == 6 and len({name, other} - set(documents)) == 2:
            # No document tells the files of two splits of one size apart.
            expected = dict(zip(truth, reversed(truth.values()), strict=True))
        for split, (pixels, classes) in expected.items():
            if not np.array_equal(pixels, found[split][0]) or not np.array_equal(
                classes, found[split][1]
            ):
                raise core.Silent(f"other images or labels in {split}")
        return "images and labels as ever" + ("" if labels == names else f", classes {labels}")

    yield make


def _module(rng):
    return rng.choice(
        ["planted.Image", "planted", "os.system", "tensorflow_datasets.scripts.cli.main.Image"]
        + ["tensorflow_datasets.core.features.sequence_feature.Sequence", "tensorflow_datasets"]
        + ["tensorflow_datasets.core.features.planted.X", "builtins.eval", "subprocess.Popen"]
    )


# ------------------------------------------------------------------------------------- serving


def _cpu(process):
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@core.group("serving", 356)
def serving(root):
    """Requests to TensorFlow's C++ loader; after each a good one is answered as before."""
    import bad_requests as requests
    import testing
    from c_api import Loader

    with ExitStack() as stack:
        stack.enter_context(testing.small_rn18())
        model, folder = _model(root)
        loader = stack.enter_context(Loader(folder))
        assert "tensorflow" not in loader.modules
        good = testing.smooth_image(90, 120)
        good = {"image_bytes": requests.strings(requests.encode(good, "JPEG"))}
        expected = loader.run("serving_bytes", **good)["scores"]
        kinds = [*requests.IMAGES, *requests.REQUESTS]
        worst = {"CPU s": 0.0}
        resident = loader.resident_kib()

        def make(one):
            contents = []
            if one.number % 3:
                kind = kinds[one.number % len(kinds)]
                one.what = kind
                if kind in requests.IMAGES:
                    signature = "serving_bytes"
                    inputs = {"image_bytes": requests.strings(requests.IMAGES[kind](one.draw))}
                else:
                    signature, inputs = requests.REQUESTS[kind](one.draw, SIDE)
            else:
                count = one.rng.choice([1, 1, 3, 40])
                for _ in range(count):
                    kind, name, content, _ = encoded(one.rng, FORMATS[: 15 if count == 1 else 8])
                    if one.rng.random() < 0.6 / count:
                        content, how = lying(one.rng, kind, content)
                        name += f", {how}"
                    contents.append(content)
                    one.what += f"{name}; "
                signature = "serving_bytes"
                inputs = {"image_bytes": requests.strings(*contents)}
            before = _cpu(loader._process.pid)
            code, message = requests.answer(loader, str(signature), inputs)
            seconds = _cpu(loader._process.pid) - before
            worst["CPU s"] = max(worst["CPU s"], seconds)
            gigabytes = loader.peak_kib() / 2**20
            if not np.array_equal(loader.run("serving_bytes", **good)["scores"], expected):
                raise core.Silent("a good request is answered otherwise than before")
            if seconds > 2 or gigabytes > 1.5:
                raise core.Silent(f"{seconds:.1f} s of CPU, a peak of {gigabytes:.1f} GB")
            grown = (loader.resident_kib() - resident) / 1024
            told = (
                f"{seconds:.2f} s of CPU, peak {gigabytes:.2f} GB, {grown:+.0f} MB since the first"
            )
            if code == "OK" and contents:
                return f"{_as_in_python(model, loader, contents)}; {told}"
            if code not in requests.REFUSALS:
                raise core.Silent(f"{code} {message}; {told}")
            raise core.Refused(f"{code} {message.splitlines()[0][:150]}; {told}")

        yield make


def _as_in_python(model, loader, contents):
    """Raises Silent where served scores are not those of the model on the image's pixels."""
    import tensorflow as tf

    import bad_requests as requests
    from etfzoo.data.augment import evaluation_image

    scores = loader.run("serving_bytes", image_bytes=requests.strings(*contents))["scores"]
    for content, found in zip(contents, scores, strict=True):
        pixels = evaluation_image(content, SIDE, SIDE, model.spec.crop)
        logits = model(tf.cast(pixels, tf.float32)[None])
        wanted = np.sort(tf.nn.softmax(logits).numpy()[0])[::-1][: len(found)]
        if np.abs(wanted - found).max() > 1e-3:
            raise core.Silent(f"scores {found}, the model's are {wanted}")
    return "the model's scores"
