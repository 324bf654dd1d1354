"""Tables as text and HTML, times in words, and a page that is one file: images are embedded."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .6rem 0 1.4rem; } th, td { padding: .25rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #ddd; }
thead tr { background: #f4f4f4; } img { max-width: 100%; } caption { text-align: left; font-weight: 600; }
.verdict { font-size: 1.1rem; padding-left: .8rem; border-left: 5px solid; }
.good { border-color: #2a9d4a; } .bad { border-color: #c0392b; }
"""


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Aligned columns for a terminal: the first to the left, the others to the right."""
        lines = [list(self.head), *[list(row) for row in self.rows]]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        shown = [
            "  ".join(
                [line[0].ljust(widths[0]), *[cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)]]
            )
            for line in lines
        ]
        rule = "-" * len(shown[0])
        return "\n".join([self.title, rule, shown[0], rule, *shown[1:], rule])

    def html(self) -> str:
        """The table as HTML, escaped."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self.rows)
        caption = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def image(path: Path, caption: str) -> str:
    """An <img> that holds the PNG itself."""
    encoded = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{encoded}"><figcaption>{text}</figcaption></figure>'


def paragraph(text: str, kind: str = "") -> str:
    """One escaped paragraph; `kind` is a class of the style sheet ("verdict good", "verdict bad")."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def page(title: str, parts: Sequence[str]) -> str:
    """A complete HTML page without any outside reference."""
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "2 h 10 min", "3 d 4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
