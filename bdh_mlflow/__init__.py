"""bdh-mlflow: train BDH ("Dragon Hatchling") from a YAML config, tracked by MLflow, resumable bit for bit."""

__version__ = "0.1.0"
