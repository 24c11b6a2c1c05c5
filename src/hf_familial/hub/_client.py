"""Requests to the Hub, with retries and clear error messages."""

from __future__ import annotations

import email.utils
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

# HTTPError is the base of all errors of the HTTP library that the installed Hub client uses
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

# 408, 429: try later. 412: another commit came in between, so compare again. 5xx: server error.
TRANSIENT = frozenset({408, 412, 429, 500, 502, 503, 504})

NETWORK = (HTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, ConnectionError, TimeoutError)

LOG_IN = (
    "Log in with `hf auth login`, set `HF_TOKEN`, or pass `token=`, with a token from "
    "https://huggingface.co/settings/tokens"
)


@dataclass(frozen=True)
class Retry:
    """A rule for repeating failed requests.

    Attributes:
        attempts (`int`, *optional*, defaults to 6): Maximum number of tries, the first included.
        first_wait (`float`, *optional*, defaults to 1): Seconds before the second try. Each further
            wait is twice as long.
        longest_wait (`float`, *optional*, defaults to 60): Maximum seconds of a wait. If the Hub
            requests a certain wait, that wait replaces the rule.

    Example:
        >>> push_family_to_hub("family", "me/family", retry=Retry(attempts=3))
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def wait(self, failures: int) -> float:
        """Return the seconds to wait after a number of failed tries."""
        return min(self.longest_wait, self.first_wait * 2 ** (failures - 1))


def request(
    what: str, action: Callable[[], T], retry: Retry | None = None, *, uploads: bool = False
) -> T:
    """Run a request to the Hub, and repeat it if it may succeed later.

    `what` completes the message "could not ...", for example "create the repository".
    """
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
            logger.warning(
                "Could not %s (%s). Trying again in %.3g s.", what, _brief(cause), seconds
            )
            time.sleep(seconds)
    raise ValueError(f"`attempts` must be 1 or more, got {retry.attempts}.")


def _network_error(error: BaseException | None) -> Exception | None:
    """Return the error of the network or the Hub that caused `error`, or `None`."""
    # the Hub client wraps errors from its upload threads
    while error is not None and not isinstance(error, NETWORK):
        error = error.__cause__
    if isinstance(error, RemoteEntryNotFoundError):
        return None  # the Hub answered that a file is missing, which callers often expect
    return error if isinstance(error, Exception) else None


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _is_transient(error: Exception) -> bool:
    if isinstance(error, (OfflineModeIsEnabled, LocalTokenNotFoundError)):
        return False
    # without a status, the connection was lost or never established
    return _status(error) in TRANSIENT | {None}


def _asked_wait(error: Exception) -> float | None:
    """Return the waiting time that the Hub requests, in seconds, or `None`."""
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
    """Return the message of an error in one line."""
    status = _status(error)
    said = str(error.server_message or "") if isinstance(error, HfHubHTTPError) else str(error)
    said = " ".join(said.split()) or type(error).__name__
    return said if status is None else f"{status}: {said}"


def _explained(what: str, error: Exception, attempts: int, uploads: bool) -> HubError:
    """Return an error of the right type whose message says what the user can do."""
    status, said = _status(error), _brief(error)
    kind: type[HubError]
    if isinstance(error, OfflineModeIsEnabled):
        kind, why = HubUnavailableError, "offline mode is on. Unset `HF_HUB_OFFLINE`."
    elif isinstance(error, LocalTokenNotFoundError):
        kind, why = HubAuthError, f"there is no token. {LOG_IN}."
    elif _is_transient(error):
        kept = " Files that were uploaded are kept." if uploads else ""
        kind, why = HubUnavailableError, f"{said}. Try again later.{kept}"
        what += f" in {attempts} tries" if attempts > 1 else ""
    elif isinstance(error, GatedRepoError):
        kind = HubPermissionError
        why = f"the repository is gated. Request access on its page on the Hub ({said})."
    # for a missing repository the Hub may also answer 401, so that private names stay secret
    elif isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)) or status == 404:
        kind = HubNotFoundError
        why = (
            "there is no such repository, revision or file, or it is private and the token has no "
            f"access ({said}). {LOG_IN}."
        )
    elif status == 401:
        kind, why = HubAuthError, f"the Hub does not accept the token ({said}). {LOG_IN}."
    elif status == 403:
        kind = HubPermissionError
        why = (
            f"the token has no permission for that ({said}). It needs the role `write` for this "
            "user or organisation. See https://huggingface.co/settings/tokens."
        )
    else:
        kind, why = HubError, f"{said}."
    return kind(f"could not {what}: {why}")
