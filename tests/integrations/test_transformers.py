"""The Trainer of Transformers, against a loop by hand."""

from __future__ import annotations

import pytest
import torch
from digits import CASES, METHODS, Counted, batches, by_hand, in_groups, same

pytest.importorskip("accelerate", reason="accelerate is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import TrainingArguments  # noqa: E402

from fastsam import SAM, EigenSAM, flatten_parameters  # noqa: E402
from fastsam.integrations.transformers import SAMTrainer  # noqa: E402

SIZE = 16
OPTIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.1},
    "bf16": {"bf16": True},
}


class Classifier(Counted):
    """Counted, as the Trainer calls models."""

    def forward(self, x, labels=None):
        logits = super().forward(x)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@pytest.fixture
def train(tmp_path):
    def run(model, optimizer, n=4, resume=None, trainer=SAMTrainer, data=None, share=1.0, callbacks=None, **options):
        data = batches(n, SIZE) if data is None else data
        data = [{"x": x, "labels": y} for group in data for x, y in zip(*group, strict=True)]
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
        given = {**given, "callbacks": callbacks}
        if share < 1:
            given["ascent_share"] = share
        if "data_collator" in options:
            given["data_collator"] = options.pop("data_collator")
        made = trainer(model, TrainingArguments(**{**arguments, **options}), train_dataset=data, **given)
        made._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
        made.train(resume_from_checkpoint=resume)
        return made

    return run


@pytest.mark.parametrize(("method", "options", "share"), CASES)
def test_training_equals_the_loop_by_hand(train, method, options, share):
    """As to its evaluations, too: a method's only pass of a step takes whole batches whatever the share."""
    model, reference, options = Classifier(), Counted(), OPTIONS[options]
    trainer = train(model, METHODS[method](model.parameters()), 5, share=share, **options)
    size = options.get("gradient_accumulation_steps", 1)
    losses = by_hand(
        reference,
        METHODS[method](reference.parameters()),
        in_groups(batches(5, SIZE), size),
        max_norm=options.get("max_grad_norm"),
        of_update=method in ("look", "gsam"),
        autocast=torch.bfloat16 if "bf16" in options else None,
        share=share,
    )
    same(model, reference, 1e-5)
    assert [len(x) for x in model.outputs] == [len(x) for x in reference.outputs]
    assert trainer.state.global_step == len(in_groups(losses, size))
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(
        sum(sum(g) / len(g) for g in in_groups(losses, size)) / len(in_groups(losses, size)), rel=1e-3
    )


class Tokens(Classifier):
    """A model that is told how many labels the whole step has, as language models are."""

    config = None

    def forward(self, x, labels=None, num_items_in_batch=None, **_):
        logits, loss = Counted.forward(self, x), None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_over_the_labels_of_a_step_is_that_over_the_labels_of_its_parts_in_the_first_pass(train, smoothing):
    """GSAM subtracts the first gradient, so that its scale matters."""
    model, reference = Tokens(), Counted()
    for m in (model, reference):
        m.layers[1] = torch.nn.Identity()
    data = [(x, y.masked_fill(y < 2 + 2 * i, -100)) for i, (x, y) in enumerate(batches(4, SIZE))]
    options = dict(gradient_accumulation_steps=2, label_smoothing_factor=smoothing)
    train(model, METHODS["gsam"](model.parameters()), data=data, share=0.5, **options)
    optimizer = METHODS["gsam"](reference.parameters())
    for group in in_groups(data, 2):
        halves = [(x[: SIZE // 2], y[: SIZE // 2]) for x, y in group]
        for micro_batches, step in ((halves, optimizer.first_step), (group, optimizer.second_step)):
            labels = sum(int((y != -100).sum()) for _, y in micro_batches)
            for x, y in micro_batches:
                loss = torch.nn.functional.cross_entropy(reference(x), y, reduction="sum", label_smoothing=smoothing)
                (loss / labels).backward()
            step(zero_grad=True)
    same(model, reference, 1e-6)


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


def test_an_exception_between_momentum_sams_pass_and_its_update_restores_the_weights(train):
    model, before = Classifier(), []

    class Failing(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            before[:] = [p.detach().clone() for p in model.parameters()]

        def on_pre_optimizer_step(self, *_, **__):
            if model.forwards == 2:
                raise KeyError("from the callback")

    with pytest.raises(KeyError, match="from the callback"):
        train(model, METHODS["momentum"](model.parameters()), callbacks=[Failing()])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=rf"ascent_share={share} must be a number in \(0, 1\]"):
        SAMTrainer(Classifier(), ascent_share=share)


def test_inputs_that_cannot_be_divided_are_named(train):
    model = Classifier()
    collate = transformers.default_data_collator
    options = dict(share=0.5, data_collator=lambda items: {**collate(items), "names": ["one"]})
    with pytest.raises(ValueError, match=r"inputs\['names'\] is a list of 1 in a batch of 16 samples"):
        train(model, METHODS["sam"](model.parameters()), remove_unused_columns=False, **options)
    assert model.forwards == 0


def test_another_optimizer_is_refused(train):
    model = Classifier()
    with pytest.raises(TypeError, match="SAMTrainer got SGD"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_the_ordinary_trainer_is_refused_rather_than_given_one_pass(train):
    model = Classifier()
    with pytest.raises((TypeError, RuntimeError), match=r"needs a closure|did not compute"):
        train(model, METHODS["sam"](model.parameters()), trainer=transformers.Trainer)


@pytest.mark.parametrize("at", [2, 3], ids=["first pass", "second pass"])
def test_an_attempt_that_ran_out_of_memory_leaves_nothing_to_the_next(train, at):
    model, reference, sizes = Classifier(), Classifier(), []
    for m in (model, reference):
        m.layers[1] = torch.nn.Identity()  # BatchNorm's statistics count every forward pass, those that failed too

    def fail(_, inputs, arguments):
        sizes.append(len(arguments["x"]))
        if len(sizes) == at:
            raise RuntimeError("CUDA out of memory.")

    hook = model.register_forward_pre_hook(fail, with_kwargs=True)
    options = dict(gradient_accumulation_steps=2, max_steps=1, per_device_train_batch_size=20)
    train(model, METHODS["sam"](model.parameters()), auto_find_batch_size=True, **options)
    hook.remove()
    assert sizes == [20] * at + [18] * 4
    train(reference, METHODS["sam"](reference.parameters()), **{**options, "per_device_train_batch_size": 18})
    same(model, reference, 1e-5)


def test_an_attempt_that_fails_between_the_passes_leaves_nothing_either(train):
    class Failing(SAMTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.model.forwards == 1:
                raise RuntimeError("CUDA out of memory.")
            return loss

    model = Classifier()
    options = dict(gradient_accumulation_steps=2, max_steps=1, auto_find_batch_size=True)
    train(model, METHODS["sam"](model.parameters()), trainer=Failing, **options)
    assert model.forwards == 1 + 4


def test_a_flattened_model_is_saved_whole(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    model = transformers.ViTForImageClassification(config)
    flatten_parameters(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert (tmp_path / "model.safetensors").stat().st_size < 1.5 * sum(p.nbytes for p in model.parameters()) + 8192
