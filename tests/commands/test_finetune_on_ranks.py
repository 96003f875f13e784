"""``fastsam finetune`` on two processes: the steps of one, under FSDP2 and after a kill, and wrong input on all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("sklearn")

from networks import save_tiny_vit
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
COMMON = ["--device", "cpu", "--batch-size", "100", "--epochs", "1", "--optimizer", "sgd", "--lr", "0.05"]
DOUBLE = [*COMMON, "--epochs", "2", "--model", "networks:double", "--method", "fsam"]  # a test between the two
VIT = [*COMMON, "--model", "{vit}", "--method", "sam", "--save-every", "2", "--label-smoothing", "0.1"]
# What ``accelerate launch`` sets for an FSDP2 config.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "ViTLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
JOBS = {
    "one": (1, DOUBLE, {}),
    "two": (2, [*DOUBLE, "--accumulate", "5"], {}),
    "vit": (1, VIT, {}),
    "sharded, killed": (2, VIT, {"environment": FSDP2, "kill_at": 10}),  # in step 5, of two passes each
    "sharded, then whole": (1, VIT, {"output": "sharded, killed"}),
    "sharded, again": (2, VIT, {"environment": FSDP2, "output": "sharded, killed"}),
    "other data": (2, [*COMMON, "--data", "{folder}/data {rank}"], {}),
    "fails on one": (2, [*COMMON, "--model", "networks:only_on_the_first"], {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What every job left; one process imports everything for all of them."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without torch.distributed's gloo")
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_vit(folder / "a vit", 10, [0.5], [0.5], num_channels=1)
    for rank, classes in enumerate(("ab", "abc")):
        images(folder / f"data {rank}", classes)
    jobs = []
    for name, (ranks, arguments, more) in JOBS.items():
        named = [a.replace("{vit}", str(folder / "a vit")).replace("{folder}", str(folder)) for a in arguments]
        output = ["--output", str(folder / more.get("output", name))]
        jobs.append({**more, "name": name, "ranks": ranks, "arguments": [*named, *output]})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "400"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, HERE, HERE.parent / "distributed"]))
    command = [sys.executable, str(HERE / "finetune_on_ranks.py"), str(folder)]
    run = subprocess.run(
        command, input=json.dumps(jobs), env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode == 0, run.stderr
    return folder


def images(folder, classes):
    from PIL import Image

    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(100):
            Image.new("L", (8, 8), i).save(folder / name / f"{i}.png")


def statuses(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def said(folder, name, rank=0):
    return (folder / f"{name}.{rank}.txt").read_text()


def weights(folder, name):
    return load_file(folder / name / "model" / "model.safetensors")


def test_two_processes_end_with_the_weights_and_the_accuracy_of_one(folder):
    """The two of them in micro-batches as well."""
    assert statuses(folder, "one") == [0], said(folder, "one")
    assert statuses(folder, "two") == [0, 0], said(folder, "two") + said(folder, "two", 1)
    one, two = weights(folder, "one"), weights(folder, "two")
    assert one["head.weight"].dtype == torch.float64
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-10)
    results = [json.loads((folder / run / "result.json").read_text()) for run in ("one", "two")]
    assert results[0]["test_accuracy"] == results[1]["test_accuracy"]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], abs=1e-9), "797 images, in uneven batches"
    assert [result["processes"] for result in results] == [1, 2]
    assert "accuracy" in said(folder, "two") and "accuracy" not in said(folder, "two", 1), "the first one speaks"


def test_a_sharded_run_that_was_killed_in_a_step_ends_as_one_process_does(folder):
    assert statuses(folder, "vit") == [0], said(folder, "vit")
    assert -signal.SIGKILL in statuses(folder, "sharded, killed")
    assert statuses(folder, "sharded, again") == [0, 0], said(folder, "sharded, again")
    assert "going on from step 4 of 10" in said(folder, "sharded, again")
    one, sharded = weights(folder, "vit"), weights(folder, "sharded, killed")
    for key, value in one.items():
        torch.testing.assert_close(sharded[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, says",
    [
        ("sharded, then whole", "checkpoint-4 was written under it, and this run is without FSDP: start it as before"),
        ("other data", "process 1 of 2 has"),
        ("fails on one", "only_on_the_first(10) failed: no such disk here"),
    ],
)
def test_what_cannot_be_used_ends_every_process_with_the_reason(folder, name, says):
    found = statuses(folder, name)
    assert found == [1] * len(found)
    for rank in range(len(found)):
        message = said(folder, name, rank)
        assert "fastsam finetune: " in message and says in message and "Traceback" not in message
    assert name == "sharded, then whole" or not (folder / name / "checkpoint.pt").exists()
