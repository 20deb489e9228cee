"""When a run ends, and which of its epochs is its result."""

from etfzoo.training.config import TrainConfig


def best_epoch(history: list[dict]) -> dict | None:
    """The row with the best top1, of equal ones the first; None before any epoch is evaluated.

    Args:
        history: a row of figures an epoch, with `top1` where it was evaluated.
    """
    rows = [row for row in history if "top1" in row]
    return max(rows, key=lambda row: row["top1"], default=None)


def ended(config: TrainConfig, history: list[dict]) -> bool:
    """Whether a run is over: all its epochs are done, or `early_stopping` of them brought nothing.

    It does not end at an epoch that is not evaluated.

    Args:
        config: the run.
        history: its epochs so far, see `best_epoch`.
    """
    done = len(history)
    if not done or not config.early_stopping or "top1" not in history[-1]:
        return done >= config.epochs
    return done >= min(config.epochs, best_epoch(history)["epoch"] + config.early_stopping)


def result(config: TrainConfig, history: list[dict]) -> dict:
    """The figures of a run that is over: its last epoch's, with `early_stopping` its best one's.

    The latter has `stopped_after`, the number of epochs.

    Args:
        config, history: see `ended`.
    """
    if not config.early_stopping:
        return history[-1]
    return best_epoch(history) | {"stopped_after": len(history)}
