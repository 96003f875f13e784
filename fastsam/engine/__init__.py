"""The two-pass step underneath every optimizer."""
