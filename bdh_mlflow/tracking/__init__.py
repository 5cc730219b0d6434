"""From the training loop to MLflow: a journal on disk, a sender, the run, the mirror, and finding a checkpoint again."""
