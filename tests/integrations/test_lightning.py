"""Lightning's automatic optimization with an unchanged module, against a loop by hand."""

from __future__ import annotations

import pytest
import torch

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from digits import CASES, METHODS, Counted, batches, by_hand, in_groups, loader, same  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from fastsam import SAM, EigenSAM  # noqa: E402
from fastsam.integrations.lightning import SAMCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:power iteration found the negative eigenvalue"),
]

OPTIONS = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-mixed"},
}


class Module(pl.LightningModule):
    def __init__(self, make, dropout=0.0):
        super().__init__()
        self.model = Counted(dropout)
        self.make = make
        self.skip = ()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.model(x), y)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return None if batch_idx in self.skip else loss

    def configure_optimizers(self):
        return self.make(self.parameters())


def trainer(tmp_path, *callbacks, **options):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **{"max_epochs": 1, **quiet, **options},
    )


@pytest.mark.parametrize("callbacks", [0, 1])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_four_batches_make_eight_forward_passes(tmp_path, callbacks, precision):
    module = Module(METHODS["sam"])
    trainer(tmp_path, *[SAMCallback()] * callbacks, precision=precision).fit(module, loader(4))
    assert module.model.forwards == 8


@pytest.mark.parametrize(("method", "options", "share"), CASES)
def test_training_equals_the_loop_by_hand(tmp_path, method, options, share):
    """As to its evaluations, too: a method's only pass of a step takes whole batches whatever the share."""
    module, reference, options = Module(METHODS[method]), Counted(), OPTIONS[options]
    run = trainer(tmp_path, SAMCallback(ascent_share=share), **options)
    run.fit(module, loader(5))
    size = options.get("accumulate_grad_batches", 1)
    losses = by_hand(
        reference,
        METHODS[method](reference.parameters()),
        in_groups(batches(5), size),
        divide_by=size,  # by Lightning also in the last group, which is shorter
        max_norm=options.get("gradient_clip_val"),
        autocast=torch.bfloat16 if "precision" in options else None,
        share=share,
    )
    same(module.model, reference, 1e-5)
    assert [len(x) for x in module.model.outputs] == [len(x) for x in reference.outputs]
    assert float(run.callback_metrics["loss"]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("method", ["sam", "momentum", "look"])
def test_without_the_callback_it_still_equals_the_loop_by_hand_where_nothing_else_is_asked(tmp_path, method):
    module, reference = Module(METHODS[method]), Counted()
    trainer(tmp_path).fit(module, loader(4))
    by_hand(reference, METHODS[method](reference.parameters()), in_groups(batches(4), 1))
    assert module.model.forwards == reference.forwards
    for p, q in zip(module.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["friendly", "momentum", "look"])
def test_fp16_with_lightnings_scaler_equals_the_loop_by_hand(tmp_path, method):
    scaler, again = (torch.amp.GradScaler("cpu", init_scale=2.0**8) for _ in range(2))
    module, reference = Module(METHODS[method]), Counted()
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer(tmp_path, SAMCallback(), plugins=[plugin], gradient_clip_val=0.5).fit(module, loader(4))
    optimizer = METHODS[method](reference.parameters())
    by_hand(reference, optimizer, in_groups(batches(4), 1), scaler=again, max_norm=0.5, autocast=torch.float16)
    same(module.model, reference, 1e-5)
    assert module.model.forwards == reference.forwards
    assert scaler.state_dict() == again.state_dict()


def test_an_overflow_skips_the_step_and_lowers_the_scale(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    module = Module(METHODS["sam"])
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    trainer(tmp_path, SAMCallback(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(module, loader(2))
    assert scaler.get_scale() == 2.0**38
    for name, p in module.model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate_grad_batches": 2}, "found gradients that it did not compute"),
        ({"plugins": lambda: [MixedPrecision("16-mixed", "cpu")]}, "cannot run two passes"),
    ],
    ids=["accumulation", "fp16"],
)
def test_what_needs_the_callback_is_refused_without_it(tmp_path, options, words):
    options = {k: v() if callable(v) else v for k, v in options.items()}
    with pytest.raises(RuntimeError, match=words):
        trainer(tmp_path, **options).fit(Module(METHODS["sam"]), loader(4))


@pytest.mark.parametrize("fp16", [False, True])
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, fp16):
    def run(epochs):
        plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if fp16 else []
        return trainer(tmp_path, SAMCallback(), max_epochs=epochs, accumulate_grad_batches=2, plugins=plugins)

    undisturbed, first, resumed = (Module(METHODS["friendly"]) for _ in range(3))
    run(2).fit(undisturbed, loader(4))
    half = run(1)
    half.fit(first, loader(4))
    half.save_checkpoint(tmp_path / "half.ckpt")
    run(2).fit(resumed, loader(4), ckpt_path=tmp_path / "half.ckpt")
    for a, b in zip(undisturbed.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_batchnorm_counts_once_and_dropout_draws_the_same_masks(tmp_path):
    module = Module(lambda p: SAM(p, torch.optim.SGD, rho=1e-30, lr=0.0), dropout=0.5)
    trainer(tmp_path, SAMCallback(), accumulate_grad_batches=2).fit(module, loader(4))
    assert int(module.model.layers[1].num_batches_tracked) == 4
    outputs = module.model.outputs
    first, second = outputs[0:2] + outputs[4:6], outputs[2:4] + outputs[6:8]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_eigensam_estimates_its_vector_from_unclipped_gradients(tmp_path):
    module = Module(lambda p: EigenSAM(p, torch.optim.SGD, freq=2, lr=0.1))
    torch.manual_seed(1)
    trainer(tmp_path, SAMCallback(), gradient_clip_val=1e-3).fit(module, loader(4))
    optimizer = module.optimizers().optimizer
    assert optimizer.eigenvector is not None
    assert abs(float(optimizer.last_estimate.eigenvalues[0])) > 0.5


def test_a_step_whose_training_step_returns_none_is_skipped(tmp_path):
    module = Module(METHODS["sam"])
    module.skip = (0, 1, 2, 3)
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    trainer(tmp_path, SAMCallback()).fit(module, loader(4))
    for name, p in module.model.named_parameters():
        assert torch.equal(p, before[name])


def test_an_optimizer_step_of_the_module_that_evaluates_the_closure_itself(tmp_path):
    class Old(Module):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer_closure()
            optimizer.step()

    module, usual = Old(METHODS["friendly"]), Module(METHODS["friendly"])
    for m in (module, usual):
        trainer(tmp_path, SAMCallback()).fit(m, loader(4))
    same(module.model, usual.model)


def test_stochastic_weight_averaging_renews_the_statistics_of_batchnorm(tmp_path):
    module = Module(METHODS["sam"])
    averaging = pl.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1)
    made = trainer(tmp_path, SAMCallback(), averaging, max_epochs=3)
    made.fit(module, loader(4))
    assert made.current_epoch == 4  # one more, for the statistics
    assert made.global_step == 3 * 4 + 1


@pytest.mark.parametrize("method", ["sam", "momentum"])
def test_an_exception_in_the_pass_at_w_plus_e_restores_the_weights_and_the_trainer(tmp_path, method):
    module, before = Module(METHODS[method]), {}

    class Look(pl.Callback):
        def on_train_batch_start(self, *_):
            before.update({name: p.detach().clone() for name, p in module.model.named_parameters()})

    def fail_in_the_second(*_):  # Momentum-SAM's first step is its base's
        if module.model.forwards == 2:
            raise KeyError("from the model")

    module.model.register_forward_hook(fail_in_the_second)
    run = trainer(tmp_path, SAMCallback(), Look())
    with pytest.raises(KeyError, match="from the model"):
        run.fit(module, loader(4))
    for name, p in module.model.named_parameters():
        assert torch.equal(p, before[name])
    assert "optimizer_step" not in vars(run.precision_plugin)


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=rf"ascent_share={share} must be a number in \(0, 1\]"):
        SAMCallback(ascent_share=share)


def test_a_batch_that_cannot_be_divided_is_named(tmp_path):
    module = Module(METHODS["sam"])
    module.on_before_batch_transfer = lambda batch, _: [*batch, object()]
    with pytest.raises(TypeError, match=r"batch\[2\] is of type object, which cannot be divided"):
        trainer(tmp_path, SAMCallback(ascent_share=0.5)).fit(module, loader(2))


def test_a_training_step_that_draws_its_batches_itself_is_refused(tmp_path):
    class Drawing(Module):
        def training_step(self, dataloader_iter):
            return super().training_step(*next(dataloader_iter)[:2])

    with pytest.raises(ValueError, match=r"draws another batch whenever it is called.*training_step\(batch\)"):
        trainer(tmp_path, SAMCallback()).fit(Drawing(METHODS["sam"]), loader(2))


def test_another_optimizer_is_refused(tmp_path):
    with pytest.raises(TypeError, match="needs an optimizer of fastsam, not SGD"):
        trainer(tmp_path, SAMCallback()).fit(Module(lambda p: torch.optim.SGD(p, lr=0.1)), loader(2))


@pytest.mark.parametrize("at", [2, 3], ids=["first pass", "second pass"])
def test_a_run_that_failed_leaves_no_micro_batches_to_the_next(tmp_path, at):
    module, callback = Module(METHODS["sam"]), SAMCallback()

    def fail(*_):
        if module.model.forwards == at:
            raise RuntimeError("CUDA out of memory.")

    hook = module.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, callback, accumulate_grad_batches=2).fit(module, loader(2))
    hook.remove()
    trainer(tmp_path, callback, accumulate_grad_batches=2).fit(module, loader(2))
    assert module.model.forwards == at + 4


class ManualModule(pl.LightningModule):
    """Manual optimization, in every form of a step."""

    def __init__(self, make, form):
        super().__init__()
        self.automatic_optimization = False
        self.model = Counted(0.0)
        self.make, self.form = make, form
        self.refused = 0

    def loss(self, batch):
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.model(x), y)
        self.manual_backward(loss)
        return loss

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch)
        if self.form == "finish":
            optimizer.finish(lambda: self.loss(batch))
            return
        optimizer.first_step(zero_grad=True)
        with pytest.raises(RuntimeError, match="perturbed"):  # of the wrapper's flag, on the optimizer itself
            self.trainer.save_checkpoint("never written")
        self.refused += 1
        self.loss(batch)
        optimizer.second_step(zero_grad=True)

    def configure_optimizers(self):
        return self.make(self.parameters())


@pytest.mark.parametrize("form", ["passes", "finish"])
@pytest.mark.parametrize("method", ["sam", "friendly"])
def test_manual_optimization_counts_its_steps_and_writes_checkpoints(tmp_path, method, form):
    module = ManualModule(METHODS[method], form)
    checkpoints = pl.callbacks.ModelCheckpoint(dirpath=tmp_path)
    training = trainer(tmp_path, checkpoints, enable_checkpointing=True, limit_train_batches=3)
    training.fit(module, loader(3))
    assert training.global_step == 3
    saved = torch.load(checkpoints.best_model_path, weights_only=False)
    assert saved["global_step"] == 3 and saved["optimizer_states"][0]["state"]
    assert module.refused == (3 if form == "passes" else 0)
