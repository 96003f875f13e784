"""The Trainer of Transformers, against a loop by hand."""

from __future__ import annotations

import pytest
import torch
from digits import Counted, batches, by_hand, in_groups, same

pytest.importorskip("accelerate", reason="accelerate is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import TrainingArguments  # noqa: E402

from fastsam import SAM, EigenSAM, FriendlySAM  # noqa: E402
from fastsam.integrations.transformers import SAMTrainer  # noqa: E402

SIZE = 16
METHODS = {
    "sam": lambda p: SAM(p, torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9),
    "friendly": lambda p: FriendlySAM(p, torch.optim.AdamW, rho=0.05, lr=1e-2),
}


class Classifier(Counted):
    """Counted, as the Trainer calls models."""

    def forward(self, x, labels=None):
        logits = super().forward(x)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@pytest.fixture
def train(tmp_path):
    def run(model, optimizer, n=4, resume=None, trainer=SAMTrainer, **options):
        data = [{"x": x, "labels": y} for group in batches(n, SIZE) for x, y in zip(*group, strict=True)]
        arguments = dict(
            output_dir=str(tmp_path),
            use_cpu=True,
            per_device_train_batch_size=SIZE,
            num_train_epochs=1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            dataloader_pin_memory=False,
        )
        given = {"optimizers": (optimizer, None)} if isinstance(optimizer, torch.optim.Optimizer) else optimizer
        made = trainer(model, TrainingArguments(**{**arguments, **options}), train_dataset=data, **given)
        made._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
        made.train(resume_from_checkpoint=resume)
        return made

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}, {"bf16": True}],
    ids=lambda o: next(iter(o), "plain"),
)
def test_training_equals_the_loop_by_hand(train, method, options):
    model, reference = Classifier(), Counted()
    trainer = train(model, METHODS[method](model.parameters()), 5, **options)
    size = options.get("gradient_accumulation_steps", 1)
    losses = by_hand(
        reference,
        METHODS[method](reference.parameters()),
        in_groups(batches(5, SIZE), size),
        max_norm=options.get("max_grad_norm"),
        autocast=torch.bfloat16 if "bf16" in options else None,
    )
    same(model, reference, 1e-5)
    assert model.forwards == 10
    assert trainer.state.global_step == len(in_groups(losses, size))
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(
        sum(sum(g) / len(g) for g in in_groups(losses, size)) / len(in_groups(losses, size)), rel=1e-3
    )


def test_a_resumed_run_equals_an_undisturbed_one(train, tmp_path):
    options = dict(max_steps=6, gradient_accumulation_steps=2, save_strategy="steps", save_steps=3)
    undisturbed, resumed = Classifier(dropout=0.5), Classifier(dropout=0.5)
    train(undisturbed, METHODS["friendly"](undisturbed.parameters()), 4, **options)
    for p in resumed.parameters():
        torch.nn.init.zeros_(p)
    train(resumed, METHODS["friendly"](resumed.parameters()), 4, str(tmp_path / "checkpoint-3"), **options)
    assert resumed.forwards == undisturbed.forwards / 2
    for a, b in zip(undisturbed.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_class_gets_the_trainers_groups_and_schedule(train):
    model = Classifier()
    recipe = (SAM, {"base_optimizer": torch.optim.AdamW, "rho": 0.05, "lr": 1e-2})
    options = dict(weight_decay=0.1, lr_scheduler_type="linear")
    trainer = train(model, {"optimizer_cls_and_kwargs": recipe}, **options)
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    assert decays == [0.1, 0.0]
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0
    assert model.forwards == 8


@pytest.mark.parametrize(("settings", "expected"), [({}, 0.003), ({"lr": 0.2}, 0.2)], ids=str)
def test_the_learning_rate_is_the_trainers_unless_one_is_given(train, settings, expected):
    recipe = (SAM, {"base_optimizer": torch.optim.AdamW, "rho": 0.05, **settings})
    made = train(Classifier(), {"optimizer_cls_and_kwargs": recipe}, learning_rate=0.003)
    assert {group["lr"] for group in made.optimizer.param_groups} == {expected}


def test_batchnorm_counts_once_and_dropout_draws_the_same_masks(train):
    model = Classifier(dropout=0.5)
    train(model, SAM(model.parameters(), torch.optim.SGD, rho=1e-30, lr=0.0), gradient_accumulation_steps=2)
    assert int(model.layers[1].num_batches_tracked) == 4
    first, second = model.outputs[0:2] + model.outputs[4:6], model.outputs[2:4] + model.outputs[6:8]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_eigensam_refreshes_its_vector_when_due(train):
    model = Classifier()
    optimizer = EigenSAM(model.parameters(), torch.optim.SGD, freq=2, lr=0.1)
    train(model, optimizer)
    assert optimizer.eigenvector is not None


def test_an_exception_in_the_second_pass_restores_the_weights_and_training_can_begin_again(train):
    model = Classifier()
    before = [p.detach().clone() for p in model.parameters()]

    def fail_in_the_second(*_):
        if model.forwards == 3:
            raise KeyError("from the model")

    hook = model.register_forward_hook(fail_in_the_second)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.0)
    with pytest.raises(KeyError, match="from the model"):
        train(model, optimizer, gradient_accumulation_steps=2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    hook.remove()
    model.zero_grad()
    train(model, optimizer)


def test_another_optimizer_is_refused(train):
    model = Classifier()
    with pytest.raises(TypeError, match="SAMTrainer got SGD"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_the_ordinary_trainer_is_refused_rather_than_given_one_pass(train):
    model = Classifier()
    with pytest.raises((TypeError, RuntimeError), match=r"needs a closure|did not compute"):
        train(model, METHODS["sam"](model.parameters()), trainer=transformers.Trainer)
