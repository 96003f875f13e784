"""What a step meets in a training loop: mixed precision, what a model changes in itself, checkpoint files."""
