"""What every training run here needs: its data, its augmentation, and a folder that survives being killed."""
