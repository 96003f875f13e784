"""The common ground of the commands and benchmarks: networks, data, augmentation, batches, schedule, training loop.

And a folder for a run that survives being killed. Each of these is here once.
"""
