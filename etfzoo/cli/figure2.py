"""The paper's Figure 2: ridge regression on random features sigma(W x), against a2 of a2 t^2 + t.

  python recipes/figure2.py --model=runs/my_pretraining --dataset=stl10
  python recipes/figure2.py --model=rn50_etf --dataset=cifar10 --projections=gaussian,haar,etf
  python recipes/figure2.py --dataset=gaussian          # made classes that differ in their means
  python recipes/figure2.py --dataset=gaussian_scales   # made classes that differ in their spread

x are the frozen pooled features of the model. The paper leaves open what W is, how many rows it has
and how strong the regularisation is: --projections, --num_features and --regularization. The theory
says that a2 = 0, the linear one, is best where classes differ in their means alone; gaussian_scales
shows that it is not so elsewhere. Writes figure2.png, .pdf, .csv and .npz. Draws are kept in
draws/: started again, it goes on.
"""

import csv
import hashlib
import io
import json
import os

from etfzoo.cli import app, configs, flags
from etfzoo.cli.flags import FLAGS
from etfzoo.training.settings import SEEDS

import numpy as np  # isort: skip (after cli, which says what to do where it is missing)

PROJECTIONS = ("gaussian", "haar", "etf")
# Examples of each split, dimensions, classes; separation of the means, spread of the variances.
GAUSSIAN = {"examples": 1000, "dim": 100, "num_classes": 4}
MADE = {
    "gaussian": {"separation": 2.5, "spread": 0.0},
    "gaussian_scales": {"separation": 0.0, "spread": 4.0},
}


def main():
    import etfzoo
    from etfzoo import files
    from etfzoo.experiments import figures, random_features

    a2 = sorted(FLAGS.a2)
    if 0.0 not in a2 or len(a2) < 2:
        raise etfzoo.EtfzooError("--a2 needs 0 and another value, which is compared to it")
    if not FLAGS.projections:
        raise etfzoo.EtfzooError(f"--projections needs one or more of {', '.join(PROJECTIONS)}")
    train, test, title = _made(random_features) if FLAGS.dataset in MADE else _extracted(etfzoo)
    output = files.make_directory(FLAGS.output or _place())
    inputs = random_features.standardize(train[0], test[0], per_feature=FLAGS.per_feature)
    train, test = (inputs[0], train[1]), (inputs[1], test[1])
    others = {n: f for n, f in random_features.ACTIVATIONS.items() if n != "linear"}
    activations = [*map(random_features.polynomial, a2), *others.values()]
    dim = inputs[0].shape[1]
    num_features = dim if FLAGS.num_features is None else FLAGS.num_features

    def draw(kind, seed):
        return random_features.regress(
            train, test, activations, kind, num_features, FLAGS.regularization, seed=seed
        )

    settings = {
        "a2": a2,
        "num_features": num_features,
        "regularization": FLAGS.regularization,
        "grid": random_features.GRID,
        "per_feature": FLAGS.per_feature,
    }
    results = _draws(draw, len(activations), _digest(train, test, settings), output / "draws")
    cut = len(a2)
    polynomials = {k: type(d)(*(x[:, :cut] for x in d)) for k, d in results.items()}
    rest = {k: type(d)(*(x[:, cut:] for x in d)) for k, d in results.items()}
    shares = np.bincount(train[1]) / len(train[1])
    chance = np.mean(np.square(np.eye(len(shares))[test[1]] - shares))
    title = f"{title}; p = {dim}, {num_features} random features"
    figure = figures.regression_errors(
        a2, polynomials, rest, list(others), chance, FLAGS.regularization, title
    )
    figures.save(figure, output / "figure2")
    names = [f"{value:g} t^2 + t" for value in a2] + list(others)
    _write(output, names, activations, results, settings | {"title": title})
    for kind, draws in polynomials.items():
        for how in ("validated", "fixed"):
            print(_verdict(a2, kind, how, getattr(draws, f"mse_{how}")))
    print(f"written to {output}: figure2.png, figure2.pdf, figure2.csv, figure2.npz")


def _place():
    if FLAGS.dataset in MADE:
        return configs.report_place("figure2", None, FLAGS.dataset, f"s{FLAGS.seed}")
    size = [f"{FLAGS.image_size}px"] if FLAGS.image_size else []
    return configs.report_place("figure2", FLAGS.model, FLAGS.dataset, *size)


def _made(random_features):
    """Made data: train, test, title."""
    shape = {"dim": GAUSSIAN["dim"], "num_classes": GAUSSIAN["num_classes"]}
    how = MADE[FLAGS.dataset]
    train, test = (
        random_features.gaussian_classes(GAUSSIAN["examples"], **shape, **how, seed=seed)
        for seed in (2 * FLAGS.seed, 2 * FLAGS.seed + 1)
    )
    differ = "means" if how["separation"] else "variances"
    return train, test, f"{shape['num_classes']} Gaussian classes that differ in their {differ}"


def _extracted(etfzoo):
    """Features of a model: train, test, title."""
    from etfzoo.measure.features import extract

    if not FLAGS.model:
        raise etfzoo.EtfzooError(
            "say which model with --model=WORKDIR, a published folder or name; --dataset=gaussian "
            "needs none"
        )
    size = FLAGS.image_size
    model = etfzoo.load(FLAGS.model, head=None, input_shape=(size, size, 3) if size else None)
    source = configs.open_source(FLAGS.dataset)
    train, test = (extract(model, source, split, FLAGS.batch_size) for split in ("train", "test"))
    name = os.path.basename(FLAGS.model.rstrip("/"))
    return train, test, f"features of {name} on {source.name}"


def _digest(train, test, settings):
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for array in (*train, *test):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:12]


def _draws(draw, count, digest, folder):
    """Results of all draws by projection, stacked; those that are on disk are not drawn again."""
    from etfzoo import files
    from etfzoo.experiments import random_features
    from etfzoo.progress import Progress

    files.make_directory(folder)
    progress = Progress(
        "regression on random features", FLAGS.draws * len(FLAGS.projections), unit="draw"
    )
    results = {}
    for number, kind in enumerate(FLAGS.projections):
        draws = []
        for seed in range(FLAGS.seed, FLAGS.seed + FLAGS.draws):
            progress.update(number * FLAGS.draws + len(draws))
            path = folder / f"{kind}_{seed}_{digest}.npz"
            result = random_features.read_draw(path, count)
            if result is None:
                result = draw(kind, seed)
                with files.atomic(path) as file:
                    np.savez(file, **result._asdict())
            draws.append(result)
        results[kind] = random_features.Draw(*map(np.stack, zip(*draws, strict=True)))
    progress.finish()
    return results


def _write(output, names, activations, results, settings):
    """The csv of means and deviations, and the npz of all draws."""
    from etfzoo import files
    from etfzoo.experiments import figures, random_features

    table = io.StringIO()
    writer = csv.writer(table)
    fields = [f for f in random_features.Draw._fields if f != "validated"]
    columns = [name for f in fields for name in (f, f"{f}_deviation")]
    writer.writerow(
        ["projection", "activation", "d0", "d1", "d2", *columns, "median_validated_regularization"]
    )
    coefficients = [random_features.kernel_coefficients(a) for a in activations]
    for kind, draws in results.items():
        columns = [column for f in fields for column in figures.spread(getattr(draws, f))]
        columns.append(np.median(draws.validated, 0))
        for name, d, row in zip(names, coefficients, np.transpose(columns), strict=True):
            writer.writerow([kind, name, *(f"{value:.6g}" for value in (*d, *row))])
    files.write_text(output / "figure2.csv", table.getvalue())
    arrays = {f"{k}_{f}": x for k, draws in results.items() for f, x in draws._asdict().items()}
    with files.atomic(output / "figure2.npz") as file:
        np.savez(
            file,
            activations=names,
            coefficients=coefficients,
            settings=json.dumps(settings),
            **arrays,
        )


def _verdict(a2, kind, how, mse):
    """One line: which a2 is best, and by how much, draw by draw."""
    mean = mse.mean(0)
    zero, best = a2.index(0.0), int(mean.argmin())
    head = f"{kind} W, {how} gamma: test MSE {mean[zero]:.5f} at a2 = 0"
    if best == zero:
        second = np.argsort(mean)[1]
        return f"{head}, the best; next is a2 = {a2[second]:g} with {mean[second]:.5f}"
    gain = mse[:, zero] - mse[:, best]
    return (
        f"{head}, but a2 = {a2[best]:g} is lower by {gain.mean():.5f} (deviation over draws "
        f"{gain.std(ddof=1):.5f})"
    )


def run():
    """Defines the flags and runs the command."""
    flags.model_flag()
    flags.data_flags("stl10")
    flags.image_size_flag("the model's")
    flags.boolean("Data", "per_feature", False, "standardise each feature instead of all together")
    a2 = "-1,-0.8,-0.6,-0.4,-0.2,0,0.2,0.4,0.6,0.8,1"
    flags.numbers("Regression", "a2", a2, "values of a2", low=-1000, high=1000)
    flags.strings(
        "Regression",
        "projections",
        "gaussian",
        "laws of W (the paper names none): gaussian, haar, etf",
        choices=PROJECTIONS,
    )
    flags.integer(
        "Regression",
        "num_features",
        None,
        "random features (default: as many as x has)",
        low=1,
        high=10**5,
    )
    flags.real(
        "Regression",
        "regularization",
        0.01,
        "the fixed gamma (assumed: the paper gives none), beside one picked by leave-one-out",
        low=1e-12,
        high=10**6,
    )
    flags.integer("Regression", "draws", 5, "draws of W", low=2, high=10**4)
    flags.integer("Regression", "seed", 0, "of the first draw, and of made data", **SEEDS)
    flags.batch_flag(128, "images a step")
    flags.path("Files", "output", None, "directory of the figure (default: below runs/figure2)")
    app.run(main, __doc__)
