"""``fastsam finetune``: killed and resumed, wrong input, and the model that comes out of it."""

from __future__ import annotations

import csv
import errno
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("sklearn")

from networks import save_tiny_vit
from safetensors.torch import load_file

import fastsam.loop.checkpoint
from fastsam import graphs
from fastsam.commands.cli import app
from fastsam.commands.finetune import batches, folders, groups, job, model, record, trainer
from fastsam.commands.finetune.interruption import Interrupted, OutOfMemory, memory_watched
from fastsam.commands.finetune.settings import METHODS, Settings
from fastsam.commands.training import pretrained
from fastsam.commands.training.data import DataError
from fastsam.support import memory

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """A folder of 24 colour images of 12 x 10 pixels in 3 classes, which differ by their colour, and 9 for testing."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("birds")
    noise = random.Random(0)
    for split, count in (("train", 8), ("test", 3)):
        for channel, name in enumerate(("finch", "gull", "jay")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (12, 10))
                for x in range(12):
                    for y in range(10):
                        pixel = [noise.randrange(90) for _ in range(3)]
                        pixel[channel] += 150
                        image.putpixel((x, y), tuple(pixel))
                image.save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny vision transformer with dropout, of 5 classes, as ``save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_tiny_vit(folder, 5, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], hidden_dropout_prob=0.1)
    return folder


def settings(birds, checkpoint, output, **changes):
    options = dict(epochs=3, batch_size=8, lr=1e-2, device="cpu", save_every=2)
    return Settings(model=str(checkpoint), data=str(birds), output=output, **{**options, **changes})


def finetune(*arguments):
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)], env={"COLUMNS": "400"})


def weights(output, name="model"):
    return load_file(output / name / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def curve(output):
    """What the metrics say of the training, without times and memory."""
    with (output / "metrics.csv").open(newline="") as file:
        columns = ("step", "epoch", "loss", "lr", "test_loss", "test_accuracy")
        return [[row[c] for c in columns] for row in csv.DictReader(file)]


# ---- killed and resumed ------------------------------------------------------------------------------------------

# Runs the command once for each number: the process kills itself in the forward pass of that number, of which a step of
# two passes has two. Forked from one that has imported everything, which is what takes long.
KILLED = """
import os, signal, sys
import datasets, transformers
from transformers import ViTForImageClassification
from fastsam.commands.cli import main
count, forward = 0, ViTForImageClassification.forward
def counted(*arguments, **options):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*arguments, **options)
ViTForImageClassification.forward = counted
numbers, sys.argv[:] = sys.argv[1].split(), ["fastsam", *sys.argv[2:]]
for at in map(int, numbers):
    if os.fork() == 0:
        main()
    print("ended by", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.mark.parametrize(
    "method, kills, options",
    [
        ("fsam", 3, ["--optimizer", "adamw", "--random-crop", "1", "--flip", "--cutout", "3", "--label-noise", "0.2"]),
        ("eigen-sam", 1, ["--optimizer", "sgd", "--freq", "3", "--precision", "bf16", "--accumulate", "2"]),
    ],
)
def test_sigkill_at_random_steps_changes_no_bit(birds, checkpoint, tmp_path, method, kills, options):
    """Dropout, augmentation, schedule, averages: the weights and the curve are those of an undisturbed run."""
    command = ["--model", checkpoint, "--data", birds, "--method", method, "--epochs", 6, "--batch-size", 8]
    command = list(map(str, [*command, "--lr", "0.01", "--save-every", "2", *options]))
    undisturbed = tmp_path / "undisturbed"
    assert finetune(*command, "--output", undisturbed).exit_code == 0
    output, chosen = tmp_path / "killed", random.Random(method)
    numbers = " ".join(str(chosen.randrange(6, 16)) for _ in range(kills))  # of 18 steps
    killed = [sys.executable, "-c", KILLED, numbers, "finetune", *command, "--output", str(output)]
    run = subprocess.run(killed, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert run.stdout.count(f"ended by {-signal.SIGKILL}") == kills, run.stdout + run.stderr
    assert not (output / "result.json").exists()
    last = finetune(*command, "--output", output)
    assert last.exit_code == 0, last.output
    assert "going on from step" in last.output
    assert same(weights(output), weights(undisturbed))
    assert same(weights(output, "best"), weights(undisturbed, "best"))
    assert curve(output) == curve(undisturbed)
    results = [json.loads((folder / "result.json").read_text()) for folder in (output, undisturbed)]
    assert results[0]["best_epoch"] == results[1]["best_epoch"]


def test_ctrl_c_saves_and_says_how_to_go_on(birds, checkpoint, tmp_path, monkeypatch):
    undisturbed = job.run(settings(birds, checkpoint, tmp_path / "undisturbed", save_every=None))
    asked = settings(birds, checkpoint, tmp_path / "stopped", save_every=None)
    train_on = trainer.Finetuning.get_batch_samples

    def interrupted(self, *batch):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return train_on(self, *batch)

    monkeypatch.setattr(trainer.Finetuning, "get_batch_samples", interrupted)
    with pytest.raises(Interrupted, match=r"stopped at step 5 of 9, all of it saved .* same command goes on"):
        job.run(asked)
    monkeypatch.setattr(trainer.Finetuning, "get_batch_samples", train_on)
    result = job.run(asked)
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "undisturbed"))
    assert result["test_loss"] == undisturbed["test_loss"]


@pytest.mark.parametrize("method", ["none", "fsam"])
def test_out_of_memory_loses_nothing_and_says_what_to_lower(birds, checkpoint, tmp_path, monkeypatch, method):
    """In the second step's last pass; the run goes on in two parts of half the size."""
    from transformers import ViTForImageClassification

    forward, calls = ViTForImageClassification.forward, []

    def scarce(self, pixel_values=None, **options):
        calls.append(len(pixel_values))
        if len(calls) > 3 and len(pixel_values) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a lot")
        return forward(self, pixel_values=pixel_values, **options)

    plain = settings(birds, checkpoint, tmp_path / "plain", method=method, save_every=None)
    job.run(plain)
    monkeypatch.setattr(ViTForImageClassification, "forward", scarce)
    short = settings(birds, checkpoint, tmp_path / "short", method=method, save_every=None)
    with pytest.raises(OutOfMemory, match=r"8 images at once \(CUDA out of memory\).* saved: with --accumulate 2 or"):
        job.run(short)
    saved = torch.load(tmp_path / "short" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == (3 if method == "none" else 1)
    assert [path.name for path in (tmp_path / "short").glob("checkpoint-*")] == [f"checkpoint-{saved['step']}"]
    result = job.run(settings(birds, checkpoint, tmp_path / "short", method=method, save_every=None, accumulate=2))
    assert result["steps"] == 9 and max(calls[-20:]) == 4


def test_the_message_of_torch_for_the_memory_of_a_cpu_is_understood():
    with pytest.raises(OutOfMemory, match=r"^you tried to allocate 4000000000000000 bytes"), memory_watched():
        torch.empty(10**15)


def test_a_run_of_a_version_that_did_not_know_a_setting_goes_on_with_its_default(birds, checkpoint, tmp_path):
    undisturbed = settings(birds, checkpoint, tmp_path / "undisturbed")
    job.run(undisturbed)
    asked = settings(birds, checkpoint, tmp_path / "old", save_every=2)
    stop_after(4, asked)
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in ("image_size", "gamma", "theta", "k")}))
    with pytest.raises(ValueError, match="a run with image_size=None, and this one has image_size=12"):
        job.run(settings(birds, checkpoint, tmp_path / "old", image_size=12))
    job.run(asked)
    assert same(weights(tmp_path / "old"), weights(tmp_path / "undisturbed"))
    assert curve(tmp_path / "old") == curve(tmp_path / "undisturbed")


def stop_after(step, asked):
    """Runs it until this step has been saved."""
    with pytest.MonkeyPatch.context() as patch:
        on_save = record.Record.on_save

        def saved(self, arguments, state, control, **options):
            on_save(self, arguments, state, control, **options)
            if state.global_step == step:
                raise KeyboardInterrupt

        patch.setattr(record.Record, "on_save", saved)
        with pytest.raises(KeyboardInterrupt):
            job.run(asked)
        assert torch.load(asked.output / "checkpoint.pt", weights_only=True)["step"] == step


def test_a_kill_between_the_row_of_an_epoch_and_its_checkpoint_leaves_one_row(birds, checkpoint, tmp_path, monkeypatch):
    undisturbed = settings(birds, checkpoint, tmp_path / "undisturbed", save_every=1)
    job.run(undisturbed)
    asked = settings(birds, checkpoint, tmp_path / "killed", save_every=1)
    measured = record.Show.measured

    def killed(self, row):
        if row["step"] == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(record.Show, "measured", killed)
    with pytest.raises(KeyboardInterrupt):
        job.run(asked)
    monkeypatch.setattr(record.Show, "measured", measured)
    job.run(asked)
    assert curve(tmp_path / "killed") == curve(tmp_path / "undisturbed")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_lost_within_an_epoch_ends_the_run_and_loses_no_step(
    birds, checkpoint, tmp_path, monkeypatch, workers
):
    monkeypatch.setattr(batches, "SHARE_OF_MEMORY", 0.0)
    shutil.copytree(birds, tmp_path / "birds")
    file, train_on = tmp_path / "birds" / "train" / "jay" / "3.png", trainer.Finetuning.get_batch_samples
    job.run(settings(birds, checkpoint, tmp_path / "undisturbed"))
    asked = settings(tmp_path / "birds", checkpoint, tmp_path / "lost", save_every=None, workers=workers)

    def lost(self, *batch):
        if self.state.global_step == 4:
            file.rename(tmp_path / "3.png")
        return train_on(self, *batch)

    monkeypatch.setattr(trainer.Finetuning, "get_batch_samples", lost)
    with pytest.raises(
        DataError, match=r"jay.3\.png does not open as an image: .*No such file.* Step (\d) is saved"
    ) as e:
        job.run(asked)
    assert torch.load(tmp_path / "lost" / "checkpoint.pt", weights_only=True)["step"] > 4, e
    monkeypatch.setattr(trainer.Finetuning, "get_batch_samples", train_on)
    with pytest.raises(ValueError, match="train_images=24, and this one has train_images=23"):
        job.run(asked)
    (tmp_path / "3.png").rename(file)
    job.run(asked)
    assert same(weights(tmp_path / "lost"), weights(tmp_path / "undisturbed"))


def test_a_worker_that_is_killed_is_said_and_loses_no_step(birds, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "SHARE_OF_MEMORY", 0.0)
    decode, here = batches.open_image, os.getpid()

    def killed(dataset, index):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(dataset, index)

    monkeypatch.setattr(batches, "open_image", killed)
    with pytest.raises(
        DataError, match=r"decodes images ended .*DataLoader worker.*: say --workers 0.* Step 0 is saved"
    ):
        job.run(settings(birds, checkpoint, tmp_path, workers=1))
    assert job.run(settings(birds, checkpoint, tmp_path, workers=0))["steps"] == 9


def test_another_test_set_is_another_run(birds, checkpoint, tmp_path):
    shutil.copytree(birds, tmp_path / "birds")
    asked = settings(tmp_path / "birds", checkpoint, tmp_path / "run", epochs=1)
    job.run(asked)
    (tmp_path / "birds" / "test" / "jay" / "0.png").unlink()
    with pytest.raises(ValueError, match="test_images=9, and this one has test_images=8"):
        job.run(asked)


def test_a_second_run_in_the_same_folder_is_told_so(birds, checkpoint, tmp_path):
    code = "import sys; from fastsam.commands.training.run import RunFolder; run = RunFolder(sys.argv[1], {})"
    command = [sys.executable, "-c", f"{code}; print(flush=True); input()", str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as first:
        first.stdout.readline()
        run = finetune("--model", checkpoint, "--data", birds, "--batch-size", 8, "--output", tmp_path)
        first.communicate(b"\n")
    assert run.exit_code == 1
    assert run.stderr.startswith(f"fastsam finetune: another process is at work in {tmp_path}: wait for it")


def test_a_run_that_is_finished_is_shown_not_repeated(birds, checkpoint, tmp_path, monkeypatch):
    asked = settings(birds, checkpoint, tmp_path / "run", epochs=1)
    result = job.run(asked)
    monkeypatch.setattr(trainer.Finetuning, "get_batch_samples", None)
    assert job.run(asked) == result == json.loads((tmp_path / "run" / "result.json").read_text())
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{100 * result['test_accuracy']:.2f} %" in page and "data:image/png;base64," in page


# ---- at another resolution -------------------------------------------------------------------------------------------

TINY = dict(
    image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    initializer_range=0.2,
)  # fmt: skip
DINO = {name: TINY[name] for name in ("image_size", "patch_size", "hidden_size", "num_hidden_layers")}
CONVNEXT = dict(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)
HIERA = dict(image_size=[32, 32], embed_dim=8, num_heads=[1] * 4, depths=[1] * 4)
PERCEIVER = dict(
    image_size=8, num_latents=4, d_latents=16, num_self_attends_per_block=1, num_self_attention_heads=2,
    num_cross_attention_heads=1,
)  # fmt: skip
SWIN = dict(image_size=8, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=2)


def saved_classifier(folder, kind, classes="abc", **options):
    """A small new model as ``save_pretrained`` writes it, of ``classes``, without an image processor."""
    import transformers

    torch.manual_seed(0)
    kind, _, variant = kind.partition("-")
    named = {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    config = getattr(transformers, f"{kind}Config")(**options, **named)
    built = getattr(transformers, f"{kind}ForImageClassification{variant}")(config).eval()
    built.save_pretrained(folder)
    return built


@pytest.mark.parametrize(
    "kind, options",
    [
        ("ViT", TINY),
        ("DeiT", TINY),  # two tokens before the patches
        ("CLIP", {"vision_config": TINY}),  # an nn.Embedding for the positions
        ("Siglip", {"vision_config": TINY}),  # no token before them
        ("Dinov2WithRegisters", {**DINO, "num_attention_heads": 2}),
        ("Swin", {**SWIN, "use_absolute_embeddings": True}),
        ("ConvNext", {**CONVNEXT, "patch_size": 2}),  # no positions
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("side", [4, 20])
def test_a_resized_model_is_the_one_that_interpolates_as_it_runs(tmp_path, kind, options, side):
    """Its logits are, also when Transformers alone opens what is saved of it."""
    from transformers import AutoModelForImageClassification

    original = saved_classifier(tmp_path / "original", kind, **options)
    resized, preparation = model.load(str(tmp_path / "original"), list("abc"), None, lambda _: None, side)
    folders.save(resized, preparation.processor, tmp_path / "resized", 0)
    images = torch.randn(2, 3, side, side)
    at_run_time = {} if kind in ("Dinov2WithRegisters", "ConvNext") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = original(pixel_values=images, **at_run_time).logits
        reopened = AutoModelForImageClassification.from_pretrained(tmp_path / "resized")
        torch.testing.assert_close(reopened.eval()(pixel_values=images).logits, expected)


def test_position_embeddings_are_interpolated_and_the_class_token_is_not(checkpoint):
    before = load_file(checkpoint / "model.safetensors")["vit.embeddings.position_embeddings"]
    vit = model.load(str(checkpoint), list("abcde"), None, lambda _: None, 20)[0]
    after = vit.vit.embeddings.position_embeddings.detach()
    assert after.shape == (1, 1 + 5 * 5, 16)
    assert torch.equal(after[:, :1], before[:, :1])
    grid = before[:, 1:].reshape(1, 2, 2, 16).permute(0, 3, 1, 2)
    bicubic = torch.nn.functional.interpolate(grid, size=(5, 5), mode="bicubic", align_corners=False)
    torch.testing.assert_close(after[:, 1:], bicubic.flatten(2).transpose(1, 2))


def test_a_run_at_another_size_is_saved_and_resumed_at_it(birds, checkpoint, tmp_path, monkeypatch):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    undisturbed = job.run(settings(birds, checkpoint, tmp_path / "undisturbed", image_size=12))
    train_on = trainer.Finetuning.get_batch_samples

    def interrupted(self, *batch):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        parts, items = train_on(self, *batch)
        assert parts[0]["pixel_values"].shape[2:] == (12, 12)
        return parts, items

    monkeypatch.setattr(trainer.Finetuning, "get_batch_samples", interrupted)
    with pytest.raises(Interrupted):
        job.run(settings(birds, checkpoint, tmp_path / "run", image_size=12))
    with pytest.raises(ValueError, match="a run with image_size=12, and this one has image_size=None"):
        job.run(settings(birds, checkpoint, tmp_path / "run"))
    monkeypatch.setattr(trainer.Finetuning, "get_batch_samples", train_on)
    assert (
        job.run(settings(birds, checkpoint, tmp_path / "run", image_size=12))["test_loss"] == undisturbed["test_loss"]
    )
    assert same(weights(tmp_path / "run"), weights(tmp_path / "undisturbed"))
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / "model", backend="pil")
    pixels = processor(torch.zeros(3, 10, 7, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 12, 12) and saved(pixels).logits.shape == (1, 3)


def test_small_vit_is_built_for_the_size_that_is_asked_for(birds):
    from PIL import Image

    example = Image.open(birds / "train" / "jay" / "0.png")
    vit, preparation = model.load("small-vit", list("abc"), example, print, 20)
    assert vit.config.image_size == 20 and preparation(example).shape == (3, 20, 20)


@pytest.mark.parametrize(
    "name, options, sizes",
    [
        ("ViT", {"size": {"height": 8, "width": 8}}, {"size": {"height": 12, "width": 12}}),
        (
            "CLIP",
            {"size": {"shortest_edge": 10}, "crop_size": {"height": 8, "width": 8}},
            {"size": {"shortest_edge": 15}, "crop_size": {"height": 12, "width": 12}},
        ),
        ("ConvNext", {"size": {"shortest_edge": 8}, "crop_pct": 0.8}, {"size": {"shortest_edge": 12}}),
    ],
)
def test_a_processor_makes_images_of_the_size_and_crops_the_same_share(name, options, sizes):
    import transformers
    from PIL import Image

    preparation = model.Preparation(getattr(transformers, f"{name}ImageProcessorPil")(**options), 3)
    preparation.resize(12)
    assert preparation(Image.new("RGB", (40, 30))).shape == (3, 12, 12)
    for attribute, expected in sizes.items():
        assert dict(getattr(preparation.processor, attribute)) == expected


@pytest.mark.parametrize(
    "kind, options, side, says",
    [
        ("Beit", {**TINY, "use_relative_position_bias": True}, 20, "has no way to resize its .*position_bias_table"),
        ("Hiera", HIERA, 64, "has no way to resize its .*position_embeddings"),
        ("Pvt", {"image_size": 32}, 64, "has no way to resize its .*position_embeddings"),
        ("Perceiver-Learned", PERCEIVER, 20, "has no way to resize its .*position_embeddings"),
        ("ViT", TINY, 2, "has no way to resize its .*position_embeddings"),  # less than a patch
        ("ConvNext", CONVNEXT, 4, "cannot have images of that size: .*Kernel size can't be greater than"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_cannot_be_resized_is_refused_by_the_part_that_cannot(tmp_path, kind, options, side, says):
    saved_classifier(tmp_path, kind, **options)
    with pytest.raises(ValueError, match=f"--image-size {side}: .*{says}"):
        model.load(str(tmp_path), list("abc"), None, lambda _: None, side)


# ---- the best of the epochs ----------------------------------------------------------------------------------------


@pytest.fixture
def scores(monkeypatch):
    """Gives the epochs these accuracies in testing; what is returned gets the weights of the head after each."""

    def give(*accuracies):
        seen = []

        def scored(self, **_):
            seen.append(self.model.classifier.weight.detach().clone())
            metrics = {"eval_loss": 1.0, "eval_accuracy": accuracies[len(seen) - 1]}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        monkeypatch.setattr(trainer.Finetuning, "evaluate", scored)
        return seen

    return give


def test_the_best_weights_are_kept_with_their_epoch(birds, checkpoint, tmp_path, scores):
    """Of epochs that are as good as each other the first; never those of a worse one."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    seen = scores(0.25, 0.75, 0.75, 0.5)
    result = job.run(settings(birds, checkpoint, tmp_path, epochs=4))
    assert result["best_epoch"] == 2 and result["best_accuracy"] == 0.75 and result["test_accuracy"] == 0.5
    assert torch.equal(weights(tmp_path, "best")["classifier.weight"], seen[1])
    assert torch.equal(weights(tmp_path)["classifier.weight"], seen[3])
    AutoModelForImageClassification.from_pretrained(tmp_path / "best")
    assert AutoImageProcessor.from_pretrained(tmp_path / "best", backend="pil").size["height"] == 8


def test_the_table_names_the_epoch_of_the_best_weights(birds, checkpoint, tmp_path, scores):
    scores(0.25, 0.75, 0.5)
    arguments = ["--model", checkpoint, "--data", birds, "--batch-size", 8, "--epochs", 3, "--output", tmp_path]
    assert re.search(r"best, in best/ +│ 75\.00 %, after epoch 2", finetune(*arguments).output)


def test_an_accuracy_of_zero_has_a_best_epoch_too(birds, checkpoint, tmp_path, scores):
    seen = scores(0.0, 0.0)
    assert job.run(settings(birds, checkpoint, tmp_path, epochs=2))["best_epoch"] == 1
    assert torch.equal(weights(tmp_path, "best")["classifier.weight"], seen[0])


def test_a_run_that_goes_on_remembers_an_earlier_best(birds, checkpoint, tmp_path, monkeypatch, scores):
    """Stopped in the epoch after it; the epochs that follow are worse."""
    seen, train_on = scores(0.75, 0.5, 0.25), trainer.Finetuning.get_batch_samples

    def interrupted(self, *batch):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return train_on(self, *batch)

    monkeypatch.setattr(trainer.Finetuning, "get_batch_samples", interrupted)
    with pytest.raises(Interrupted):
        job.run(settings(birds, checkpoint, tmp_path))
    monkeypatch.setattr(trainer.Finetuning, "get_batch_samples", train_on)
    result = job.run(settings(birds, checkpoint, tmp_path))
    assert result["best_epoch"] == 1 and result["best_accuracy"] == 0.75 and result["test_accuracy"] == 0.25
    assert torch.equal(weights(tmp_path, "best")["classifier.weight"], seen[0])


@pytest.mark.parametrize("failing", ["save_pretrained", "replace"])
def test_a_write_of_the_best_weights_that_failed_is_made_up_for(
    birds, checkpoint, tmp_path, monkeypatch, scores, failing
):
    """Those of epoch 2, which the checkpoint of that epoch has; epoch 3 is worse."""
    from transformers import ViTForImageClassification

    seen = scores(0.25, 0.75, 0.5)
    owner = ViTForImageClassification if failing == "save_pretrained" else os
    write, writes = getattr(owner, failing), []

    def full(*arguments, **options):
        if tmp_path / "best.partial" in arguments:
            writes.append(arguments)
            if len(writes) == 2:
                (tmp_path / "best.partial").mkdir(exist_ok=True)
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments, **options)

    monkeypatch.setattr(owner, failing, full)
    asked = settings(birds, checkpoint, tmp_path, save_every=None)
    with pytest.raises(OSError, match=r"best \(.*No space left.*the checkpoint of step 6 is intact: make room"):
        job.run(asked)
    if failing == "save_pretrained":
        assert not (tmp_path / "best.partial").exists(), "it would keep the disk full"
    assert job.run(asked)["best_epoch"] == 2
    assert torch.equal(weights(tmp_path, "best")["classifier.weight"], seen[1])


def test_the_best_weights_are_on_the_disk_before_they_take_the_place_of_others(
    birds, checkpoint, tmp_path, monkeypatch
):
    synchronised, fsync, replace = set(), os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (synchronised.add(os.fstat(file).st_ino), fsync(file)))

    def checked(old, new):
        if Path(new).name == "best":
            assert {file.stat().st_ino for file in old.iterdir()} <= synchronised
            synchronised.add("best")
        replace(old, new)

    monkeypatch.setattr(os, "replace", checked)
    job.run(settings(birds, checkpoint, tmp_path, epochs=1))
    assert "best" in synchronised


# ---- what it does -------------------------------------------------------------------------------------------------


def test_the_default_run_learns_waits_for_no_data_and_saves_a_model(tmp_path):
    """Few epochs of it. The accuracy is that of the saved model, opened and fed by Transformers alone."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from fastsam.commands.training.data import open_dataset

    result = job.run(Settings(output=tmp_path / "run", epochs=5, device="cpu"))
    assert result["test_accuracy"] > 0.5
    assert result["data_wait_share"] < 0.05
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / "model", backend="pil")
    test = open_dataset("digits").test
    with torch.no_grad():
        logits = saved(**processor(list(test["image"]), return_tensors="pt")).logits
    accuracy = (logits.argmax(1) == torch.tensor(test["label"][:])).float().mean().item()
    assert accuracy == pytest.approx(result["test_accuracy"], abs=2e-3)
    assert saved.config.id2label[3] == "3"


@pytest.mark.parametrize(
    "name, options",
    [
        ("ViT", {"size": {"height": 8, "width": 8}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}),
        ("ConvNext", {"size": {"shortest_edge": 8}, "crop_pct": 0.8}),
        ("CLIP", {"size": {"shortest_edge": 9}, "crop_size": {"height": 8, "width": 8}}),
        ("EfficientNet", {"size": {"height": 8, "width": 8}, "rescale_offset": True}),
    ],
)
def test_images_reach_the_model_as_its_processor_makes_them(birds, name, options):
    """Resized and cropped bytes, then arithmetic on the batch: the processor's own numbers, however it scales."""
    import transformers
    from PIL import Image

    image = Image.open(birds / "train" / "jay" / "0.png")
    preparation = model.Preparation(getattr(transformers, f"{name}ImageProcessorPil")(**options), 3)
    pixels = preparation(image)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 8, 8)
    expected = preparation.processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preparation.normalised(pixels[None]), expected, rtol=1e-5, atol=1e-5)


def test_memory_and_workers_give_the_same_weights(birds, checkpoint, tmp_path, monkeypatch):
    kept = job.run(settings(birds, checkpoint, tmp_path / "kept", epochs=2))
    monkeypatch.setattr(batches, "SHARE_OF_MEMORY", 0.0)
    for workers in (0, 2):
        output = tmp_path / f"{workers} workers"
        streamed = job.run(settings(birds, checkpoint, output, epochs=2, workers=workers))
        assert not multiprocessing.active_children(), "they would be ended at exit, with a traceback"
        assert kept["data_in_memory"] and not streamed["data_in_memory"]
        assert same(weights(output), weights(tmp_path / "kept"))


@pytest.mark.parametrize(
    "changes", [dict(accumulate=4), dict(gradient_checkpointing=True)], ids=lambda c: next(iter(c))
)
def test_saving_memory_changes_weights_by_rounding_only(birds, checkpoint, tmp_path, changes):
    """Without dropout, whose masks depend on the parts."""
    common = dict(epochs=2, optimizer="sgd", method="sam", lr=0.05)
    whole = settings(birds, checkpoint, tmp_path / "whole", **common)
    saving = settings(birds, checkpoint, tmp_path / "saving", **common, **changes)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.0}))
    try:
        job.run(whole)
        job.run(saving)
    finally:
        (checkpoint / "config.json").write_text(json.dumps(config))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "saving")
    key = "vit.embeddings.patch_embeddings.projection.weight"
    assert not torch.allclose(a[key], load_file(checkpoint / "model.safetensors")[key], atol=1e-3)  # training moved it
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_parts_with_perturbations_of_their_own_are_another_method(birds, checkpoint, tmp_path):
    common = dict(epochs=1, optimizer="sgd", method="sam", rho=0.5)
    job.run(settings(birds, checkpoint, tmp_path / "one", accumulate=2, **common))
    job.run(settings(birds, checkpoint, tmp_path / "two", accumulate=2, perturb_parts=True, **common))
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert not torch.allclose(a["classifier.weight"], b["classifier.weight"], atol=1e-5)


def test_a_graph_is_captured_from_the_first_batch_and_replayed_for_every_step(birds, checkpoint, tmp_path, monkeypatch):
    """The graph itself is a GPU's; here something that does the same step by step stands in for it."""
    captured = []

    def capture(optimizer, closure, *example, model, max_norm):
        captured.append([tuple(x.shape) for x in example])
        return lambda *batch: optimizer.step(lambda: closure(*batch), model=model, max_norm=max_norm)

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(job, "device_of", lambda _: torch.device("cpu"))
    common = dict(epochs=2, accumulate=2, max_norm=1.0)
    for name, cuda_graph in (("eager", False), ("graph", True)):
        job.run(settings(birds, checkpoint, tmp_path / name, cuda_graph=cuda_graph, **common))
    assert captured == [[(8, 3, 8, 8), (8,)]]
    assert same(weights(tmp_path / "eager"), weights(tmp_path / "graph"))


@pytest.mark.parametrize(
    "method, precision",
    [*((method, "fp32") for method in METHODS), *((method, "fp16") for method in ("none", "asam", "fsam", "gsam"))],
)
def test_every_method_trains(birds, checkpoint, tmp_path, method, precision):
    options = dict(method=method, precision=precision, freq=4, max_norm=1.0, label_smoothing=0.1, epochs=10)
    result = job.run(settings(birds, checkpoint, tmp_path, save_every=None, **options))
    assert result["test_accuracy"] > 0.7


def test_layers_get_their_learning_rates_and_biases_no_decay(checkpoint):
    vit = model.load(str(checkpoint), list("abcde"), None, print)[0]
    found = groups.parameter_groups(vit, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    of = {id(p): (group["lr"], group["weight_decay"]) for group in found for p in group["params"]}
    named = {name: of[id(p)] for name, p in vit.named_parameters()}
    assert len(of) == len(named)
    assert named["vit.embeddings.position_embeddings"] == (0.125, 0.0)
    assert named["vit.embeddings.patch_embeddings.projection.weight"] == (0.125, 0.1)
    assert named["vit.layers.0.attention.q_proj.weight"] == (0.25, 0.1)
    assert named["vit.layers.1.attention.q_proj.bias"] == (0.5, 0.0)
    assert named["vit.layers.1.layernorm_before.weight"] == (0.5, 0.0)
    assert named["vit.layernorm.weight"] == (1.0, 0.0)
    assert named["classifier.weight"] == (1.0, 0.1)


def test_scales_with_dimensions_of_one_have_no_decay():
    from transformers import AutoModelForImageClassification, ConvNextV2Config, Swinv2Config

    stages = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}
    window = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2}
    build = AutoModelForImageClassification.from_config
    both = build(ConvNextV2Config(**stages)), build(Swinv2Config(**window))
    decayed = {name for m in both for name, p in m.named_parameters() if groups.decays(name, p)}
    assert "convnextv2.encoder.stages.0.layers.0.dwconv.weight" in decayed, "shape (8, 1, 7, 7)"
    assert not [name for name in decayed if "grn" in name or "logit_scale" in name]


def test_tensorboard_gets_the_rows(birds, checkpoint, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job.run(settings(birds, checkpoint, tmp_path / "run", epochs=2, log=["tensorboard"]))
    (folder,) = {path.parent for path in (tmp_path / "run").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("eval/accuracy")] == [3, 6]
    assert [event.step for event in events.Scalars("train/loss")] == [int(row[0]) for row in curve(tmp_path / "run")]


# ---- the command and its errors -----------------------------------------------------------------------------------


def test_a_config_file_gives_defaults_and_the_command_line_wins(birds, checkpoint, tmp_path):
    file = tmp_path / "run.json"
    content = {"model": str(checkpoint), "data": str(birds), "epochs": 5, "batch-size": 8, "optimizer": "sgd"}
    file.write_text(json.dumps({**content, "optimizer_arg": ["momentum=0.5", "nesterov=true"]}))
    output = tmp_path / "run"
    run = finetune("--config", file, "--epochs", 1, "--output", output)
    assert run.exit_code == 0, run.output
    config = json.loads((output / "config.json").read_text())
    assert config["epochs"] == 1 and config["batch_size"] == 8 and config["optimizer"] == "sgd"
    group = torch.load(output / "checkpoint-3" / "optimizer.pt", weights_only=True)["param_groups"][0]
    assert group["momentum"] == 0.5 and group["nesterov"] is True


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--method", "fsma"], "--method 'fsma' is unknown, the nearest is fsam"),
        (["--optimizer", "adamv"], "--optimizer 'adamv' is unknown, the nearest is adam"),
        (["--optimizer", "sgd", "--optimizer-arg", "momentun=1"], "the nearest is momentum"),
        (["--optimizer", "muon"], "--optimizer 'muon' is unknown"),
        (["--optimizer", "sgd", "--optimizer-arg", "momentum=abc"], "torch.optim.SGD does not take momentum='abc'"),
        (
            ["--image-size", "2"],
            "--image-size 2: ViTForImageClassification has no way to resize its vit.embeddings.position",
        ),
        (["--max-norm", "0"], "--max-norm 0 would leave nothing of the gradient"),
        (["--optimizer", "rprop"], "Rprop has no weight_decay: say --weight-decay 0"),
        (["--precision", "fp8"], "--precision 'fp8' is unknown"),
        (["--accumulate", "3"], "--accumulate 3 must divide --batch-size 8"),
        (["--batch-size", "25"], "--batch-size 25 is more than the 24 training images"),
        (["--cuda-graph", "--device", "cpu"], "--cuda-graph needs an NVIDIA GPU; this run is on cpu"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--log", "tensorbord"], "the nearest is tensorboard"),
        (["--log", "wandb"], "--log wandb needs its package: pip install wandb"),
        (["--data", "{tmp}/none"], "none is neither a folder or file here"),
        (["--data", "{tmp}/broken"], "finch/0.png does not open as an image"),
        (["--data", "{tmp}/empty"], "class folder {tmp}/empty/gull holds no images"),
        (["--data", "{tmp}/labels.parquet"], "row 2 has the label -1, outside the range"),
        (["--model", "{tmp}/pickle"], "refused: it has pytorch_model.bin and no safetensors; a pickle can run code"),
        (["--model", "{tmp}/pickle/pytorch_model.bin"], "pytorch_model.bin is refused: a pickle can run code"),
        (["--model", "{tmp}/cut"], "{tmp}/cut: its safetensors are damaged, or not all there"),
        (["--model", "{tmp}/none"], "{tmp}/none: there is no such folder"),
        (["--model", "nobody/nothing"], "nobody/nothing: not a folder here, and not found on the hub"),
        (["--config", "{tmp}/typo.json"], "the key 'learning_rat' is unknown"),
        (["--config", "{tmp}/typo.toml"], "the key 'wamup' is unknown, the nearest is warmup"),
        (["--config", "{tmp}/list.toml"], 'list.toml: optimizer_arg must be a list, as in ["momentum=0.5"]'),
        (["--config", "{tmp}/broken.toml"], "broken.toml is no TOML"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_message_and_makes_no_folder(birds, checkpoint, tmp_path, monkeypatch, arguments, says):
    wrong_input(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 3000)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "wandb" else find_spec(n, *a))
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    good = {"--model": checkpoint, "--data": birds, "--batch-size": 8, "--epochs": 1, "--output": tmp_path / "run"}
    run = finetune(*(x for pair in good.items() for x in pair), *arguments)
    assert run.exit_code == 1, run.output
    message = run.stderr.strip()
    assert message.startswith("fastsam finetune: ") and "\n" not in message and "Traceback" not in run.output
    assert says.replace("{tmp}", str(tmp_path)) in message
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "arguments, environment, says",
    [
        (["--batch-size", "9"], {"WORLD_SIZE": "2"}, "--batch-size 9 is that of all 2 processes together"),
        (["--perturb-parts"], {"WORLD_SIZE": "2"}, "--perturb-parts is for one process, and these are 2"),
        ([], {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed makes the step itself"),
        (["--model", "networks:no_module"], {}, "no_module(10) returned a list: it must return an nn.Module"),
        (["--model", "networks:fails"], {}, "fails(10) failed: 'the weights'. It is given the number of classes"),
        (["--model", "networks:singel"], {}, "networks has no singel, the nearest is single"),
        (["--model", "networks:scripted"], {}, "scripted(10) returned a ScriptModule"),
        (["--model", "no_such_module:build"], {}, "no_such_module does not import"),
        (["--model", "networks:no_logits"], {}, "output is a tensor of shape (2, 11), no logits"),
        (["--model", "networks:a_tuple"], {}, "output is a tuple, no logits"),
        (["--model", "networks:three_channels"], {}, "the network fails on images of shape (2, 1, 8, 8)"),
        (["--data", "{tmp}/alone"], {}, "alone has one class, finch: a classifier needs two at least"),
        (["--method", "none", "--ascent-share", "0.5"], {}, "--ascent-share does not go with --method none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, (list, dict)) else "",
)
def test_wrong_networks_and_launches_are_one_clear_message(tmp_path, monkeypatch, arguments, environment, says):
    from PIL import Image

    (tmp_path / "alone" / "finch").mkdir(parents=True)
    for i in range(20):
        Image.new("L", (8, 8), i).save(tmp_path / "alone" / "finch" / f"{i}.png")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    run = finetune("--batch-size", 10, "--epochs", 1, "--output", tmp_path / "run", *arguments)
    assert run.exit_code == 1, run.output
    message = run.stderr.strip()
    assert says in message and "\n" not in message and "Traceback" not in run.output
    assert not (tmp_path / "run").exists()


def test_efficientnet_has_its_own_mean_and_makes_three_channels_of_grey(birds, tmp_path, monkeypatch):
    from PIL import Image

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "efficientnet_lite0", partial(pretrained.efficientnet_lite0, weights="", width=0.25))
        _, preparation = model.load("efficientnet-lite0", list("ab"), Image.new("L", (9, 9)), print)
        grey = preparation(Image.new("L", (9, 9), 51))
        assert grey.shape == (3, 224, 224)
        wanted = [(0.2 - mean) / std for mean, std in zip(pretrained.MEAN, pretrained.STD, strict=True)]
        assert preparation.normalised(grey)[:, 0, 0].tolist() == pytest.approx(wanted, rel=1e-5)
        common = ("--data", birds, "--image-size", 32, "--epochs", 1, "--batch-size", 12, "--output", tmp_path)
        run = finetune("--model", "efficientnet-lite0", *common)
        assert run.exit_code == 0, run.output
        saved = json.loads((tmp_path / "result.json").read_text())
        assert saved["parameters"] == sum(p.numel() for p in pretrained.efficientnet_lite0(3).parameters())


def test_weights_that_are_not_installed_are_one_clear_message(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "efficientnet" in name else find(name, *a)
    )
    run = finetune("--model", "efficientnet-lite0", "--output", tmp_path / "run")
    assert run.exit_code == 1 and not (tmp_path / "run").exists()
    assert "not installed: pip install 'fastsam-optim[real]'" in run.stderr and run.stderr.strip().count("\n") == 0


def test_a_network_of_ones_own_trains_and_its_weights_load_again(tmp_path):
    import networks

    asked = Settings(model="networks:single", output=tmp_path, epochs=8, lr=4e-2, device="cpu", image_size=12)
    result = job.run(asked)
    assert result["test_accuracy"] > 0.5
    again = networks.single(10)
    again.load_state_dict(weights(tmp_path))
    assert not torch.equal(again.head.weight, networks.single(10).head.weight)


def test_a_share_of_the_batch_gives_another_perturbation(birds, checkpoint, tmp_path):
    common = dict(epochs=1, method="sam", rho=0.5, optimizer="sgd")
    job.run(settings(birds, checkpoint, tmp_path / "whole", **common))
    job.run(settings(birds, checkpoint, tmp_path / "share", ascent_share=0.25, **common))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "share")
    assert not torch.allclose(a["classifier.weight"], b["classifier.weight"], atol=1e-5)


def wrong_input(folder):
    """The files that the table above names."""
    import datasets
    from PIL import Image

    for name in ("broken", "empty"):
        for c in ("finch", "gull"):
            (folder / name / c).mkdir(parents=True)
            for i in range(0 if (name, c) == ("empty", "gull") else 12):
                Image.new("L", (8, 8), 20 * i).save(folder / name / c / f"{i}.png")
    (folder / "broken" / "finch" / "0.png").write_bytes(b"no image at all")
    images = [Image.new("L", (8, 8), i) for i in range(24)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    labels = [0, 1, -1, *[1] * 21]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features).to_parquet(folder / "labels.parquet")
    (folder / "pickle").mkdir()
    (folder / "pickle" / "config.json").write_text('{"model_type": "vit"}')
    (folder / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    (folder / "typo.json").write_text('{"learning_rat": 1}')
    (folder / "typo.toml").write_text("wamup = 0.2\n")
    (folder / "list.toml").write_text('optimizer-arg = "momentum=0.5"\n')
    (folder / "broken.toml").write_text("warmup = = 1\n")


def test_settings_made_in_python_have_the_bounds_of_the_options():
    with pytest.raises(ValueError, match="--epochs 0 must be from 1 to any number"):
        Settings(epochs=0)
    with pytest.raises(ValueError, match=r"--warmup 1\.5 must be from 0 to 1"):
        Settings(warmup=1.5)
    with pytest.raises(ValueError, match="--rho nan must be from 0"):
        Settings(rho=float("nan"))


def test_another_number_of_classes_replaces_the_head_and_says_so(birds, checkpoint, tmp_path):
    run = finetune("--model", checkpoint, "--data", birds, "--batch-size", 8, "--epochs", 1, "--output", tmp_path)
    assert run.exit_code == 0, run.output
    assert "has 5 classes, the data 3: its head is replaced by a new one" in run.output
    assert weights(tmp_path)["classifier.weight"].shape == (3, 16)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["id2label"]["1"] == "gull"


def test_a_config_that_names_no_classes_keeps_its_head(tmp_path):
    """PVT's is one: where others have two classes, its ``id2label`` is None."""
    from transformers import AutoConfig

    four = {name: [size] * 4 for name, size in (("hidden_sizes", 8), ("depths", 1), ("num_attention_heads", 1))}
    saved_classifier(tmp_path, "Pvt", image_size=32, **four)
    config = json.loads((tmp_path / "config.json").read_text())
    names = ("id2label", "label2id")
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in names}))
    assert AutoConfig.from_pretrained(tmp_path).id2label is None
    said = []
    kept = model.load(str(tmp_path), list("abc"), None, said.append)[0]
    assert torch.equal(kept.classifier.weight, load_file(tmp_path / "model.safetensors")["classifier.weight"])
    assert "is kept: it has 3 classes as well, under other names" in said[0]


def test_other_settings_in_the_same_folder_are_refused_by_name(birds, checkpoint, tmp_path):
    job.run(settings(birds, checkpoint, tmp_path, epochs=1))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"a run with rho=0\.05, and this one has rho=0\.1"):
        job.run(settings(birds, checkpoint, tmp_path, epochs=1, rho=0.1))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_disk_that_fills_up_ends_the_run_and_leaves_it_whole(birds, checkpoint, tmp_path, monkeypatch):
    undisturbed = settings(birds, checkpoint, tmp_path / "undisturbed")
    job.run(undisturbed)
    asked = settings(birds, checkpoint, tmp_path / "full")
    saved, save = [], fastsam.loop.checkpoint.save

    def full(path, **objects):
        saved.append(path)
        if len(saved) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, **objects)

    monkeypatch.setattr(fastsam.loop.checkpoint, "save", full)
    with pytest.raises(OSError, match=r"step 4 could not be written .*no space is left.* that of step 3 is intact"):
        job.run(asked)
    monkeypatch.undo()
    job.run(asked)
    assert same(weights(tmp_path / "full"), weights(tmp_path / "undisturbed"))


def test_weights_that_are_not_finite_do_not_overwrite_the_checkpoint(birds, checkpoint, tmp_path):
    wild = settings(birds, checkpoint, tmp_path, optimizer="sgd", method="none", lr=1e30, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"not finite at step \d: lower --lr"):
        job.run(wild)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_run_whose_losses_are_not_finite_ends_with_its_first_epoch(birds, checkpoint, tmp_path):
    """SAM's steps leave weights as they were where a gradient is not finite, so weights alone do not show it."""
    wild = settings(birds, checkpoint, tmp_path, optimizer="sgd", lr=1e9, epochs=30, save_every=None)
    with pytest.raises(ValueError, match=r"losses in training and testing are not finite at step 3: lower --lr"):
        job.run(wild)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"max": "1000", "current": "300"}, 700),
        ({"max": "max", "current": "300"}, 2048),
        ({"max": "9000", "current": "300"}, 2048),
        ({}, 2048),
    ],
    ids=["a container", "one without a limit", "one with a high limit", "no container"],
)
def test_images_are_kept_only_where_machine_and_container_have_room(tmp_path, monkeypatch, files, free):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 2 kB\n")
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUPS", [(tmp_path / "max", tmp_path / "current")])
    assert batches._free_memory(torch.device("cpu")) == free
