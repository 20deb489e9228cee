# %% [markdown]
# # Measuring collapse, and drawing Figure 3
#
# When a classifier is trained on, the features of each class draw together, and the class means move
# apart until they stand at equal angles: *neural collapse*. It can be measured. This notebook trains
# a small ResNet18 with a fixed ETF head and one with a trainable head, watches the collapse of both
# while they learn, and then draws the paper's Figure 3: the covariance that is left within classes on
# data that the networks have not seen. It takes about a minute on a CPU and downloads nothing.

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np

import etfzoo
from etfzoo.experiments import figures  # no public name: it may move in a later version

# %% [markdown]
# ## Training, and measuring on the way
#
# The handwritten digits of scikit-learn: 20 of each to train on, without augmentation, so that the
# networks soon know them by heart. The callback measures after each third epoch, on the training
# images and on others. It takes whatever gives batches; here they are lists of one batch.

# %%
EPOCHS, EVERY = 15, 3


def only_batch(split):
    """All images of a split of the digits, 32 pixels wide, and their labels."""
    return next(iter(etfzoo.data.load("digits", split, image_size=32, batch_size=300)))


measured = {"train": [only_batch("train")], "other": [only_batch("validation")]}
images, labels = measured["train"][0]
models, histories = {}, {}
for head in ("etf", "linear"):
    keras.utils.set_random_seed(0)
    models[head] = model = etfzoo.build_classifier("rn18", 10, head, input_shape=(32, 32, 3))
    model.compile(
        keras.optimizers.SGD(0.02, momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    collapse = etfzoo.callbacks.NeuralCollapse(measured, every=EVERY)
    histories[head] = model.fit(
        images, labels, batch_size=20, epochs=EPOCHS, callbacks=[collapse], verbose=0
    ).history
    print(f"{head}: training accuracy {100 * histories[head]['accuracy'][-1]:.1f} %")

# %% [markdown]
# ## What the measures say
#
# - `nc1_ratio`: the scatter within classes over the scatter between them, tr S_W / tr S_B. It falls
#   as the features of a class draw together.
# - `nc2_angles`: how far the angles between class means are from those of an ETF.
# - `nc3`: how far the weights of the classifier are from the class means that they belong to.
#
# All three are 0 at full collapse. `etfzoo.neural_collapse` has more of them, with their sources.

# %%
SHOWN = ("nc1_ratio", "nc2_angles", "nc3")
figure, all_axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for axes, measure in zip(all_axes, SHOWN, strict=True):
    for number, (head, history) in enumerate(histories.items()):
        for split, style in (("train", "-"), ("other", "--")):
            values = history[f"nc/{split}/{measure}"]
            epochs = range(EVERY, EPOCHS + 1, EVERY)
            label = f"{head}, {split} images"
            axes.plot(epochs, values, style, color=f"C{number}", marker=".", label=label)
    axes.set(title=measure, xlabel="epoch")
    axes.set_yscale("log" if measure == "nc1_ratio" else "linear")
all_axes[0].legend(fontsize=7)
plt.show()
print(f"{'after the last epoch':22}" + "".join(f"{measure:>12}" for measure in SHOWN))
for head, history in histories.items():
    for split in measured:
        values = [history[f"nc/{split}/{measure}"][-1] for measure in SHOWN]
        print(f"{head + ', ' + split + ' images':22}" + "".join(f"{v:12.3f}" for v in values))

# %% [markdown]
# Training images collapse more than others: compare only like with like. A class mean of few images
# is noisy, too, which alone makes splits of different sizes differ. `nc1_ratio_unbiased` and its
# siblings take that out.
#
# ## Any features
#
# The statistics are not tied to a model. They are sums over batches, in one pass, and can be merged.

# %%
rng = np.random.default_rng(0)
labels = np.repeat(np.arange(4), 200)
for spread in (1.0, 0.3, 0.1):
    statistics = etfzoo.neural_collapse.NeuralCollapseStatistics(num_classes=4, dim=8)
    statistics.update(np.eye(4, 8)[labels] + spread * rng.normal(size=(800, 8)), labels)
    print(f"spread {spread}: tr S_W / tr S_B = {statistics.result()['nc1_ratio']:.3f}")

# %% [markdown]
# ## Figure 3
#
# Now other data: drawn outlines of ten things, which neither network has seen. Figure 3 shows the
# covariance of the features about their class means, for the first 100 dimensions and for all of
# them in blocks. tr(C°)/p grows with the scale of the features. The two other numbers have no scale.

# %%
covariances = {}
for head, model in models.items():
    to_features = etfzoo.feature_model(model, ["features"])
    features, labels = [], []
    for images, numbers in etfzoo.data.load(
        "shapes/outlines", "test", image_size=32, batch_size=100
    ):
        features.append(np.asarray(to_features(images)["features"]))
        labels.append(np.asarray(numbers))
    covariances[head] = figures.Covariance.of(np.concatenate(features), np.concatenate(labels))
    found = covariances[head]
    print(
        f"{head}: tr(C°)/p {found.trace:.4f}, of features of length 1 {found.unit_trace:.6f}, "
        f"tr S_W / tr S_B {found.scatter_ratio:.2f}"
    )
figure = figures.covariances({"outlines": covariances}, "covariance within classes C°")
figure.savefig("figure3.png", dpi=100)
figure

# %% [markdown]
# In the paper's figure the networks are ResNets trained on ImageNet and fine-tuned on the target, and
# the fixed head leaves the smallest covariance. These networks have seen 200 digits, with one seed:
# the figure shows how to look, and not what is found.
#
# **Go on.** `etfzoo figure3 --models=A,B --dataset=...` does this for any models and data set,
# `etfzoo neural_collapse --model=...` prints all measures. See [measuring](../measuring.md).
