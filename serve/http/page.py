"""The page at ``/``, and the policy under which a browser shows it."""

import hashlib
import re
from base64 import b64encode
from importlib import resources

from starlette.responses import Response


def page() -> Response:
    """Read the page, whose script and style are allowed by their hashes and nothing else is."""
    content = resources.files("trainkit.serve.http").joinpath("page.html").read_bytes()
    policy = "; ".join(
        [
            "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'",
            "form-action 'none'; frame-ancestors 'none'",
            f"script-src {_hashes(content, b'script')}",
            f"style-src {_hashes(content, b'style')}",
        ]
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    return Response(content, 200, headers, "text/html; charset=utf-8")


def _hashes(page: bytes, tag: bytes) -> str:
    blocks = re.findall(b"<%s[^>]*>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
    digests = (b64encode(hashlib.sha256(block).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
