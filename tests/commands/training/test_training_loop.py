"""The one training loop: its batches, its schedule, what it measures, and that it goes on where it was."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsam import SAM, EigenSAM
from fastsam.commands.training.batches import Batches, seed_of, shuffled, steps_per_epoch
from fastsam.commands.training.data import ImageSet
from fastsam.commands.training.evaluate import evaluate, evaluate_by_class
from fastsam.commands.training.loop import Training, take_step
from fastsam.commands.training.schedule import warmup_then_cosine

# ---- batches -----------------------------------------------------------------------------------------------------


def image_set(count: int = 50, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 4, 4, generator=generator)
    return ImageSet(images, torch.arange(count) % 3, ["a", "b", "c"])


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own():
    batches = list(islice(shuffled(50, 20, 0, drop_last=False), 6))
    assert [len(batch) for batch in batches] == [20, 20, 10] * 2
    orders = [torch.cat(batches[i : i + 3]).tolist() for i in (0, 3)]
    assert all(sorted(order) == list(range(50)) for order in orders) and orders[0] != orders[1]
    assert orders[0] != torch.cat(list(islice(shuffled(50, 20, 1, drop_last=False), 3))).tolist()
    whole = list(islice(shuffled(50, 20, 0), 4))
    assert [batch.tolist() for batch in whole] == [batches[i].tolist() for i in (0, 1, 3, 4)]


@pytest.mark.parametrize("step", [1, 2, 5, 6])
def test_the_order_goes_on_at_any_step(step):
    from_the_start = list(islice(shuffled(50, 20, 7), 8))
    later = list(islice(shuffled(50, 20, 7, step), 8 - step))
    assert all(torch.equal(a, b) for a, b in zip(later, from_the_start[step:], strict=True))


def test_no_whole_batch_is_an_error_that_names_the_numbers():
    assert steps_per_epoch(3, 4, drop_last=False) == 1
    with pytest.raises(ValueError, match="batch_size=4 with drop_last for 3 images"):
        Batches(image_set(3), image_set(3), 4, 0)


def test_seeds_of_unlike_purposes_differ():
    assert len({seed_of(0, "order"), seed_of(1, "order"), seed_of(0, "noise"), seed_of("0", "order")}) == 4


def test_batches_are_augmented_for_training_alone():
    """A crop of 4 pixels may leave nothing of an image, cutout leaves zeros of what ``prepare`` made."""
    images = ImageSet(torch.full((64, 1, 4, 4), 200, dtype=torch.uint8), torch.zeros(64).long(), ["a"])
    options = {"crop": 2, "cutout": 2, "prepare": lambda images: images.float() + 1}
    batches = Batches(images, images, 32, 0, **options)
    seen = torch.cat([x for x, _ in batches.epoch()])
    assert set(seen.unique().tolist()) == {0.0, 1.0, 201.0}
    for plain in (batches.test(), batches.whole(), [batches.sample(5)]):
        assert torch.cat([x for x, _ in plain]).unique().tolist() == [201.0]
    again = Batches(images, images, 32, 0, **options)
    assert torch.equal(torch.cat([x for x, _ in again.epoch()]), seen)


# ---- schedule and evaluation ---------------------------------------------------------------------------------------


def test_the_learning_rate_rises_then_falls_along_a_cosine():
    factor = warmup_then_cosine(4, 12)
    assert [factor(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [factor(i) for i in (4, 8, 12)] == pytest.approx([1.0, 0.5, 0.0])
    assert warmup_then_cosine(0, 10)(0) == 1.0


def test_evaluation_is_over_all_images_in_eval_mode_and_leaves_modes_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3), nn.Dropout(0.5))
    model[1].eval()
    before = [module.training for module in model.modules()]
    data = image_set()
    parts = zip(data.images.split(20), data.labels.split(20), strict=True)
    loss, accuracy = evaluate(model, model, parts)
    assert [module.training for module in model.modules()] == before
    logits = model.eval()(data.images)
    assert loss == pytest.approx(F.cross_entropy(logits, data.labels).item())
    assert accuracy == (logits.argmax(1) == data.labels).double().mean().item()
    model.train()
    same, count, right = evaluate_by_class(model, zip(data.images.split(20), data.labels.split(20), strict=True), 4)
    assert all(m.training for m in model.modules()) and same == pytest.approx(loss)
    assert count.tolist() == [17, 17, 16, 0]
    assert right.tolist() == [int(((logits.argmax(1) == c) & (data.labels == c)).sum()) for c in range(4)]


# ---- the loop ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "SAM": lambda params: SAM(params, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9),
    "Eigen-SAM": lambda params: EigenSAM(params, torch.optim.SGD, rho=0.1, freq=2, lr=0.1, momentum=0.9),
}


def build() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3))


def training(method: str = "SAM", **options) -> Training:
    batches = Batches(image_set(), image_set(30, 1), 20, 0, flip=True, cutout=2)
    return Training(build, OPTIMIZERS[method], batches, **{"seed": 0, "epochs": 4, "warmup": 2, **options})


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_a_run_that_goes_on_ends_as_one_that_did_not_stop(method):
    whole = training(method)
    rows = list(whole.epochs())
    assert [row["step"] for row in rows] == [2, 4, 6, 8] and [row["epoch"] for row in rows] == [1, 2, 3, 4]
    first = training(method)
    list(islice(first.epochs(), 2))
    state = copy.deepcopy(first.state_dict())
    second = training(method)  # another seed's draws come in between
    second.load_state_dict(state)
    later = list(second.epochs())
    assert [{**row, "seconds": 0} for row in later] == [{**row, "seconds": 0} for row in rows[2:]]
    torch.testing.assert_close(second.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["SGD", "SAM"])
def test_an_epoch_is_the_loop_written_out(method):
    batches = training(method).batches
    torch.manual_seed(0)
    model = build()
    optimizer = OPTIMIZERS[method](model.parameters())
    losses = []
    for images, labels in batches.epoch():  # lr is 0.1 in both steps: a warm-up of one, then the cosine's start
        loss = F.cross_entropy(model(images), labels)
        losses.append(loss.item())
        loss.backward()
        if method == "SAM":
            optimizer.first_step(zero_grad=True)
            buffers = [b.clone() for b in model.buffers()]
            F.cross_entropy(model(images), labels).backward()
            for b, kept in zip(model.buffers(), buffers, strict=True):
                b.copy_(kept)
            optimizer.second_step(zero_grad=True)
        else:
            optimizer.step()
            optimizer.zero_grad()
    ours = training(method, warmup=1)
    row = ours.one_epoch()
    assert row["train_loss"] == pytest.approx(sum(losses) / 2)
    torch.testing.assert_close(ours.model.state_dict(), model.state_dict())
    assert (row["test_loss"], row["test_accuracy"]) == pytest.approx(evaluate(model, model, batches.test()))


def test_a_share_of_the_batch_is_the_first_pass_and_images_are_counted():
    """Of 20 images 0.33 are 7; without ``test`` nothing is evaluated."""
    ours, seen = training(ascent_share=0.33), []

    def note(optimizer, closure, model, ascent_closure):
        before = ours.samples
        ascent_closure()
        seen.append(ours.samples - before)
        optimizer.zero_grad()
        return take_step(optimizer, closure, model, ascent_closure=ascent_closure)

    row = ours.one_epoch(step=note, test=False)
    assert seen == [7, 7] and ours.samples == 2 * (7 + 20) + 2 * 7 and "test_accuracy" not in row
    whole, part = training(epochs=1), training(epochs=1, ascent_share=0.33)
    assert whole.one_epoch()["train_loss"] != part.one_epoch()["train_loss"]
    assert (whole.samples, part.samples) == (80, 54)


def test_the_learning_rate_follows_steps_or_epochs():
    seen = []

    def note(optimizer, closure, model):
        seen.append(round(optimizer.param_groups[0]["lr"], 6))
        return take_step(optimizer, closure, model)

    for per_epoch in (False, True):
        list(training("SGD", lr_per_epoch=per_epoch, warmup=2).epochs(step=note))
    assert seen[:3] == [0.05, 0.1, 0.1] and len(set(seen[3:8])) == 5
    assert seen[8:14] == [0.05, 0.05, 0.1, 0.1, 0.1, 0.1] and seen[14] == seen[15] == 0.05


def test_before_each_step_its_number_in_the_run_and_in_the_epoch_is_told():
    calls = []
    list(training("SGD", epochs=2).epochs(lambda *numbers: calls.append(numbers)))
    assert calls == [(0, 0), (1, 1), (2, 0), (3, 1)]


def test_another_backward_pass_is_what_the_optimizer_descends_along():
    plain, flipped = training("SGD", epochs=1), training("SGD", epochs=1, backward=lambda loss, _: (-loss).backward())
    start = [p.detach().clone() for p in plain.model.parameters()]

    def once(optimizer, closure, model):
        """The first step of the run alone."""
        return take_step(optimizer, closure, model) if not optimizer.state else closure().detach()

    for run in (plain, flipped):
        torch.manual_seed(1)
        next(run.epochs(step=once))
    for before, p, q in zip(start, plain.model.parameters(), flipped.model.parameters(), strict=True):
        torch.testing.assert_close(p - before, before - q)
