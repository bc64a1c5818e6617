"""A card as one HTML page, to look at it before it is published."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

import yaml
from markdown_it import MarkdownIt

from dspark_packaging.hub_rules import read_front_matter

_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
_IMAGE = re.compile(r'src="([\w./-]+\.png)"')
#: Close to how the Hub shows a card: its width, its fonts, tables that scroll in themselves.
_STYLE = """
body { font: 16px/1.6 system-ui, "Liberation Sans", "DejaVu Sans", sans-serif; color: #1f2328;
  max-width: 860px; margin: 2rem auto; padding: 0 1rem; }
pre, code { font-family: ui-monospace, "Liberation Mono", "DejaVu Sans Mono", monospace; font-size: 85%; }
code { background: #f0f1f3; padding: .15em .35em; border-radius: 5px; overflow-wrap: anywhere; }
pre { background: #f6f8fa; padding: 1rem; border-radius: 8px; overflow: auto; }
pre code { background: none; padding: 0; overflow-wrap: normal; }
.table { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0; font-size: 92%; }
th, td { border: 1px solid #d1d9e0; padding: .35rem .7rem; } tr:nth-child(2n) td { background: #f6f8fa; }
thead th:empty { padding: 0; border-bottom: 0; }
blockquote { margin: 1rem 0; padding: .2rem 1rem; border-left: 4px solid #0969da; background: #f4f8fe; }
img { max-width: 100%; } h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: .3rem; }
.meta { color: #59636e; font-size: 85%; } .meta b { color: #1f2328; }
"""


def render_html(card: str, folder: Path) -> str:
    """The page of a card; images beside it are put into it.

    Args:
        card: Markdown with front matter.
        folder: where the card lies.

    Raises:
        PackageError: no front matter.
    """
    meta = read_front_matter(card)
    text = _COMMENT.sub("", card.split("\n---\n", 1)[1])
    # HTML inside a card is shown, not run.
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="table"><table>').replace(
        "</table>", "</table></div>"
    )

    def embed(match: re.Match[str]) -> str:
        path = folder / match[1]
        if not path.is_file():
            return match[0]
        return f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"'

    shown = " · ".join(
        f"<b>{html.escape(str(key))}</b> {html.escape(yaml.safe_dump(value, default_flow_style=True).splitlines()[0])}"
        for key, value in meta.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f'<body><p class="meta">{shown}</p>\n{_IMAGE.sub(embed, body)}</body></html>\n'
    )
