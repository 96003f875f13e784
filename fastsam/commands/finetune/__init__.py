"""Fine-tune an image classifier of Transformers with a sharpness-aware method: ``fastsam finetune``.

From Python it is
``fastsam.commands.finetune.job.run(Settings(model="folder", data="cifar10", method="fsam", rho=0.1))``
with ``Settings`` from ``fastsam.commands.finetune.settings``.
"""
