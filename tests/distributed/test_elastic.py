"""A rank that is killed: torchrun starts the run again from its checkpoint; without it nobody waits for ever."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lost_rank
import pytest
import torch.distributed as dist
from free_port import free_port
from rank_pool import CONTEXT

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (hasattr(signal, "SIGSTOP") and dist.is_available() and dist.is_gloo_available()),
    reason="needs torch.distributed's gloo, and a system with SIGSTOP",
)
# Else a restarted process may find its peers' former addresses in the store (pytorch/pytorch#135712).
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
STEPS, SAVE_EVERY, KILLED_IN = 9, 4, 8


def test_a_killed_rank_has_the_run_go_on_from_its_checkpoint_with_the_losses_of_before(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    wrapper = [str(Path(__file__).with_name("killed_in_a_step.py")), "1", str(KILLED_IN)]
    arguments = f"--folder {tmp_path} --parallel fsdp2 --steps {STEPS} --save-every {SAVE_EVERY} --batch-size 16"
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
         *wrapper, "examples/distributed_vit.py", *arguments.split()],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "exitcode: -9" in run.stderr
    taken = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    before, after = taken[: KILLED_IN - 1], taken[KILLED_IN - 1 :]
    assert [entry["step"] for entry in before] == [*range(1, KILLED_IN)]
    assert [entry["step"] for entry in after] == [*range(SAVE_EVERY + 1, STEPS + 1)], "it went on after the checkpoint"
    again = before[SAVE_EVERY:]
    assert after[: len(again)] == again


def test_a_rank_that_stands_still_is_an_error_on_the_other_within_the_timeout():
    ours, theirs = CONTEXT.Pipe()
    arguments = ("DDP", f"tcp://127.0.0.1:{free_port()}", theirs)
    processes = [CONTEXT.Process(target=lost_rank.train, args=(rank, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        assert ours.poll(120), "rank 0 waits for ever"  # starting Python takes most of it
        message, restored, passes = ours.recv()
    finally:
        for process in processes:
            process.kill()
    assert passes == 4, "it was the second pass of the second step"
    assert restored
    assert "Timed out waiting 5000ms" in message
