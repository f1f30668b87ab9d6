"""What a visitor can do about an error; the error itself is told in the client's words."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError

import knnlm_client as kc


class Trouble(NamedTuple):
    """An error as the page tells it."""

    message: str
    advice: str


# The narrowest class listed wins.
_ADVICE: dict[type[Exception], str] = {
    kc.Unauthorized: "Enter the server's API key under “Keys”, and apply it.",
    kc.Forbidden: "Enter the admin key under “Keys”, and apply it; a server without one changes datastores only "
    "when it is bound to loopback.",
    kc.ConnectionFailed: "See whether the server runs, and whether this page was started with its address.",
    kc.StreamInterrupted: "The text above is incomplete. Try again.",
    kc.TimedOut: "The server is busy or stuck. Try again later.",
    kc.UnexpectedResponse: "Something that is no knnlm server answers there. Check the address that this page was "
    "started with.",
    kc.NotReady: "The server is still starting. Wait a moment, then reload the page.",
    kc.ShuttingDown: "The server is stopping. Try again when it is back.",
    kc.ModelNotFound: "Press “Refresh” to see which models are served now.",
    kc.DocumentNotFound: "Check the document's id. It may have been deleted already.",
    kc.DatastoreNotFound: "Press “Refresh” to see which datastores are loaded now.",
    kc.DocumentExists: "Choose another id, or tick “Replace what has this id”.",
    kc.DatastoreBusy: "Another change of this datastore is under way. Try again when it is done.",
    kc.DatastoreBudget: "Unload a datastore first, or start the server with a larger --datastore-bytes.",
    kc.DatastoreReadOnly: "Start the server with a folder of datastores that it may write to.",
    kc.DatastoreCorrupt: "Load another version, or build the datastore anew.",
    kc.DatastoreMismatch: "Build the datastore with the language model that is served here.",
    kc.PromptTooLong: "Shorten the prompt, or ask for fewer tokens.",
    kc.InternalError: "The server's log says more; look for the request's id there.",
}


def trouble_of(error: Exception) -> Trouble:
    """An error in words, and what to do next."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        return Trouble(f"`{field}`: {first['msg']}", "Correct the field and try again.")
    wait_s = getattr(error, "retry_after_s", None)
    if isinstance(error, (kc.Overloaded, kc.RateLimited)):
        return Trouble(str(error), f"Try again in {wait_s:g} s." if wait_s is not None else "Try again in a moment.")
    known = (_ADVICE[cls] for cls in type(error).__mro__ if cls in _ADVICE)
    return Trouble(str(error), next(known, "Correct what it names and try again."))
