"""What the servers on this machine have in common that stand for the APIs of clouds and clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import unquote

from tests.job.answering import JsonHandler, serving


class Refusal(Exception):
    """A status, a message and perhaps a reason: Kubernetes' Status and Google's error, both old and new, in one."""

    @property
    def body(self) -> dict[str, Any]:
        code, message, *reasons = self.args
        error = {"code": code, "message": message, "errors": [{"message": message, "reason": each} for each in reasons]}
        return {"kind": "Status", "code": code, "message": message, "error": error}


class Api:
    """An API, what it was asked, and what goes wrong with it."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[str] = []
        """Method and path of each request, in order."""
        self.faults: list[tuple[str, Callable[[], object]]] = []
        """A method, and what happens at its next request instead; each is used once."""

    def refuse_next(self, code: int, message: str, *reasons: str, times: int = 1, method: str = "") -> None:
        """Has the next `times` requests, or those of a method, answered with an error."""

        def refuse() -> None:
            raise Refusal(code, message, *reasons)

        self.faults += [(method, refuse)] * times

    def answer(self, method: str, target: str, body: Any, headers: Any) -> Any:
        """Answers a request, or raises a `Refusal`."""
        raise NotImplementedError

    def note(self, method: str, target: str) -> None:
        """Writes a request down; the next fault is its if it is one of that method."""
        self.requests.append(unquote(f"{method} {target}"))
        if self.faults and method.startswith(self.faults[0][0]):
            self.faults.pop(0)[1]()

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Answers for as long as the block lasts, on a port of its own."""
        api = self

        class Handler(JsonHandler):
            def do_GET(self) -> None:
                try:
                    self.say(200, api.answer(self.command, self.path, self.heard(), self.headers))
                except Refusal as refusal:
                    self.say(refusal.args[0], refusal.body)

            do_POST = do_DELETE = do_GET

        with serving(Handler) as self.url:
            yield self
