"""Settings of a run: where and how it computes."""

import dataclasses

from etfzoo.runtime.strategies import STRATEGIES
from etfzoo.training.settings import setting


@dataclasses.dataclass(frozen=True)
class MachineSettings:
    """The group Machine."""

    mixed_precision: str = setting(
        "Machine",
        "none",
        "none, bfloat16 or float16 (with loss scaling)",
        choices=("none", "bfloat16", "float16"),
    )
    deterministic: bool = setting("Machine", True, "repeat bit for bit (slower on some devices)")
    strategy: str = setting(
        "Machine",
        "auto",
        "auto, one_device, mirrored, multiworker or tpu",
        choices=STRATEGIES,
        runtime=True,
    )
    tpu: str | None = setting(
        "Machine", None, "TPU name or address; local for the one in this machine", runtime=True
    )
    num_virtual_devices: int | None = setting(
        "Machine", None, "CPU devices for the strategy mirrored", low=1, high=64, runtime=True
    )
    cache: str = setting(
        "Machine",
        "none",
        "device: decoded images live on the device (JAX); or none",
        choices=("none", "device"),
    )
    synchronize_norms: bool = setting("Machine", True, "norm statistics over all replicas")
    steps_per_execution: int = setting(
        "Machine",
        1,
        "steps between two looks at signals and the clock",
        low=1,
        high=10**6,
        runtime=True,
    )
    jit_compile: bool | None = setting(
        "Machine",
        None,
        "compile with XLA, as JAX always does (default: on one GPU, when not deterministic)",
        runtime=True,
    )
    checkpoint_every: int = setting(
        "Machine", 500, "steps between checkpoints", low=1, high=10**9, runtime=True
    )
    keep_checkpoints: int = setting(
        "Machine",
        2,
        "latest checkpoints that are kept, beside the best",
        low=1,
        high=10**6,
        runtime=True,
    )
