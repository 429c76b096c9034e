"""What the services have in common: errors in Google's form, and bodies that are messages of a proto."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format

_WORDS = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND"}
_WORDS |= {409: "ALREADY_EXISTS", 429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}


class Refusal(Exception):
    """An answer with an error (cloud.google.com/apis/design/errors, and Compute Engine's older form of it)."""

    def __init__(self, status: int, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        error: dict[str, Any] = {"code": status, "message": message, "status": _WORDS.get(status, "UNKNOWN")}
        if reason:
            error["errors"] = [{"message": message, "domain": "global", "reason": reason}]
        self.body = {"error": error}


def parsed(body: Any, message_type: Any) -> Any:
    """A body as the message that it must be: unknown fields, wrong types and unknown words are refused."""
    message = message_type.pb(message_type())
    try:
        json_format.ParseDict(body, message)
    except json_format.ParseError as error:
        raise Refusal(400, f"Invalid JSON payload received. {error}") from error
    return message


def answered(answer: Any, message_type: Any) -> Any:
    """An answer that a service could give: whoever asks reads no field that the proto does not have."""
    json_format.ParseDict(answer, message_type.pb(message_type()))
    return answer


def as_json(message: Any) -> dict[str, Any]:
    return json_format.MessageToDict(message)
