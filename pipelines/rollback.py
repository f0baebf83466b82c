"""Set the champion back to the version that it replaced.

    python pipelines/rollback.py
    python pipelines/rollback.py --set name=longclip --set to_version=3

Nothing is deleted, so the newer version can be promoted a second time. An MLflow run records the rollback, and both
versions name it. An application that serves
models:/longclip@champion uses the older version from its next deployment.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from pydantic import PositiveInt

from longclip.errors import ConfigError, PromotionError
from longclip.model_uri import ModelUri
from pipelines.common.entry import run_entry
from pipelines.common.events import warn
from pipelines.common.progress import Progress
from pipelines.common.settings import Settings, load_settings
from pipelines.common.storage import local_path


class RollbackSettings(Settings):
    """Settings of a rollback."""

    name: str = "longclip"
    """Registered model."""
    champion: str = "champion"
    """Alias of the version in use, which is moved."""
    to_version: PositiveInt | None = None
    """Version to return to; null for the one that the champion replaced."""
    experiment: str = "longclip"
    """MLflow experiment of the run that records the rollback."""
    directory: str = "var"
    """Local directory of MLflow's database, without MLFLOW_TRACKING_URI."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the name of the program."""
    settings = load_settings(RollbackSettings, __doc__ or "", argv)
    from pipelines.registry.server import configured_uri  # imports MLflow, which --help does not need
    from pipelines.registry.versions import alias_version, move_alias, replaced_version, resolve_version

    progress = Progress("rollback")
    uri = configured_uri() or _database(settings.directory)
    current = alias_version(uri, settings.name, settings.champion)
    if current is None:
        raise PromotionError(f"'{settings.name}' has no alias '{settings.champion}' at {uri}; there is nothing to undo")
    if settings.to_version:
        version: str | None = str(settings.to_version)
        resolve_version(uri, str(ModelUri(settings.name, version)))  # refuses a version that does not exist
    else:
        version = replaced_version(uri, settings.name, current)
    if version is None:
        raise PromotionError(
            f"version {current} of '{settings.name}' replaced none as '{settings.champion}'; name one with --set"
            " to_version="
        )
    if version != current:
        move_alias(uri, settings.name, settings.champion, current, version, remember=False)
        _record(uri, settings, current, version)
    progress.summary(0, 0, 0, f"'{settings.champion}' moved from version {current} to {version}")


def _record(uri: str, settings: RollbackSettings, left: str, version: str) -> None:
    """A run that says what was moved, its id as a tag of both versions, and a section in the card of the one left."""
    from pipelines.registry.cards import add_to_card
    from pipelines.registry.runs import end_run, start_run
    from pipelines.registry.versions import ROLLBACK_TAG, tag_version

    moved = {"model": settings.name, "alias": settings.champion, "from_version": left, "to_version": version}
    try:
        run_id = start_run(uri, settings.experiment, f"rollback-{settings.name}", moved)
        end_run(uri, run_id, succeeded=True)
        for number in (left, version):
            tag_version(uri, settings.name, number, {ROLLBACK_TAG: run_id})
    except ConfigError as error:
        warn(f"the rollback is done, but not recorded in MLflow: {error}")
        return
    text = f"Rolled back to version {version} on {datetime.now(UTC).date()}, MLflow run `{run_id}`."
    add_to_card(uri, settings.name, left, "Rollback", text)


def _database(directory: str) -> str:
    """URI of MLflow's database in a directory; unlike `tracking_uri` this creates none."""
    from pipelines.registry.server import DATABASE, tracking_uri

    path = local_path("directory", directory)
    if not (path / DATABASE).is_file():
        raise ConfigError(
            f"directory='{path}' has no registry ({DATABASE}); give the directory with it, or set MLFLOW_TRACKING_URI"
        )
    return tracking_uri(path)


if __name__ == "__main__":
    run_entry(main)
