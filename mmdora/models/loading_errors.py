"""Why a model cannot be loaded, or is not whole, in one line that says what to do.

transformers and huggingface_hub spread the cause over many lines, or keep it in the chain of exceptions.
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

# What `from_pretrained` and its kin raise for files that are missing, damaged or another model's.
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
    """One line for an error of LOADING_ERRORS; `name` is a hub id or a directory, `revision` one of the hub."""
    page = f"{constants.ENDPOINT}/{name}"
    login = "log in with `hf auth login`"
    fetch = f"`hf download {name}{'' if revision in (None, 'main') else f' --revision {revision}'}`"
    for cause in _chain(error):
        if isinstance(cause, SafetensorError | UnpicklingError | EOFError) or "PytorchStreamReader" in str(cause):
            # Only the first sentence: torch goes on to advise to load what it cannot trust.
            said = _first_line(cause).partition(". ")[0]
            return f"its weights are damaged or cut short ({said}); fetch them again"
        match cause:
            case HFValidationError():
                return "there is no such directory, and a hub id is written owner/name; check the spelling"
            case GatedRepoError():
                return f"it is gated; accept its licence at {page} and {login}, with the same account"
            case RepositoryNotFoundError():
                return f"there is no such directory, and no {page}; check the spelling, or {login} if it is private"
            case RevisionNotFoundError():
                return f"it has no branch, tag or commit {revision!r}; {page} shows those that it has"
            case HfHubHTTPError() if _status(cause) in (401, 403):
                return f"{page} may not be read (status {_status(cause)}); {login} as someone who may"
            case HfHubHTTPError() if _status(cause) >= 429:
                return f"{constants.ENDPOINT} has no answer now (status {_status(cause)}); try again later"
            case LocalEntryNotFoundError() if not isinstance(cause.__cause__, HfHubHTTPError):
                lacks = f"there is no such directory, nor is it in the cache ({constants.HF_HUB_CACHE})"
                if constants.HF_HUB_OFFLINE:
                    return f"{lacks}, and HF_HUB_OFFLINE is set; unset it, or run {fetch} where there is a network"
                return f"{lacks}, and {constants.ENDPOINT} does not answer; run {fetch} where there is a network"
    cached = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}").is_dir()
    # Some files were there and others not, which transformers tells as if the repository did not have them.
    hint = f"; {fetch} gets what the cache may lack" if cached and isinstance(error, OSError) else ""
    return _first_line(error) + hint


def check_complete(key: str, name: str, found: dict[str, Any]) -> None:
    """Raise UserError where weights are missing or misshapen: transformers makes up random ones, and only warns.

    `found` is what `from_pretrained(…, output_loading_info=True, ignore_mismatched_sizes=True)` tells.
    """
    wrong = [
        f"{path} is {list(have)} where the model has {list(want)}" for path, have, want in found["mismatched_keys"]
    ]
    wrong += [f"{path} is missing" for path in sorted(found["missing_keys"])]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{key}: the weights of {name!r} do not fit its config.json: {wrong[0]}{more}")


def _status(error: HfHubHTTPError) -> int:
    return error.response.status_code


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
