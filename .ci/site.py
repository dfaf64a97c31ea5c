"""Hooks of the documentation site: links to files outside docs/, and roles of reStructuredText in docstrings."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

logger = logging.getLogger("mkdocs.hooks.site")

_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):(?=<code>)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page whose links to files of the repository outside docs/ lead to the repository's site."""

    def linked(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        if not (ROOT / path).exists():
            logger.warning("%s links to ../%s, which does not exist", page.file.src_uri, path)
        return f"]({config.repo_url}/blob/main/{path}{anchor})"

    return _OUTSIDE.sub(linked, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Return a page without the roles that docstrings put before a name."""
    return _ROLE.sub("", html)
