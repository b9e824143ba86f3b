"""A run as one page."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path

import pytest
import torch

from downpour.cluster.config import recipes
from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.report.html_report import write_report
from downpour.cluster.run.folder import ANSWERS, RunFolder
from downpour.workers.evaluation.answers import Answers


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
    assert [place for place in page.elsewhere if not place.startswith("data:image/png;")] == []
    assert "script" not in page.tags
    assert "url(" not in text
    assert page.tags.count("svg") == 7
    assert "a <b>replica</b> was lost" in page.said
    assert "90.00%" in page.said


def shown(folder: RunFolder) -> str:
    return write_report(folder.path).read_text()


def test_axes_are_labelled_and_shares_stay_within_their_whole(tmp_path: Path) -> None:
    """One scoring is a dot, and its axis does not go beyond 100%."""
    folder = RunFolder.create(tmp_path / "a", recipes.find("mnist-bn"))
    folder.append_metrics({"updates": 10, "accuracy": 0.98, "loss": 0.5})
    text = shown(folder)
    assert text.count("<svg") == 2
    assert text.count("class=dot") == 2
    assert "polyline" not in text
    assert text.count(">updates</text>") == 2
    shares = [float(x) for x in re.findall(r">(\d+\.\d+)%</text>", text)]
    assert shares
    assert max(shares) <= 100
    assert "chance 10.00%" in text
    assert "minmax(min(100%, 460px), 1fr)" in text, "a phone is narrower than a figure"


def test_examples_that_were_left_out_are_listed_and_not_called_trained(folder: RunFolder) -> None:
    result = {"accuracy": 0.9, "exactly_once": True, "images_skipped": 4, "refused": 1}
    lines = [f"row {n} (cat/{n}.jpg): cannot be decoded" for n in range(4)]
    folder.write_json("result.json", {**result, "skipped": lines, "evaluation_skipped": ["row 9"]})
    said = Page(shown(folder)).said
    assert "no: 4 images and 1 mini-batch left out" in said
    assert "Training images left out (4)" in said
    assert all(line in said for line in [*lines, "row 9"])
    folder.write_json("result.json", {"accuracy": 0.9, "exactly_once": True, "images_skipped": 0})
    assert "yesevery example exactly once" in Page(shown(folder)).said


def test_classes_and_mistakes_are_shown(folder: RunFolder) -> None:
    answers = Answers()
    outputs = torch.eye(3)[[0, 0, 1, 2, 2]] * 4
    answers.add(torch.rand(5, 1, 8, 8), outputs, torch.tensor([0, 1, 1, 2, 0]))
    answers.save(str(folder.path / ANSWERS), [10, 11, 12, 13, 15])
    folder.write_json("result.json", {"accuracy": 0.6, "exactly_once": True})
    folder.write_json("data.json", {"class_names": ["a cat", "dog", "<b>"]})
    folder.append_event("learns nothing so far: look at the rate")
    text = shown(folder)
    page = Page(text)
    assert page.tags.count("img") == 2
    assert page.tags.count("meter") == 3
    for words in ("0 a cat", "is 1 dog, taken for 0 a cat", "row 11", "row 15", "2 <b>"):
        assert words in page.said
    assert "<p class=warning>learns nothing so far" in text
    assert folder.config().data.data in page.said
    assert "always the same class 40.00%" in page.said


def test_a_run_without_metrics_has_no_report(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "a", recipes.find("mnist-bn"))
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write_report(tmp_path / "a")
