"""How a network does on each class, and its worst mistakes, as HTML. Pure.

What is shown was collected while the last weights were scored (`workers.evaluation.answers`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from downpour.cluster.monitoring.report.figures import text
from downpour.cluster.monitoring.texts import percent_text

MOST_CELLS = 25
"""Classes of which a matrix is drawn; of more, the answers that are mixed up most are listed."""
MOST_CLASSES = 50
"""Classes of which the accuracy is listed; of more, the worst."""
MOST_MIXED = 20


def class_name(names: Sequence[str], label: int) -> str:
    """Return what a class is called: its name if it has one, and its number."""
    named = 0 <= label < len(names) and names[label] and names[label] != str(label)
    return f"{label} {names[label]}" if named else str(label)


def chance(answers: Mapping[str, Any] | None, num_classes: int) -> tuple[str, float]:
    """Return what an accuracy is to be compared with: its name, and the value.

    That is the share of the most frequent class if the labels have been counted, else 1 / C.
    """
    guess = 1 / max(1, num_classes)
    if answers and answers["examples"]:
        most = max(_by_label(answers["confusion"]).values(), key=lambda c: c.total()).total()
        share = most / answers["examples"]
        if share > guess * 1.1:
            return f"always the same class {percent_text(share)}", share
    return f"chance {percent_text(guess)}", guess


def sections(answers: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the sections on classes: accuracy of each, confusion, worst mistakes."""
    counts = _by_label(answers["confusion"])
    if not counts:
        return ""
    labels = sorted({*counts, *(answer for given in counts.values() for answer in given)})
    matrix = _matrix(counts, labels, names) if len(labels) <= MOST_CELLS else ""
    return (
        _accuracies(counts, names)
        + (matrix or _mixed_up(counts, names))
        + _worst(answers["worst"], names)
    )


def _by_label(confusion: Sequence[Sequence[int]]) -> dict[int, Counter[int]]:
    counts: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for label, answer, examples in confusion:
        counts[label][answer] += examples
    return dict(counts)


def _accuracies(counts: Mapping[int, Counter[int]], names: Sequence[str]) -> str:
    rows = [(label, given[label] / given.total(), given.total()) for label, given in counts.items()]
    title, shown = "Accuracy of each class", sorted(rows)
    if len(rows) > MOST_CLASSES:
        title = f"Accuracy of the {MOST_CLASSES} worst classes of {len(rows)}"
        shown = sorted(rows, key=lambda row: row[1])[:MOST_CLASSES]
    cells = "".join(
        f"<tr><th>{text(class_name(names, label))}<td>{percent_text(share)}"
        f"<td><meter min=0 max=1 value={share:.4f}></meter><td>of {total:,}"
        for label, share, total in shown
    )
    return f"<h2>{title}</h2><div class=wide><table>{cells}</table></div>"


def _matrix(counts: Mapping[int, Counter[int]], labels: Sequence[int], names: Sequence[str]) -> str:
    head = "".join(f"<th>{text(class_name(names, label))}" for label in labels)
    rows = []
    for label in labels:
        given = counts.get(label, Counter())
        total = given.total() or 1
        cells = "".join(_cell(given[answer], total, right=answer == label) for answer in labels)
        rows.append(f"<tr><th>{text(class_name(names, label))}{cells}")
    return (
        "<h2>Confusion matrix</h2><p class=state>a row for each class, a column for each answer"
        f"</p><div class=wide><table class=matrix><tr><th>{head}{''.join(rows)}</table></div>"
    )


def _cell(count: int, total: int, *, right: bool) -> str:
    if not count:
        return "<td>"
    kind = "right" if right else "wrong"
    share = count / total if right else min(1.0, 0.15 + 3 * count / total)
    return f'<td class={kind} style="--share: {share:.2f}">{count:,}'


def _mixed_up(counts: Mapping[int, Counter[int]], names: Sequence[str]) -> str:
    wrong = [
        (count, label, answer)
        for label, given in counts.items()
        for answer, count in given.items()
        if answer != label
    ]
    if not wrong:
        return ""
    rows = "".join(
        f"<tr><th>{text(class_name(names, label))}<td>taken for "
        f"{text(class_name(names, answer))}<td>{count:,} times of {counts[label].total():,}"
        for count, label, answer in sorted(wrong, reverse=True)[:MOST_MIXED]
    )
    return f"<h2>Classes that are mixed up most</h2><div class=wide><table>{rows}</table></div>"


def _worst(mistakes: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    if not mistakes:
        return ""
    shown = "".join(
        f'<figure><img alt="row {m["row"]}" src="data:image/png;base64,{text(m["png"])}">'
        f"<figcaption>is {text(class_name(names, m['label']))}, taken for "
        f"{text(class_name(names, m['answer']))} ({percent_text(m['probability'])}), "
        f"row {m['row']:,}</figcaption></figure>"
        for m in mistakes
    )
    return (
        "<h2>Worst mistakes</h2><p class=state>those of which the network was surest, as it saw "
        f"them</p><div class=pictures>{shown}</div>"
    )
