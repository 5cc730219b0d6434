"""Checkpoints on disk: written whole or not at all, verified, listed, pruned."""

from bdh_mlflow.checkpoint.directory import PENDING, RUN_DIRECTORY, RunDirectory, by_last_save, list_all, pending, why_unwritable
from bdh_mlflow.checkpoint.files import FORMAT, State, Throttle, load, published_weights
from bdh_mlflow.checkpoint.manifest import FileRecord, Manifest, Provenance
from bdh_mlflow.checkpoint.saved import (
    CONFIG_NAME,
    Checkpoint,
    Listing,
    Saved,
    Snapshot,
    best,
    describe,
    expired,
    file_digest,
    file_name,
    list_run,
    newest,
    remove,
    step_of,
    verify,
)
from bdh_mlflow.checkpoint.snapshot import SnapshotOrigin, Taken, copy_of
from bdh_mlflow.checkpoint.writer import Background, BackgroundWriter

__all__ = [
    "CONFIG_NAME",
    "FORMAT",
    "PENDING",
    "RUN_DIRECTORY",
    "Background",
    "BackgroundWriter",
    "Checkpoint",
    "FileRecord",
    "Listing",
    "Manifest",
    "Provenance",
    "RunDirectory",
    "Saved",
    "Snapshot",
    "SnapshotOrigin",
    "State",
    "Taken",
    "Throttle",
    "best",
    "by_last_save",
    "copy_of",
    "describe",
    "expired",
    "file_digest",
    "file_name",
    "list_all",
    "list_run",
    "load",
    "newest",
    "pending",
    "published_weights",
    "remove",
    "step_of",
    "verify",
    "why_unwritable",
]
