"""What is done when no run is open: checkpoints are found, and what waits is delivered."""

from pathlib import Path

from bdh_mlflow.checkpoint import Snapshot
from bdh_mlflow.files import shown
from bdh_mlflow.track import endings
from bdh_mlflow.track.begin import say, snapshot_of
from bdh_mlflow.track.settings import Settings, settings_of
from bdh_mlflow.tracking.locate import Locator


def find(target: str | Path, settings: Settings | str | None = None, *, note: endings.Say = say) -> Path:
    """The checkpoint that `target` names, as it was given to `Run.checkpoint`: a file or folder on this disk, verified.

    target: latest, a path, a run id, runs:/RUN_ID or an artifact URI; RUN:N for its step N.   settings: of the run (folder, store and
    experiment count), or the name of its experiment.   note: called with lines for the user. What is only mirrored is downloaded into the
    run directory that it came from.   Raises ResumeError or CheckpointError; TrackingError where the store is needed and does not answer.
    """
    chosen = settings_of(settings)
    locator = Locator(Path(chosen.folder).absolute(), chosen.config(), (Snapshot,))
    return snapshot_of(locator, str(target), note)[0].content


def sync(folder: str | Path = "checkpoints", tracking_uri: str | None = None, *, note: endings.Say = say) -> int:
    """Deliver what ended runs have left in their journals, as `bdh-mlflow sync` does.   Returns how many records are left.

    folder: with run directories (`Settings.folder`).   tracking_uri: None for the store that each run named.   note: called with a line for
    each run. Raises TrackingError where a store cannot be named.
    """
    from bdh_mlflow.tracking import sync as delivery  # here: it imports MLflow

    left = 0
    for each in delivery.folders_with_journal(Path(folder)):
        result = delivery.sync(each, tracking_uri, note)
        note(f"{shown(each)}: {result.words}")
        left += result.left
    return left
