# %% [markdown]
# # The ETF layer in any Keras model
#
# The last layer of a classifier is usually trained: each of the K classes gets a weight vector, and
# training moves it. It need not be. At the end of a long training the class means of the features
# and the weight vectors of the classes both stand as far from each other as K vectors can, all at
# the same angle. This is *neural collapse* (Papyan, Han and Donoho, 2020), and the figure that the
# vectors form is a *simplex equiangular tight frame*, ETF for short.
#
# So we may put the weight vectors there from the start, and never train them. This notebook looks
# at such a layer, puts it into a small network, and compares it with a trained one. It takes about
# a minute on a CPU and downloads nothing.

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import etfzoo

keras.utils.set_random_seed(0)

# %% [markdown]
# ## What an ETF looks like
#
# With K = 3 classes and features of two numbers we can draw the three weight vectors.

# %%
layer = etfzoo.layers.ETFClassifier(3)
layer.build((None, 2))
vectors = np.asarray(layer.kernel).T  # [3, 2]: a weight vector for each class

figure, axes = plt.subplots(figsize=(3, 3))
for number, (x, y) in enumerate(vectors):
    axes.annotate(
        "", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": f"C{number}", "lw": 2}
    )
    axes.text(1.35 * x, 1.2 * y, f"class {number}", ha="center", va="center", color=f"C{number}")
axes.set(xlim=(-1.8, 1.8), ylim=(-1.8, 1.8), aspect="equal", title="K = 3, p = 2")
plt.show()

# %% [markdown]
# They have the same length, and the angle between any two of them is 120 degrees. With more classes
# there is no such drawing, but there is a number: the cosine of any two of them is -1/(K-1). Here it
# is for ten classes in 64 dimensions.

# %%
layer = etfzoo.layers.ETFClassifier(10)
layer.build((None, 64))
vectors = np.asarray(layer.kernel).T
lengths = np.linalg.norm(vectors, axis=1)
cosines = (vectors / lengths[:, None]) @ (vectors / lengths[:, None]).T
others = cosines[~np.eye(10, dtype=bool)]
print(f"lengths: {lengths.min():.6f} to {lengths.max():.6f}")
print(
    f"cosines of two different ones: {others.min():.6f} to {others.max():.6f}; -1/9 = {-1 / 9:.6f}"
)
print("trainable weights of the layer:", len(layer.trainable_weights))

# %% [markdown]
# ## Two networks that differ in their last layer
#
# The data are the 1,797 handwritten digits that scikit-learn brings, grey images of 8 x 8 pixels, two
# thirds of them to train on. The networks are plain Keras, and so is their training.

# %%
images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1) / 16
train, test, train_labels, test_labels = train_test_split(
    images, labels, test_size=1 / 3, random_state=0, stratify=labels
)


def network(head):
    """A small convolutional network; its features have 64 numbers."""
    layers = [keras.Input((8, 8, 1))]
    for filters, strides in ((32, 1), (64, 2)):
        layers += [keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)]
        layers += [keras.layers.BatchNormalization(momentum=0.9), keras.layers.ReLU()]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.BatchNormalization(momentum=0.9)]
    return keras.Sequential([*layers, head])


heads = {
    "trained": keras.layers.Dense(10),
    "fixed ETF": etfzoo.layers.ETFClassifier(10, scale=5.0),
}
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
models, histories = {}, {}
for name, head in heads.items():
    keras.utils.set_random_seed(0)  # the same first weights below the head
    models[name] = model = network(head)
    model.compile(keras.optimizers.Adam(0.003), loss, metrics=["accuracy"])
    fitted = model.fit(
        train,
        train_labels,
        validation_data=(test, test_labels),
        epochs=20,
        batch_size=32,
        verbose=0,
    )
    histories[name] = fitted.history["val_accuracy"]
    trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    print(f"{name}: test accuracy {100 * histories[name][-1]:.1f} %, {trained:,} trained numbers")

# %% [markdown]
# The second network has 650 trained numbers less: its last layer has none. Its weight vectors have
# length 1 for good; `scale` multiplies the logits, which a trained layer could make longer by itself.

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name, values in histories.items():
    axes.plot(range(1, len(values) + 1), 100 * np.asarray(values), label=name)
axes.set(xlabel="epoch", ylabel="test accuracy (%)")
axes.legend()
plt.show()

# %% [markdown]
# One seed of a small task is no evidence for either head. It shows that a network learns with a last
# layer that stands still: the features move instead.
#
# ## Where the features went
#
# The cosine between the mean features of any two digits, each less the mean of all: at full collapse
# it is -1/9 off the diagonal, as it is for the weights of the ETF.

# %%
figure, all_axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
for axes, (name, model) in zip(all_axes, models.items(), strict=True):
    to_features = keras.Model(model.inputs, model.layers[-2].output)
    features = to_features.predict(train, verbose=0)
    means = np.stack([features[train_labels == digit].mean(0) for digit in range(10)])
    means -= means.mean(0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    cosines = means @ means.T
    off = cosines[~np.eye(10, dtype=bool)]
    image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set(title=f"{name}: off the diagonal\n{off.mean():.3f} ± {off.std():.3f}", xlabel="digit")
    print(
        f"{name}: cosines of two class means {off.mean():.3f}, standard deviation {off.std():.3f}"
    )
figure.colorbar(image, ax=all_axes)
plt.show()

# %% [markdown]
# The mean of the cosines is -1/9 for any ten centred vectors of about equal length. Their spread is
# what tells: the smaller it is, the closer the class means are to an ETF. After 20 epochs neither
# network is there yet.
#
# ## Saving
#
# The layer is an ordinary Keras layer. Its weights come from its seed, so that they are the same
# after saving and loading. `import etfzoo` is all that Keras needs to find it.

# %%
models["fixed ETF"].save("digits.keras")
again = keras.saving.load_model("digits.keras")
same = np.array_equal(np.asarray(models["fixed ETF"](test)), np.asarray(again(test)))
print("the loaded network gives the same logits, bit for bit:", same)
assert same

# %% [markdown]
# **Go on.** `etfzoo.build_classifier("rn18", num_classes=10, head="etf")` is a whole ResNet with this
# head; the page on [layers](../layers.md) tells what the layer takes.
