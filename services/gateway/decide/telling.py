"""What of a streamed answer may be passed on: text once sent to an HTTP client cannot be taken back. Pure.

A query's stream may start over (another attempt, after a worker was lost). The new attempt is passed on only where it
says again what was sent, so that the text as a whole is always one attempt's; where it says something else the stream
ends as an error. Chunks that were lost on the way are made up for by the final answer, which holds the whole text.
"""

from __future__ import annotations

from shared import messages as m
from shared.errors import Restarted


class Telling:
    """The text sent so far, and what of the present attempt has been heard."""

    def __init__(self) -> None:
        self._sent: list[str] = []
        self._attempt = 0
        self._next = 0
        self._again: str | None = None
        """The present attempt's text while it repeats what was sent; None when it is what was sent."""
        self._gap = False

    @property
    def sent(self) -> str:
        return "".join(self._sent)

    def heard(self, chunk: m.Chunk) -> str:
        """The text to send now, possibly none.

        Raises:
            Restarted: the new attempt differs from what was sent.
        """
        if chunk.attempt < self._attempt:
            return ""
        if chunk.attempt > self._attempt:
            self._attempt, self._next, self._gap = chunk.attempt, 0, False
            self._again = "" if self._sent else None
        if self._gap or chunk.seq != self._next:
            self._gap = self._gap or chunk.seq > self._next
            return ""
        self._next += 1
        if self._again is None:
            self._sent.append(chunk.text)
            return chunk.text
        self._again += chunk.text
        sent = self.sent
        if len(self._again) <= len(sent):
            if not sent.startswith(self._again):
                raise _differs()
            return ""
        rest = _beyond(self._again, sent)
        self._sent, self._again = [self._again], None
        return rest

    def ended(self, text: str) -> str:
        """The rest to send, once the whole text is known.

        Raises:
            Restarted: it differs from what was sent.
        """
        rest = _beyond(text, self.sent)
        self._sent = [text]
        return rest


def _beyond(text: str, sent: str) -> str:
    if not text.startswith(sent):
        raise _differs()
    return text[len(sent) :]


def _differs() -> Restarted:
    return Restarted(
        "The worker that was answering was lost, and a new attempt says something else than what was sent already.",
        'Send the request again; with "stream": false a lost worker goes unnoticed.',
    )
