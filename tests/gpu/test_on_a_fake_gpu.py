"""The host's side of the CUDA backend as on a GPU: tests/gpu on the GPU of fake_gpu.py, in a process of its own.

There the tests are tested, too: with a line of fastsam broken they have to fail.
"""

import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fastsam
from fastsam import graphs
from fastsam.engine.step import Step
from fastsam.graphs.surroundings import Gpu
from fastsam.kernels import cuda, device

if cuda._cuda is None:
    pytest.skip(f"backend 'cuda': {cuda.unavailable()}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
FAKED = "fake_gpu" in sys.modules

REPLAYS = "a replay does nothing"
MEMORY = "there is no allocator to ask"
ORDER = "everything runs in the order of the calls, whatever the stream"
PROFILER = "the profiler sees no GPU"
LEFT_OUT = {
    "test_gpu.py": {
        "test_the_same_bits_from_run_to_run": "the kernels run on the host: tests/kernels/test_cuda_host.py",
        "test_nothing_is_reserved_or_kept_in_steady_state": MEMORY,
        "test_peak_memory": MEMORY,
        "test_launches_of_a_step": PROFILER,
        "test_streams_that_wait_for_each_other": ORDER,
        "test_optimizers_on_streams_of_their_own": ORDER,
        "test_parameters_on_several_gpus_share_one_norm": "there is one GPU",
        "test_a_gradient_on_another_device_is_refused": "fastsam's C++ asks gradients for their real device",
        "test_a_gpu_older_than_the_compiled_targets_falls_to_triton": "there is no Triton",
    },
    "test_graphs_on_gpu.py": {
        "test_replays_equal_steps": REPLAYS,
        "test_replays_of_the_family_equal_steps": REPLAYS,
        "test_a_loss_from_before_may_be_alive_at_a_capture": REPLAYS,
        "test_a_schedule_does_not_overtake_the_replays_before_it": REPLAYS,
        "test_a_learning_rate_tensor_is_read_by_the_next_replay": REPLAYS,
        "test_an_overflow_changes_nothing_and_the_next_step_counts": REPLAYS,
        "test_a_checkpoint_between_replays_goes_on_in_steps": REPLAYS,
        "test_batches_come_from_pinned_memory": REPLAYS,
        "test_a_capture_that_breaks_leaves_torch_as_it_was": f"{REPLAYS}: below without them",
        "test_one_launch_of_a_graph_a_step": PROFILER,
    },
}
#: The one backend that runs here; the dtype changes nothing for the host.
WHICH = "not triton and not float16 and not float64"
AT_LEAST = 75


if FAKED:

    @pytest.fixture
    def training():
        """A model with dropout, whose parameters are 0.5, its optimizer, a batch."""
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout()).to("cuda")
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.5)
        optimizer = fastsam.FriendlySAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        return model, optimizer, torch.ones(4, 3, device="cuda")

    @pytest.mark.parametrize("when", ["warming up", "capturing"])
    def test_a_capture_that_breaks_leaves_torch_and_training_as_they_were(training, when):
        break_a_capture(*training, when)

    def break_a_capture(model, optimizer, x, when):
        stream = torch.cuda.current_stream()

        def closure(x, breaks=True):
            loss = model(x).square().mean()
            loss.backward()
            if breaks and when == "warming up":
                loss.item()
            if breaks and when == "capturing" and torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize()
            return loss

        with pytest.raises(RuntimeError, match=r"cannot be captured.*(item|synchronize)"):
            graphs.capture(optimizer, closure, x, model=model)
        assert torch.cuda.current_stream() is stream
        assert torch.cuda.get_sync_debug_mode() == 0
        assert not torch.cuda.is_current_stream_capturing()
        assert all(p.eq(0.5).all() for p in model.parameters())
        assert not optimizer.state
        for _ in range(3):  # dropout may have left no gradient in one
            optimizer.step(lambda: closure(x, breaks=False), model=model)
        assert not all(p.eq(0.5).all() for p in model.parameters())
        graphs.capture(optimizer, lambda x: closure(x, breaks=False), x, model=model)

    # ---- with one line broken, the tests fail ----------------------------------------------------------------

    @pytest.fixture
    def replace(monkeypatch):
        """``replace(owner, name, line, broken)`` in the source of a function of fastsam."""

        def replace(owner, name, line, broken):
            function = getattr(owner, name)
            source = textwrap.dedent(inspect.getsource(function))
            assert source.count(line) == 1
            found = {}
            exec(source.replace(line, broken), vars(sys.modules[function.__module__]), found)
            monkeypatch.setattr(owner, name, found[name])

        return replace

    def never_wait():
        import test_gpu  # of tests/gpu, collected before

        test_gpu.test_the_host_never_waits("cuda", "SAM", "SGD momentum")

    def test_a_value_read_in_a_step_is_noticed(replace):
        climb = "space.kernels.climb(space, ascent, total.to(space.device))"
        replace(Step, "climb", climb, f"total[0].item(), {climb}")
        with pytest.raises(RuntimeError, match=r"synchronizing CUDA operation \(item\)"):
            never_wait()

    def test_a_function_that_torch_does_not_have_is_noticed(replace):
        replace(device, "capturing", "cuda.is_current_stream_capturing()", "cuda.is_capturing()")
        with pytest.raises(AttributeError, match="is_capturing"):
            never_wait()

    def test_an_upload_from_pageable_memory_is_noticed(replace):
        replace(device.DeviceTable, "upload", "copy_(values.pin_memory(), non_blocking=True)", "copy_(values)")
        with pytest.raises(RuntimeError, match=r"synchronizing CUDA operation \(a copy"):
            never_wait()

    def test_a_capture_that_is_not_cleared_up_after_is_noticed(replace, training):
        replace(Gpu, "record", "self._clear_up()", "pass")
        with pytest.raises(RuntimeError, match="Offset increment outside graph capture"):
            break_a_capture(*training, "capturing")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            pass

else:

    def test_the_tests_for_gpus_pass():
        left_out = []
        for file, reasons in LEFT_OUT.items():
            source = (ROOT / "tests" / "gpu" / file).read_text()
            for name in reasons:
                assert f"def {name}(" in source, "a test that is left out has another name now"
                left_out.append(f"--deselect=tests/gpu/{file}::{name}")
        options = ["-q", "-p", "no:cacheprovider", "-p", "fake_gpu", "-k", WHICH, *left_out]
        command = [sys.executable, "-m", "pytest", *options, "tests/gpu", "tests/gpu/test_on_a_fake_gpu.py"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "gpu"), str(ROOT / "tests")]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment.pop("FASTSAM_CUDA_ON_HOST", None)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        output = done.stdout[-6000:] + done.stderr[-2000:]
        assert done.returncode == 0, output
        assert int(re.search(r"(\d+) passed", output)[1]) >= AT_LEAST, output
        assert "skipped" not in output, output
