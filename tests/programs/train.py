"""A training loop on the CPU that says what it has learned: train.py FOLDER [STEPS]

After each step FOLDER/steps is as long as steps were made (it is not open: a checkpoint would say how long it is). When
FOLDER/check is there, or after STEPS, all losses go into FOLDER/losses, one a line, and it ends. With numpy, or without it.
"""
import os
import random
import sys

folder = sys.argv[1]
limit = int(sys.argv[2]) if len(sys.argv) > 2 else None
random.seed(7)
losses = []

try:
    import numpy
except ImportError:
    numpy = None


def with_numpy():
    state = numpy.random.RandomState(7)
    first, second = state.randn(16, 64) * 0.3, state.randn(64, 1) * 0.3
    true = state.randn(16, 1)
    while True:
        x = state.randn(128, 16)
        y = numpy.tanh(x @ true) + 0.01 * state.randn(128, 1)
        hidden = numpy.tanh(x @ first)
        error = hidden @ second - y
        yield float((error * error).mean())
        back = (error @ second.T) * (1 - hidden * hidden)
        second -= 0.05 * (hidden.T @ error) / len(x)
        first -= 0.05 * (x.T @ back) / len(x)


def without():
    weights = [random.gauss(0, 1) for _ in range(32)]
    true = [random.gauss(0, 1) for _ in range(32)]
    while True:
        total, slope = 0.0, [0.0] * 32
        for _ in range(32):
            x = [random.gauss(0, 1) for _ in range(32)]
            error = sum(a * (b - c) for a, b, c in zip(x, weights, true)) + random.gauss(0, 0.01)
            total += error * error
            slope = [s + error * a for s, a in zip(slope, x)]
        yield total / 32
        weights = [w - 0.01 * s / 32 for w, s in zip(weights, slope)]


steps, check = os.path.join(folder, "steps"), os.path.join(folder, "check")
open(steps, "w").close()
for loss in with_numpy() if numpy else without():
    losses.append(repr(loss))
    os.truncate(steps, len(losses))
    if os.path.exists(check) or len(losses) == limit:
        break
half = os.path.join(folder, "losses.new")
with open(half, "w") as out:
    out.write("\n".join([("numpy" if numpy else "python")] + losses))
os.rename(half, os.path.join(folder, "losses"))
