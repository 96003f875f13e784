import pytest
import torch.distributed as dist
from rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks():
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without torch.distributed's gloo")
    pool = RankPool()
    yield pool
    pool.close()
