# %% [markdown]
# # Transfer to your own folder of photographs
#
# You have a folder of photographs, one subfolder a class, and want a classifier. This notebook
# takes a pretrained ResNet18 with a fixed ETF head, looks at what its features are worth as they are,
# fine-tunes it, looks at its mistakes, and publishes the result. It takes about a minute on a CPU.
#
# So that it runs without a download, it cuts its photographs from the two pictures that
# scikit-learn brings. **For your own, leave out the next cell and put your folder in `PHOTOS`.**

# %%
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image
from sklearn.neighbors import KNeighborsClassifier

import etfzoo

keras.utils.set_random_seed(0)
PHOTOS = Path("photos")

# %% [markdown]
# ## A folder of photographs
#
# Five classes. Training and test patches come from different parts of the picture, so that none
# is seen in both. Your folder may be `photos/<class>/*.jpg`; a fifth of each class is then kept
# for the test. Here it is `photos/train/<class>/` and `photos/test/<class>/`.

# %%
# picture, then left, top, right and bottom of the part to train on, and of the one to test on
REGIONS = {
    "leaves": ("flower.jpg", (0, 0, 170, 427), (450, 0, 640, 350)),
    "petals": ("flower.jpg", (185, 90, 310, 350), (310, 90, 435, 350)),
    "sky": ("china.jpg", (330, 0, 480, 190), (490, 0, 640, 130)),
    "temple": ("china.jpg", (80, 70, 210, 330), (210, 70, 340, 330)),
    "trees": ("china.jpg", (330, 310, 560, 427), (555, 150, 640, 427)),
}
rng = np.random.default_rng(0)
for name, (picture, *parts) in REGIONS.items():
    picture = Image.fromarray(load_sample_image(picture))
    for split, (left, top, right, bottom) in zip(("train", "test"), parts, strict=True):
        (PHOTOS / split / name).mkdir(parents=True, exist_ok=True)
        for number in range(24):
            side = rng.integers(40, 85)
            x, y = rng.integers(left, right - side + 1), rng.integers(top, bottom - side + 1)
            patch = picture.crop((x, y, x + side, y + side))
            patch.save(PHOTOS / split / name / f"{number:02d}.jpg", quality=95)


def show(images, captions, title):
    """A row of images."""
    figure, axes = plt.subplots(1, len(images), figsize=(1.5 * len(images), 2), squeeze=False)
    for place, image, caption in zip(axes[0], images, captions, strict=True):
        place.imshow(np.asarray(image))
        place.set_title(caption, fontsize=8)
        place.axis("off")
    figure.suptitle(title, fontsize=10)
    plt.show()


data = f"folder:{PHOTOS}"
names = etfzoo.data.class_names(data)
show([Image.open(PHOTOS / "train" / n / "00.jpg") for n in names], names, "one of each class")

# %% [markdown]
# ## What the features are worth as they are
#
# The model saw 100 classes of Tiny ImageNet, at 64 pixels. None of our classes is among them, but its
# features may tell ours apart all the same. A vote of the nearest neighbours needs no training. (The
# model was trained in bfloat16, which NumPy and scikit-learn hardly know: `dtype` says another.)

# %%
pretrained = etfzoo.load("rn18_etf", dtype="float32")
model = etfzoo.replace_head(pretrained, len(names), class_names=names)  # for our classes
to_features = etfzoo.feature_model(model, ["features"])


def features_of(split):
    """Features of a split, and the numbers of their classes."""
    found, labels = [], []
    for images, numbers in etfzoo.data.load(data, split, model, batch_size=60):
        found.append(np.asarray(to_features(images)["features"]))
        labels.append(np.asarray(numbers))
    return np.concatenate(found), np.concatenate(labels)


neighbours = KNeighborsClassifier(5, metric="cosine").fit(*features_of("train"))
print(
    f"5 nearest neighbours, frozen features: {100 * neighbours.score(*features_of('test')):.1f} %"
)

# %% [markdown]
# ## Fine-tuning
#
# First the head alone, as its fresh weights would disturb the backbone. Then everything else, but for
# the batch norms: their statistics over a few small batches would do more harm than good. Without
# them a network is easily upset, so that the rate is small and the gradients are clipped. This is
# plain Keras.

# %%
train = etfzoo.data.load(data, "train", model, batch_size=24, training=True)
test = etfzoo.data.load(data, "test", model, batch_size=60)
stages = {
    "head": keras.optimizers.SGD(0.1, momentum=0.9),
    "all but batch norms": keras.optimizers.SGD(0.001, momentum=0.9, clipnorm=1.0),
}
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
for stage, optimizer in stages.items():
    for layer in model.layers:
        norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = layer.name == "logits" or (stage != "head" and not norm)
    model.compile(optimizer, loss, metrics=["accuracy"])
    history = model.fit(train, validation_data=test, epochs=5, shuffle=False, verbose=0).history
    print(f"{stage}: test accuracy {100 * history['val_accuracy'][-1]:.1f} %")

# %% [markdown]
# ## What it says, and where it is wrong
#
# `preprocess` crops and resizes any image as evaluation does; `decode_predictions` gives names and
# probabilities.

# %%
paths = sorted((PHOTOS / "test").glob("*/*.jpg"))
found = etfzoo.decode_predictions(model, model(etfzoo.preprocess(model, paths)), top=1)
rows = [(path, label, score) for path, ((_, label, score),) in zip(paths, found, strict=True)]
wrong = [row for row in rows if row[0].parent.name != row[1]]
print(f"{len(wrong)} of {len(rows)} are wrong")
unsure = sorted(rows, key=lambda row: row[2])[:6]
show(
    [Image.open(path) for path, _, _ in unsure],
    [f"{path.parent.name}:\n{label} {100 * score:.0f} %" for path, label, score in unsure],
    "truth, and what the model says; those it is least sure of",
)
table = np.zeros((len(names), len(names)), int)
for path, label, _ in rows:
    table[names.index(path.parent.name), names.index(label)] += 1
print(f"{'truth / said':14}" + "".join(f"{name:>8}" for name in names))
for name, row in zip(names, table, strict=True):
    print(f"{name:14}" + "".join(f"{count:8d}" for count in row))

# %% [markdown]
# **Compare the three numbers before you choose.** The patches are few and the task is easy, so that
# the frozen features are good enough, and training everything may well cost accuracy: what it learns
# about these trees need not hold for the others. With more photographs, and classes that are harder
# to tell apart, it may be the other way round. Whichever is best can be published.
#
# ## Publishing
#
# One folder for Keras and for TF Serving. The version is read back and compared before it appears.

# %%
folder = etfzoo.publish(model, "models/rn18_linear.photos", licence="CC-BY-2.0")
again = etfzoo.load("models/rn18_linear.photos")
pixels = etfzoo.preprocess(model, paths[:4])
same = np.array_equal(np.asarray(model(pixels)), np.asarray(again(pixels)))
print(f"{folder}: the loaded model gives the same logits, bit for bit: {same}")
assert same

# %% [markdown]
# **Go on.** The same from the command line, with a search of the learning rate, checkpoints, and a
# report: `etfzoo finetune --model=rn18_etf --dataset=folder:photos`. See [training](../training.md).
