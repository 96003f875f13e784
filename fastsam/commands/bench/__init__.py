"""The measurements behind ``fastsam bench``; nothing here imports more than torch, except the command itself."""
