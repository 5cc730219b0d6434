"""bdh-mlflow: train BDH ("Dragon Hatchling") from a YAML config, tracked by MLflow, resumable bit for bit."""

__version__ = "0.2.0"
"""The only place that says so: pyproject.toml reads it from here."""
