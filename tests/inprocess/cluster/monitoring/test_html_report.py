"""A run as one page."""

from __future__ import annotations

import html.parser
from pathlib import Path

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.html_report import write_report
from downpour.cluster.run.folder import RunFolder


class Page(html.parser.HTMLParser):
    """What a page refers to, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elsewhere: list[str] = []
        self.tags: list[str] = []
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.elsewhere += [v or "" for k, v in attrs if k in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.said += data


def test_the_report_needs_nothing_besides_itself(folder: RunFolder) -> None:
    staleness = {"mean": 4.0, "histogram": [[0, 5], [7, 9]]}
    result = {"accuracy": 0.9, "exactly_once": True, "staleness": staleness}
    folder.write_json("result.json", result)
    text = write_report(folder.path).read_text()
    page = Page(text)
    assert page.elsewhere == []
    assert "script" not in page.tags
    assert "url(" not in text
    assert page.tags.count("svg") == 7
    assert "a <b>replica</b> was lost" in page.said
    assert "90.00%" in page.said


def test_a_run_without_metrics_has_no_report(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "a", recipes.find("mnist-bn"))
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write_report(tmp_path / "a")
