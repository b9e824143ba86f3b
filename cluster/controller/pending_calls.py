"""What a backend has been asked and has not answered yet, and who is told when it does."""

from __future__ import annotations

from collections.abc import Callable

from downpour.cluster.controller.backend import Backend, Done, Ticket


class Tickets:
    """Those of one run. All that its controller does, it does in the handlers called here."""

    def __init__(self, backend: Backend, *, after: Callable[[], None]) -> None:
        """None yet; `after` is called at the end of every `turn`."""
        self._backend = backend
        self._after = after
        self._handlers: dict[Ticket, Callable[[Done], None]] = {}

    def expect(self, ticket: Ticket, handle: Callable[[Done], None]) -> None:
        """Have `handle` told what becomes of a ticket."""
        self._handlers[ticket] = handle

    def turn(self, timeout_s: float) -> None:
        """Wait for at least one, at most `timeout_s`, and tell of all that are done."""
        for done in self._backend.wait(list(self._handlers), timeout_s):
            self._handlers.pop(done.ticket)(done)
        self._after()
