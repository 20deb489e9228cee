"""A training step of ResNet50 beside the same network in PyTorch, channels last.

  python benchmarks/torch_step.py --rounds=5 --torch_python=PATH
  python benchmarks/torch_step.py --precision=bfloat16 --compile --torch_python=PATH
  python benchmarks/torch_step.py --device=gpu --precision=bfloat16 --torch_python=PATH

One thread, CPU seconds (`--device=gpu`: wall time; both keep memory on the GPU), medians over
rounds in which the two take turns. Both: 1000 classes,
uint8 pixels in, forward, backward, L2 1e-4 and SGD with momentum, the stride in the first 1x1
convolution of a block. bfloat16 is Keras's mixed_bfloat16 here and autocast there. torch is no
dependency, so it may live in another interpreter.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time

import numpy as np
from taking_turns import Worker, cpu_seconds, load_tensorflow, medians, serve

STEPS = ((224, 8), (64, 32))  # image size, batch size
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def examples(size, batch):
    rng = np.random.RandomState(0)
    images = rng.randint(256, size=(batch, size, size, 3), dtype=np.uint8)
    return images, rng.randint(1000, size=batch)


def measure(device, work):
    """Seconds of a step, which ends when its loss is known."""
    if device == "cpu":
        return cpu_seconds(work)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def serve_etfzoo(folder):
    tf = load_tensorflow()
    import keras

    import etfzoo
    from etfzoo.runtime import step_tf

    with open(f"{folder}/settings.json") as file:
        settings = json.load(file)
    precision, device = settings["precision"], settings["device"]
    gpus = tf.config.list_physical_devices("GPU")
    if device == "gpu" and not gpus:
        return print("missing")
    tf.config.set_visible_devices(gpus[:1] if device == "gpu" else [], "GPU")
    dtype = "float32" if precision == "float32" else f"mixed_{precision}"
    works = {}
    for size, batch in STEPS:
        model = etfzoo.build_classifier("rn50", 1000, "linear", "bn", (size, size, 3), dtype=dtype)
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        optimizer.build(model.trainable_variables)
        stepper = step_tf.Stepper(model, optimizer, tf.distribute.get_strategy(), 1e-4)
        images, labels = examples(size, batch)
        data = tf.data.Dataset.from_tensors((images, labels.astype(np.int32))).repeat()
        batches = iter(step_tf.distribute(tf.distribute.get_strategy(), lambda _, d=data: d))
        stepper.train(batches).numpy()
        works[f"etfzoo {size}"] = lambda s=stepper, b=batches: s.train(b).numpy()
    serve(tf.__version__, lambda case: measure(device, works[case]))


def torch_resnet50(torch):
    """ResNet50 with its strides where KerasCV has them."""
    nn = torch.nn

    def unit(inputs, outputs, kernel, stride=1):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
        )

    class Block(nn.Module):  # type: ignore[name-defined]
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.first = unit(inputs, width, 1, stride)
            self.second = unit(width, width, 3)
            self.third = unit(width, 4 * width, 1)
            same = inputs == 4 * width and stride == 1
            self.shortcut = nn.Identity() if same else unit(inputs, 4 * width, 1, stride)

        def forward(self, x):
            y = torch.relu(self.second(torch.relu(self.first(x))))
            return torch.relu(self.third(y) + self.shortcut(x))

    layers = [unit(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(blocks):
            layers.append(Block(inputs, width, stride if number == 0 else 1))
            inputs = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)]
    return nn.Sequential(*layers)


def serve_torch(folder):
    try:
        import torch
    except ImportError:
        return print("missing")
    with open(f"{folder}/settings.json") as file:
        settings = json.load(file)
    device = {"cpu": "cpu", "gpu": "cuda"}[settings["device"]]
    if device == "cuda" and not torch.cuda.is_available():
        return print("missing")
    torch.set_num_threads(1)
    mean, std = (torch.tensor(v, device=device).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    low = settings["precision"] == "bfloat16"
    works = {}
    for size, batch in STEPS:
        model = torch_resnet50(torch).to(device, memory_format=torch.channels_last)
        run = torch.compile(model) if settings["compile"] else model
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
        images, labels = (torch.from_numpy(x).to(device) for x in examples(size, batch))
        images = images.permute(0, 3, 1, 2)  # channels last in memory, as they come

        def step(run=run, optimizer=optimizer, images=images, labels=labels):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=low):
                logits = run((images.float() - mean) / std)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            return loss.item()

        step()
        works[f"torch {size}"] = step
    serve(torch.__version__, lambda case: measure(settings["device"], works[case]))


def main():
    children = {"serve_etfzoo": serve_etfzoo, "serve_torch": serve_torch}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--torch_python", default=sys.executable, help="interpreter with PyTorch")
    parser.add_argument("--child", choices=children, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return children[args.child](args.folder)
    with open("/proc/cpuinfo") as info:
        cpu = re.search(r"model name\s*: (.*)|$", info.read())[1]
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/settings.json", "w") as file:
            names = ("precision", "compile", "device")
            json.dump({name: getattr(args, name) for name in names}, file)
        etfzoo = Worker(__file__, "serve_etfzoo", folder)
        torch = Worker(__file__, "serve_torch", folder, args.torch_python)
        if etfzoo.version == "missing":
            sys.exit("TensorFlow sees no GPU; measure with --device=cpu")
        if torch.version == "missing":
            sys.exit(
                f"{args.torch_python} has no torch, or it sees no GPU; name another with "
                "--torch_python"
            )
        print(
            f"{cpu}, {os.cpu_count()} cores, TensorFlow {etfzoo.version}, torch {torch.version}"
            f"{', compiled' if args.compile else ''}, {args.precision}",
            flush=True,
        )
        for size, batch in STEPS:
            ours, theirs = medians({"etfzoo": etfzoo, "torch": torch}, size, args.rounds).values()
            print(
                f"rn50, {size} px, batch {batch}: etfzoo {ours:.1f} "
                f"{'CPU ms' if args.device == 'cpu' else 'ms'} a step, torch "
                f"{theirs:.1f}, ratio {ours / theirs:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
