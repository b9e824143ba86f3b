"""A panel in a notebook: one output of the cell that is drawn again and again.

IPython's own displays will do; no widgets are needed.
"""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console, RenderableType

WIDTH = 100
PAGE = '<pre style="line-height:normal;font-family:monospace">{code}</pre>'


class NotebookPanel:
    """What one cell shows of a run."""

    def __init__(self) -> None:
        """Nothing is shown yet."""
        self._shown: Any = None

    def show(self, renderable: RenderableType) -> None:
        """Show this in place of what was shown before."""
        from IPython.display import HTML, display

        page = HTML(html_of(renderable))  # type: ignore[no-untyped-call]
        if self._shown is None:
            self._shown = display(page, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._shown.update(page)


def html_of(renderable: RenderableType) -> str:
    """What rich would draw on a terminal, as HTML with its colours."""
    console = Console(
        file=io.StringIO(),
        record=True,
        width=WIDTH,
        force_terminal=True,
        force_jupyter=False,
        color_system="truecolor",
    )
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=PAGE)
