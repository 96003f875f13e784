"""A rank that is killed: torchrun starts the run again from its checkpoint; without it nobody waits for ever."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import lost_rank
import pytest
import torch.distributed as dist
from rank_pool import _free_port

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (hasattr(signal, "SIGSTOP") and dist.is_available() and dist.is_gloo_available()),
    reason="needs torch.distributed's gloo, and a system with SIGSTOP",
)
# Else a restarted process may find its peers' former addresses in the store (pytorch/pytorch#135712).
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
STEPS, SAVE_EVERY, KILLED_IN = 8, 3, 5


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")

    def launch(folder, parallel, *wrapper):
        arguments = f"--folder {folder} --parallel {parallel} --steps {STEPS} --save-every {SAVE_EVERY} --batch-size 16"
        run = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
             *wrapper, "examples/distributed_vit.py", *arguments.split()],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=200,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()], run.stderr

    return launch


def test_a_killed_rank_has_the_run_go_on_from_its_checkpoint_with_the_losses_of_an_undisturbed_one(example, tmp_path):
    undisturbed, _ = example(tmp_path / "undisturbed", "fsdp2")
    wrapper = [str(Path(__file__).with_name("killed_in_a_step.py")), "1", str(KILLED_IN)]
    killed, messages = example(tmp_path / "killed", "fsdp2", *wrapper)
    assert "exitcode: -9" in messages
    steps = [entry["step"] for entry in killed]
    assert steps == [*range(1, KILLED_IN), *range(SAVE_EVERY + 1, STEPS + 1)], "it went on after the checkpoint"
    losses = {entry["step"]: entry["loss"] for entry in undisturbed}
    assert [entry["loss"] for entry in killed] == [losses[step] for step in steps]


def test_a_rank_that_stands_still_is_an_error_on_the_other_within_the_timeout():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = ("DDP", f"tcp://127.0.0.1:{_free_port()}", theirs)
    processes = [context.Process(target=lost_rank.train, args=(rank, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        assert ours.poll(120), "rank 0 waits for ever"  # starting Python takes most of it; the group's timeout is 5 s
        message, restored, passes = ours.recv()
    finally:
        for process in processes:
            process.kill()
    assert passes == 4, "it was the second pass of the second step"
    assert restored
    assert "Timed out waiting 5000ms" in message
