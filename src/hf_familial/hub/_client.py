"""Requests to the Hub: which to send again, after how long, and what to tell the user."""

from __future__ import annotations

import email.utils
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

# the base of every error of the HTTP library that this version of the client stands on
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from ..errors import (
    HubAuthError,
    HubError,
    HubNotFoundError,
    HubPermissionError,
    HubUnavailableError,
)


logger = logging.getLogger(__name__)

T = TypeVar("T")

# 408 and 429: later; 412: somebody else wrote in between, look again; 5xx: the server's trouble
TRANSIENT = frozenset({408, 412, 429, 500, 502, 503, 504})

NETWORK = (HTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, ConnectionError, TimeoutError)

LOG_IN = (
    "Log in with `hf auth login`, set `HF_TOKEN`, or pass `token=`, with a token of "
    "https://huggingface.co/settings/tokens"
)


@dataclass(frozen=True)
class Retry:
    """A rule for sending a failed request again: how often, and how soon.

    Attributes:
        attempts (`int`): Tries in all.
        first_wait (`float`): Seconds before the second; doubled each time.
        longest_wait (`float`): Seconds, at most. A wait that the Hub itself asks for may be longer.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def wait(self, failures: int) -> float:
        """Return the seconds to wait after that many failures."""
        return min(self.longest_wait, self.first_wait * 2 ** (failures - 1))


def request(
    what: str, action: Callable[[], T], retry: Retry | None = None, *, uploads: bool = False
) -> T:
    """Do something on the Hub; try again what may succeed later."""
    retry = retry or Retry()
    for failures in range(1, retry.attempts + 1):
        try:
            return action()
        except Exception as error:
            cause = _network_error(error)
            if cause is None:
                raise
            if not _is_transient(cause) or failures == retry.attempts:
                raise _explained(what, cause, failures, uploads) from error
            seconds = _asked_wait(cause)
            seconds = retry.wait(failures) if seconds is None else seconds
            logger.warning("Could not %s (%s); again in %.3g s.", what, _brief(cause), seconds)
            time.sleep(seconds)
    raise ValueError(f"`attempts` must be 1 or more, got {retry.attempts}.")


def _network_error(error: BaseException | None) -> Exception | None:
    """Return what the network or the Hub said, where an error comes from that."""
    # the client wraps what goes wrong in a thread of an upload
    while error is not None and not isinstance(error, NETWORK):
        error = error.__cause__
    if isinstance(error, RemoteEntryNotFoundError):
        return None  # an answer, and often the one that was hoped for
    return error if isinstance(error, Exception) else None


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _is_transient(error: Exception) -> bool:
    if isinstance(error, (OfflineModeIsEnabled, LocalTokenNotFoundError)):
        return False
    # no status: the connection was lost, or never made
    return _status(error) in TRANSIENT | {None}


def _asked_wait(error: Exception) -> float | None:
    """Return the seconds that the Hub asks to wait, if it does."""
    if not isinstance(error, HfHubHTTPError):
        return None
    after = error.response.headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    if after:
        try:
            moment = email.utils.parsedate_to_datetime(after).timestamp()
        except ValueError:
            return None
        return max(0.0, moment - time.time())
    limit = parse_ratelimit_headers(error.response.headers)
    return float(limit.reset_in_seconds) if limit and not limit.remaining else None


def _brief(error: Exception) -> str:
    """Return an error in one line."""
    status = _status(error)
    said = str(error.server_message or "") if isinstance(error, HfHubHTTPError) else str(error)
    said = " ".join(said.split()) or type(error).__name__
    return said if status is None else f"{status}: {said}"


def _explained(what: str, error: Exception, attempts: int, uploads: bool) -> HubError:
    """Return the error that says what to do."""
    status, said = _status(error), _brief(error)
    kind: type[HubError]
    if isinstance(error, OfflineModeIsEnabled):
        kind, why = HubUnavailableError, "offline mode is on; unset `HF_HUB_OFFLINE`."
    elif isinstance(error, LocalTokenNotFoundError):
        kind, why = HubAuthError, f"there is no token. {LOG_IN}."
    elif _is_transient(error):
        kept = "; what was uploaded is kept" if uploads else ""
        kind, why = HubUnavailableError, f"{said}. Do the same again later{kept}."
        what += f" in {attempts} tries" if attempts > 1 else ""
    elif isinstance(error, GatedRepoError):
        kind = HubPermissionError
        why = f"it is gated; ask for access on its page on the Hub ({said})."
    # the Hub answers 401 for a repository that does not exist, too: to tell would be to leak
    elif isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)) or status == 404:
        kind = HubNotFoundError
        why = (
            "there is no such repository, revision or file, or it is private and the token does "
            f"not open it ({said}). {LOG_IN}."
        )
    elif status == 401:
        kind, why = HubAuthError, f"the Hub does not accept the token ({said}). {LOG_IN}."
    elif status == 403:
        kind = HubPermissionError
        why = (
            f"the token may not do that ({said}). It needs the role `write` for this user or "
            "organisation: https://huggingface.co/settings/tokens."
        )
    else:
        kind, why = HubError, f"{said}."
    return kind(f"could not {what}: {why}")
