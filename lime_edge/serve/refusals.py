"""What a client is told when a request fails: the API's own form, and the status that goes with it."""

from __future__ import annotations

from typing import Any

from lime_edge.errors import LimeEdgeError

INVALID, UNAUTHORIZED, FORBIDDEN, BUSY, BROKEN = (
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "rate_limit_error",
    "server_error",
)
KINDS = {401: UNAUTHORIZED, 403: FORBIDDEN, 429: BUSY}


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP. message: what is wrong, for people. code: the same for programs. param: which field.
        retry_after: seconds after which it may be asked again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = KINDS.get(self.status, BROKEN if self.status >= 500 else INVALID)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def refuse(error: LimeEdgeError, param: str | None = None) -> Refusal:
    """A fault that the client can mend, as it is told everywhere else."""
    hint = f" ({error.hint})" if error.hint else ""
    return Refusal(400, f"{error.problem}{hint}", param=param)


def refuse_model(name: str, hint: str = "") -> Refusal:
    """A model that is not here."""
    told = hint or "GET /v1/models lists what there is"
    return Refusal(404, f"the model {name!r} does not exist: {told}", "model_not_found", "model")


def refuse_shutdown() -> Refusal:
    """The server is going down."""
    return Refusal(503, "the server is shutting down", "shutting_down", retry_after=5)
