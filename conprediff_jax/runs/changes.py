"""What changes in a run that continues with another config."""

from ml_collections import ConfigDict

from conprediff_jax.common.errors import FieldError
from conprediff_jax.config.sections import Change, changes


def allowed_changes(
    config: ConfigDict, stored: dict | None, workdir: str, allow_changes: bool
) -> list[Change]:
    """The keys whose values differ from those of the run in the workdir, by name.

    Args:
        config: The config with which the run continues.
        stored: The config of its newest checkpoint; None for a run that begins.
        workdir: The workdir, for the message.
        allow_changes: Whether guarded keys may change; see `common.keys`.

    Raises:
        ConfigError: One of the configs has a wrong key.
        FieldError: A guarded key changes, and this is not allowed.
    """
    found = changes(config, ConfigDict(stored)) if stored else []
    guarded = [str(change) for change in found if change.role == "guarded"]
    if guarded and not allow_changes:
        raise FieldError(
            "allow_changes",
            f"is not set, and {workdir} holds another run: {'; '.join(guarded)}. Give the earlier "
            "values to continue it, or another workdir for a new run",
        )
    return found
