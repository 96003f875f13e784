"""What holds for every backend, on the CUDA kernels' own code: whole test files again, with another ``backend``."""

import pytest

from fastsam.kernels import cuda

if cuda._cuda is None:
    pytest.skip(f"backend 'cuda': {cuda.unavailable()}", allow_module_level=True)

from test_accumulation import *  # noqa: F403
from test_amp import *  # noqa: F403
from test_clipping import *  # noqa: F403
from test_closure import *  # noqa: F403
from test_model_state import *  # noqa: F403
from test_random_programs import *  # noqa: F403
from test_resume import *  # noqa: F403
from test_schedules import *  # noqa: F403


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setenv("FASTSAM_CUDA_ON_HOST", "1")
    return "cuda"
