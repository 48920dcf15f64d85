"""The built-in page: one HTML file, and a policy under which a browser runs its own script and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files


@cache
def read_page() -> str:
    """The page's HTML."""
    return (files("lime_edge.serve") / "page.html").read_text(encoding="utf-8")


def _hash_of(tag: str) -> str:
    """The content of the page's one <script> or <style>, as a policy names it."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", read_page(), re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def write_policy() -> str:
    """The Content-Security-Policy: requests to this server alone, nobody may frame it."""
    return (
        f"default-src 'none'; script-src {_hash_of('script')}; style-src {_hash_of('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


CONTENT_POLICY = write_policy()
