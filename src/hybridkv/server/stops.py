"""Find stop strings in a stream of text: text that may become one is withheld until that is known."""

from __future__ import annotations

from collections.abc import Sequence

from hybridkv.server.channels import overlap


class StopStrings:
    """Passes text through up to the first stop string that is complete.

    How the text is split makes no difference: of several stop strings the one that is complete first counts,
    of those that are complete at the same character the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    @property
    def n_held(self) -> int:
        """Characters that are withheld."""
        return len(self._held)

    def push(self, text: str) -> str:
        """Add `text`; return what can be handed out now."""
        if self.found or not text:
            return ""
        self._held += text
        matches = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if matches:
            _, at = min(matches)
            content, self._held, self.found = self._held[:at], "", True
            return content
        n_held = max((overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - n_held
        content, self._held = self._held[:cut], self._held[cut:]
        return content

    def close(self) -> str:
        """Return the withheld text that has not become a stop string."""
        content, self._held = self._held, ""
        return content
