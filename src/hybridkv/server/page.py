"""The chat page as it is sent: one file, and headers that let it do nothing but talk to this server."""

from __future__ import annotations

import base64
import hashlib
import re


class Page:
    """A page whose one script and one style are inline.

    Parameters
    ----------
    text
        The HTML.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        script, style = (self._hash(tag) for tag in ("script", "style"))
        policy = (
            f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self.headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    def _hash(self, tag: str) -> str:
        """Hash what stands in the one such element, so that exactly this is allowed."""
        [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>", self.text, re.DOTALL)
        digest = hashlib.sha256(inside.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"
