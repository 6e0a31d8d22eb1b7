"""Explain in one line why a model cannot be loaded or is incomplete, and what to do.

transformers and huggingface_hub spread the cause over many lines, or hide it in the chain of exceptions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from mmdora.core.errors import UserError

# The errors that `from_pretrained` raises for files that are missing, damaged or of another model.
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    SafetensorError,
    UnpicklingError,
    EOFError,
)


def why(error: BaseException, name: str, revision: str | None = None) -> str:
    """Return the reason for one of LOADING_ERRORS in one line.

    `name` is a hub id or a directory, `revision` a branch, tag or commit on the hub.
    """
    page = f"{constants.ENDPOINT}/{name}"
    login = "log in with `hf auth login`"
    fetch = f"`hf download {name}{'' if revision in (None, 'main') else f' --revision {revision}'}`"
    for cause in _chain(error):
        if isinstance(cause, SafetensorError | UnpicklingError | EOFError) or "PytorchStreamReader" in str(cause):
            # The first sentence only: torch then advises to disable its safe loading.
            reason = _first_line(cause).partition(". ")[0]
            return f"its weights are damaged or truncated ({reason}); download them again"
        match cause:
            case HFValidationError():
                return "no such directory, and not a hub id (owner/name); check the spelling"
            case GatedRepoError():
                return f"it is gated; accept its licence at {page} and {login} with the same account"
            case RepositoryNotFoundError():
                return f"no such directory, and {page} does not exist; check the spelling, or {login} if it is private"
            case RevisionNotFoundError():
                return f"it has no branch, tag or commit {revision!r}; {page} lists them"
            case HfHubHTTPError() if _status(cause) in (401, 403):
                return f"access to {page} is denied (status {_status(cause)}); {login} with an account that has access"
            case HfHubHTTPError() if _status(cause) >= 429:
                return f"{constants.ENDPOINT} is unavailable (status {_status(cause)}); try again later"
            case LocalEntryNotFoundError() if not isinstance(cause.__cause__, HfHubHTTPError):
                missing = f"no such directory, and not in the cache ({constants.HF_HUB_CACHE})"
                if constants.HF_HUB_OFFLINE:
                    return f"{missing}, and HF_HUB_OFFLINE is set; unset it, or run {fetch} on a machine with network"
                return f"{missing}, and {constants.ENDPOINT} does not answer; run {fetch} on a machine with network"
    cached = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}").is_dir()
    # If only some of the files are cached, transformers reports the others as missing in the repository.
    hint = f"; {fetch} downloads files that the cache may lack" if cached and isinstance(error, OSError) else ""
    return _first_line(error) + hint


def check_complete(key: str, name: str, info: dict[str, Any]) -> None:
    """Raise UserError if weights are missing or have another shape: transformers only warns and makes them random.

    `info` is what `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)` returns.
    """
    problems = [
        f"{path} has shape {list(have)}, the model needs {list(want)}" for path, have, want in info["mismatched_keys"]
    ]
    problems += [f"{path} is missing" for path in sorted(info["missing_keys"])]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(f"{key}: the weights of {name!r} do not match its config.json: {problems[0]}{more}")


def _status(error: HfHubHTTPError) -> int:
    return error.response.status_code


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
