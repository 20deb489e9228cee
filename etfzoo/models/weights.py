"""Weights as plain NumPy arrays by variable path, and their strict assignment."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from etfzoo.errors import EtfzooError
from etfzoo.models.spec import ClassifierSpec


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A classifier that was read, before any network is built of it, which draws random numbers.

    Attributes:
        spec: what it is.
        arrays: its weights by path of the variable.
        what: whose weights they are, for errors.
    """

    spec: ClassifierSpec
    arrays: Mapping[str, np.ndarray]
    what: str = "weights"

    @classmethod
    def of(cls, model) -> "StoredModel":
        """That of an ImageClassifier."""
        return cls(model.spec, as_arrays(model.variables))


def as_arrays(variables) -> dict[str, np.ndarray]:
    """Values of Keras variables by path.

    Raises:
        EtfzooError: two variables share a path, so that one would overwrite the other.
    """
    import keras

    arrays = {v.path: keras.ops.convert_to_numpy(v.value) for v in variables}
    if len(arrays) != len(variables):
        raise EtfzooError("two variables of the model have the same path; give layers unique names")
    return arrays


def assign(variables, arrays, what: str = "weights", skip=lambda path: False) -> None:
    """Assigns arrays to the variables of the same path; all or none.

    Args:
        variables: Keras variables.
        arrays: mapping of path to array.
        what: what the arrays are, for the error.
        skip: predicate on paths that are left alone on both sides (a head that is replaced).

    Raises:
        EtfzooError: naming the variables that are missing, left over or of another shape.
    """
    targets = {v.path: v for v in variables if not skip(v.path)}
    given = {path for path in arrays if not skip(path)}
    problems = [
        f"{title}: {_some(paths)}"
        for title, paths in (
            ("missing", targets.keys() - given),
            ("not in the model", given - targets.keys()),
        )
        if paths
    ]
    # An array may be read only when it is asked for: no others are.
    sources = {path: arrays[path] for path in sorted(targets.keys() & given) if not problems}
    wrong = [
        f"{path} {tuple(sources[path].shape)} for {tuple(targets[path].shape)}"
        for path in sources
        if tuple(sources[path].shape) != tuple(targets[path].shape)
    ]
    if wrong:
        problems.append(f"of another shape: {_some(wrong)}")
    values = [path for path in sources if sources[path].dtype.kind in "OSUV"]
    if values:
        problems.append(f"no numbers: {_some(values)}")
    if problems:
        raise EtfzooError(f"{what} do not fit the model: {'; '.join(problems)}")
    for path, variable in targets.items():
        variable.assign(sources[path])


def _some(items, limit=5) -> str:
    items = sorted(items)
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest
