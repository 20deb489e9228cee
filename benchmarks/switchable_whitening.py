"""What SwitchableWhitening costs beside a PyTorch layer and TensorFlow's fused batch norm.

  python benchmarks/switchable_whitening.py --what=layers --torch_python=PATH
  python benchmarks/switchable_whitening.py --what=memory
  python benchmarks/switchable_whitening.py --what=step --rounds=3

layers: forward and backward of one layer. step: a training step of ResNet50, with fused batch norm
at all other places. Times are CPU seconds on one thread, medians over rounds in which the
candidates take turns. The PyTorch layer is built as the authors of Switchable Whitening built
theirs; torch is no dependency, so it may live in another interpreter.

memory: what forward and backward need at their peak beyond the input and the output's gradient.
Measured without oneDNN, whose allocator keeps what was freed and would hide what is used.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile

import numpy as np
from taking_turns import Worker, cpu_seconds, load_tensorflow, medians, serve

SHAPES = ((32, 56, 56, 64), (32, 28, 28, 256), (32, 14, 14, 1024))
MEMORY_SHAPE = (32, 112, 112, 64)
STEPS = ((224, 8), (64, 32))  # image size, batch size
GROUP_SIZE, ITERATIONS, EPSILON = 16, 5, 1e-5  # the layer's defaults

# Freed tensors go back to the system at once, so that the resident set is what is alive.
EXACT_MEMORY = {"TF_ENABLE_ONEDNN_OPTS": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}


def example(shape):
    """Maps with correlated channels and a mean for each sample, and a gradient of the output."""
    rng, (n, h, w, c) = np.random.RandomState(0), shape
    x = rng.randn(*shape) + rng.randn(n, h, w, 1) + rng.randn(n, 1, 1, c)
    return x.astype(np.float32), rng.randn(*shape).astype(np.float32)


def tensorflow_layer(name, channels):
    """A compiled `(x, dy) -> (y, dx, gradients of the weights)`."""
    import tensorflow as tf

    from etfzoo.layers import FusedBatchNormalization, SwitchableWhitening

    layer = SwitchableWhitening() if name == "sw" else FusedBatchNormalization()
    layer.build((None, None, None, channels))

    @tf.function
    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        wanted = [x, *(v.value for v in layer.trainable_variables)]
        return y, *tape.gradient(y, wanted, output_gradients=dy)

    return step


def serve_layers(folder):
    tf, works = load_tensorflow(), {}
    for number, shape in enumerate(SHAPES):
        x, dy = (tf.constant(array) for array in example(shape))
        for name in ("sw", "bn"):
            step = tensorflow_layer(name, shape[-1])
            y, dx, *_ = step(x, dy)
            np.save(f"{folder}/{name}{number}.npy", np.stack([y, dx]))
            works[f"{name} {number}"] = step, x, dy
    serve(tf.__version__, lambda case: cpu_seconds(*works[case]))


def torch_layer(channels):
    """The same function in PyTorch, on `[N, C, H, W]`, with as many passes as the authors' layer"""
    import torch

    c, groups = GROUP_SIZE, channels // GROUP_SIZE
    logits, affine = torch.ones(2, 2), torch.ones(2, channels, 1, 1)
    affine[1] = 0
    weights = [w.requires_grad_() for w in (*logits, *affine)]
    mean_logits, covariance_logits, gamma, beta = weights
    running_mean, running_covariance = torch.zeros(groups, c, 1), torch.eye(c).repeat(groups, 1, 1)

    def moments(maps):
        mean = maps.mean(-1, keepdim=True)
        centred = maps - mean
        return mean, torch.bmm(centred, centred.transpose(1, 2)) / maps.shape[-1]

    def step(x, dy):
        maps = x.view(len(x) * groups, c, -1)
        mean, covariance = moments(maps)
        batch = moments(x.transpose(0, 1).contiguous().view(groups, c, -1))
        with torch.no_grad():
            for running, new in zip((running_mean, running_covariance), batch, strict=True):
                running.mul_(0.99).add_(new, alpha=0.01)
        batch_mean, batch_covariance = (b.repeat(len(x), 1, 1) for b in batch)
        w, v = mean_logits.softmax(0), covariance_logits.softmax(0)
        mean = w[0] * batch_mean + w[1] * mean
        covariance = v[0] * batch_covariance + v[1] * covariance + EPSILON * torch.eye(c)
        scale = 1 / covariance.diagonal(dim1=1, dim2=2).sum(-1).view(-1, 1, 1)
        normalized, p = covariance * scale, torch.eye(c).expand_as(covariance)
        for _ in range(ITERATIONS):
            p = torch.baddbmm(p, torch.matrix_power(p, 3), normalized, beta=1.5, alpha=-0.5)
        y = torch.bmm(p * scale.sqrt(), maps - mean).view(x.shape) * gamma + beta
        return y.detach(), *torch.autograd.grad(y, (x, *weights), dy)

    return step


def serve_torch(folder):
    try:
        import torch
    except ImportError:
        return print("missing")
    torch.set_num_threads(1)
    works = {}
    for number, shape in enumerate(SHAPES):
        x, dy = (torch.from_numpy(a).permute(0, 3, 1, 2).contiguous() for a in example(shape))
        x.requires_grad_()
        step = torch_layer(shape[-1])
        y, dx, *_ = step(x, dy)
        np.save(f"{folder}/torch{number}.npy", torch.stack([y, dx]).permute(0, 1, 3, 4, 2).numpy())
        works[f"torch {number}"] = step, x, dy
    serve(torch.__version__, lambda case: cpu_seconds(*works[case]))


def memory(key):
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(rf"^{key}:\s*(\d+) kB", status.read(), re.MULTILINE)[1])


def serve_memory(folder):
    tf, (n, h, w, c) = load_tensorflow(), MEMORY_SHAPE

    def peak(name):
        step = tensorflow_layer(name, c)
        small = tf.ones((n, h // 8, w // 8, c))
        step(small, small)
        x, dy = (tf.random.stateless_normal(MEMORY_SHAPE, (0, i)) for i in range(2))
        step.get_concrete_function(x, dy)
        # The peak so far is forgotten; where that is not allowed, it is below the one to come.
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
        before = memory("VmRSS")
        y, *_ = step(x, dy)
        return (memory("VmHWM") - before) / y.numpy().nbytes

    serve(tf.__version__, peak)


def serve_steps(folder):
    import keras

    import etfzoo
    from etfzoo.runtime import step_tf

    tf, works, rng = load_tensorflow(), {}, np.random.RandomState(0)
    for size, batch in STEPS:
        images = tf.constant(rng.randint(256, size=(batch, size, size, 3), dtype=np.uint8))
        labels = tf.constant(rng.randint(1000, size=batch), tf.int32)
        for norm in ("sw", "bn"):
            model = etfzoo.build_classifier("rn50", 1000, "linear", norm, (size, size, 3))
            kinds = [type(layer).__name__ for layer in model.layers]
            assert kinds.count("SwitchableWhitening") == (7 if norm == "sw" else 0), kinds
            optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
            stepper = step_tf.Stepper(model, optimizer, tf.distribute.get_strategy(), 1e-4)
            batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
            stepper.train(batches).numpy()
            works[f"{norm} {size}"] = stepper.train, batches
    serve(tf.__version__, lambda case: cpu_seconds(*works[case]))


def compare_layers(folder, args):
    workers = dict.fromkeys(("sw", "bn"), Worker(__file__, "serve_layers", folder))
    print(f"TensorFlow {workers['sw'].version}", flush=True)
    torch = Worker(__file__, "serve_torch", folder, args.torch_python)
    if torch.version != "missing":
        workers["torch"] = torch
        for number, shape in enumerate(SHAPES):
            ours, theirs = (np.load(f"{folder}/{name}{number}.npy") for name in ("sw", "torch"))
            y, dx = abs(ours - theirs).max((1, 2, 3, 4))
            print(f"{shape}: SW and torch {torch.version} differ by {y:.1e} in y, {dx:.1e} in dx")
            if not max(y, dx) < 1e-3:
                sys.exit("which is too much")
    print("\n| shape | SW ms | torch SW ms | fused BN ms | SW / torch | SW / fused BN |")
    print("|---|---|---|---|---|---|")
    for number, shape in enumerate(SHAPES):
        ms = medians(workers, number, args.rounds)
        sw, bn, theirs, ratio = ms["sw"], ms["bn"], "not measured", "not measured"
        if "torch" in ms:
            theirs, ratio = f"{ms['torch']:.1f}", f"{sw / ms['torch']:.2f}"
        print(f"| {shape} | {sw:.1f} | {theirs} | {bn:.1f} | {ratio} | {sw / bn:.1f} |", flush=True)


def compare_memory(folder, args):
    print(f"peak beyond the inputs at {MEMORY_SHAPE}, in units of the input:")
    for name in ("sw", "bn"):
        worker = Worker(__file__, "serve_memory", folder, **EXACT_MEMORY)
        print(f"{name} {worker.ask(name):.2f} (TensorFlow {worker.version})", flush=True)


def compare_steps(folder, args):
    workers = dict.fromkeys(("sw", "bn"), Worker(__file__, "serve_steps", folder))
    print(f"TensorFlow {workers['sw'].version}", flush=True)
    for size, batch in STEPS:
        sw, bn = medians(workers, size, args.rounds).values()
        print(f"rn50, {size} px, batch {batch}: sw {sw:.0f} CPU ms a step, ", end="")
        print(f"bn {bn:.0f}, ratio {sw / bn:.3f}", flush=True)


def main():
    comparisons = {"layers": compare_layers, "memory": compare_memory, "step": compare_steps}
    children = {f.__name__: f for f in (serve_layers, serve_torch, serve_memory, serve_steps)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=comparisons, default="layers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch_python", default=sys.executable, help="interpreter with PyTorch")
    parser.add_argument("--child", choices=children, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return children[args.child](args.folder)
    with open("/proc/cpuinfo") as info:
        cpu = re.search(r"model name\s*: (.*)|$", info.read())[1]
    print(f"{cpu}, {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        comparisons[args.what](folder, args)


if __name__ == "__main__":
    main()
