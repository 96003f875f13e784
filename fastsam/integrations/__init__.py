"""fastsam in the training loops of others, each in a module of its own, so that none of them is imported unasked.

fastsam.integrations.lightning      SAMCallback, for Lightning's automatic optimization
fastsam.integrations.transformers   SAMTrainer, for the Trainer of Transformers
fastsam.integrations.accelerate     SAMOptimizer, for loops around an Accelerator
"""
