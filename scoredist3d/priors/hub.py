"""Errors of the Hugging Face Hub as sentences that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

INDEX = "model_index.json"
_MOST_NAMES = 5


def hub_problem(error: BaseException, name: str, file: str = INDEX) -> str | None:
    """What prevents the use of a model on the hub, as a clause about the model; None for other errors.

    Args:
        error: An error of ``huggingface_hub``, or one of another library that was caused by it.
        name: Id of the model, ``owner/model``.
        file: The file of the model that was requested.
    """
    from huggingface_hub import constants, errors

    found = next((each for each in _causes(error) if isinstance(each, _types())), None)
    if found is None:
        return None
    folder = "or give the folder of a model"
    if isinstance(found, errors.GatedRepoError):
        page = f"https://huggingface.co/{name}"
        return f"is gated: accept its license at {page} and log in with 'hf auth login', {folder}"
    if isinstance(found, errors.RepositoryNotFoundError):
        return f"is not on the hub, or is private: check the id, log in with 'hf auth login', {folder}"
    if isinstance(found, errors.RevisionNotFoundError):
        return "has no such revision: correct prior.revision"
    if isinstance(found, errors.EntryNotFoundError) and not isinstance(found, errors.LocalEntryNotFoundError):
        if not file.endswith(".json"):
            return f"has no file {file}: name one of its files"
        return "lacks a file of a diffusers pipeline: use a model with a model_index.json"
    state = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub cannot be reached"
    cached = cached_models(Path(constants.HF_HUB_CACHE))
    names = ", ".join(cached[:_MOST_NAMES]) + (", ..." if len(cached) > _MOST_NAMES else "")
    return f"is not complete in the cache, which has {names or 'no model'}, and {state}: download it, {folder}"


def cached_models(cache: Path) -> list[str]:
    """Ids of the models in a cache of the hub that have the index of a pipeline, in alphabetical order."""
    found = {path.parents[2].name for path in cache.glob("models--*/snapshots/*/model_index.json")}
    return sorted(name.removeprefix("models--").replace("--", "/", 1) for name in found)


def _types() -> tuple[type[BaseException], ...]:
    from huggingface_hub import errors

    return errors.HfHubHTTPError, errors.EntryNotFoundError, errors.OfflineModeIsEnabled


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
