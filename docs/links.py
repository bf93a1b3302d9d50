"""mkdocs hook: links to files of the repository work on the site as they do in the repository.

Pages link to ``../serve/bundle.py`` and the like. On the site such a link leads to the file in
``repo_url`` if ``mkdocs.yml`` has one; otherwise only its text is kept. A file that does not exist
is an error.
"""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError

OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown, config, **_):
    """Return the page's Markdown without links out of ``docs/``."""
    root = Path(config.config_file_path).parent

    def replace(match):
        image, text, path, anchor = match.groups()
        if not (root / path).exists():
            raise PluginError(f"a page links to {path}, which does not exist")
        if image:
            return f"*{text}: {path}*"
        if not config.repo_url:
            return text if "`" in text or text == path else f"{text} (`{path}`)"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor or ''})"

    return OUTSIDE.sub(replace, markdown)
