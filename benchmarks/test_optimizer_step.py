"""pytest-benchmark cases, for comparing one commit with another (not collected by a plain ``pytest``):

    pytest benchmarks --benchmark-only
    pytest benchmarks --benchmark-only --benchmark-autosave       # and later --benchmark-compare

Both passes see the same gradients here, so that a whole step is one call. The full comparison, with new
gradients for each pass, interleaving and the bandwidth, is ``python -m benchmarks.optimizer_step``.
"""

import pytest

from fastsam.commands.bench import rivals
from fastsam.commands.bench.gradients import GradientSequence
from fastsam.commands.bench.parameter_sets import parameter_set
from fastsam.commands.bench.settings import DEFAULT_METHODS

NAMES = [name for name in rivals.implementation_names() if name not in ("compiled", "fastsam-triton")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", DEFAULT_METHODS)
@pytest.mark.parametrize("set_name", ["resnet18", "tiny2000"])
def test_step(benchmark, set_name, method, name):
    shapes = parameter_set(set_name)
    weights, eigenvector = shapes.random(seed=0, scale=0.02), shapes.random(seed=3, scale=1e-3)
    try:
        runner = rivals.build(name, method, "sgd", shapes.module(weights), eigenvector)
    except rivals.NotOffered as reason:
        pytest.skip(str(reason))
    gradients = GradientSequence(shapes)

    def step():
        runner.optimizer.first_step()
        runner.optimizer.second_step()

    benchmark.group = f"{set_name} {method}"
    benchmark.pedantic(step, setup=lambda: runner.load_gradients(gradients.next()), rounds=10, warmup_rounds=3)
