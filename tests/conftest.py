import gc
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

import fastsam

# For `import reference`, and for suites that run another folder's tests again, in any import mode.
sys.path[:0] = [str(Path(__file__).parent), *map(str, sorted(Path(__file__).parent.glob("[a-z]*/")))]
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a network for anything

hypothesis.settings.register_profile(
    "fastsam", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("fastsam")


def require_backend(name):
    """Skip the running test, with the reason that fastsam itself gives, where a backend is missing."""
    status = fastsam.backends()[name]
    if status != "available":
        pytest.skip(f"backend {name!r}: {status}")
    return name


@pytest.fixture(params=["torch", "cpu"])
def backend(request):
    return require_backend(request.param)


@pytest.fixture
def cpu():
    return require_backend("cpu")


@pytest.fixture(scope="session")
def ranks():
    """The pool of processes of tests/distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch was built without torch.distributed's gloo")
    from rank_pool import RankPool

    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True, scope="module")
def what_was_there_before_is_not_collected():
    """Some tests ask for dozens of full collections: they need not go through all modules and all other tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # at Python's end some libraries complain of what was not collected


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems run fastest on one thread; a test that wants more says so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
