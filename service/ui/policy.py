"""What browsers let the studio's page do (Content Security Policy, W3C): ask its own server, and run its own scripts.

Should markup of a stranger's ever come into the page, it could neither run nor send anything elsewhere. Gradio's page
has scripts inline: those that the server sent are named by their digests, and no others run. Its style sheets are made
in the page, so styles may be inline; and its components of HTML evaluate texts, as nobody can who can't run a script.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable

_INLINE = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL | re.IGNORECASE)


def policy_of(page: bytes, origins: Iterable[str]) -> str:
    """The policy of a page of HTML, which pages of `origins` may show in a frame."""
    digests = {base64.b64encode(hashlib.sha256(script).digest()).decode() for script in _INLINE.findall(page)}
    scripts = "".join(f" 'sha256-{digest}'" for digest in sorted(digests))
    return "; ".join((
        "default-src 'self'", f"script-src 'self' 'unsafe-eval'{scripts}", "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:", "font-src 'self' data:", "connect-src 'self'", "object-src 'none'",
        "base-uri 'self'", "form-action 'self'", " ".join(("frame-ancestors 'self'", *origins)),
    ))  # fmt: skip
