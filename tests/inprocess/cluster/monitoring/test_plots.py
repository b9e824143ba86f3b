"""Reading a run's metrics and drawing them."""

import json
import math

import pytest

from downpour.cluster.monitoring.plots import ReportError, plot_run, read_metrics, series, smoothed

ROWS = [
    {
        "elapsed_s": i * 0.5,
        "updates": i * 60,
        "loss": 2.3 * math.exp(-i / 10),
        "updates_per_s": 1100.0,
        "staleness_mean": 49.0,
        **({"accuracy": 0.5 + i / 100} if i % 5 == 4 else {}),
    }
    for i in range(30)
]


def write_run(folder, rows=ROWS, result=None, tail=""):
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def drawn(monkeypatch, folder):
    """Plots a run and returns the figure that was saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def remember(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **{**kwargs, "dpi": 20})

    monkeypatch.setattr(Figure, "savefig", remember)
    path = plot_run(folder)
    assert path == folder / "plots" / "training.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["training.png"]
    (figure,) = figures
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_a_finished_run_has_four_panels_with_its_numbers(tmp_path, monkeypatch):
    histogram = [[40, 100], [45, 300], [60, 600]]  # nothing in [50, 60)
    folder = write_run(tmp_path / "r", result={"staleness": {"histogram": histogram}})
    panels = drawn(monkeypatch, folder)

    accuracy = panels["validation accuracy@1"].lines[0]
    assert list(accuracy.get_xdata()) == [240, 540, 840, 1140, 1440, 1740]
    assert list(accuracy.get_ydata()) == pytest.approx([54, 59, 64, 69, 74, 79])
    assert list(panels["training loss"].lines[0].get_ydata()) == [row["loss"] for row in ROWS]
    assert panels["training loss"].get_yscale() == "log"
    assert len(panels["updates a second"].lines[0].get_xdata()) == len(ROWS)
    bars = panels["staleness of the updates applied"].patches
    assert [bar.get_x() for bar in bars] == [40, 45, 60]
    assert [bar.get_height() for bar in bars] == pytest.approx([10, 30, 60])
    assert [bar.get_width() for bar in bars] == [5, 5, 5]


@pytest.mark.parametrize(("metric", "title", "scale"), [("miou", "mean IoU", 100), ("r2", "R²", 1)])
def test_axes_are_those_of_the_task(tmp_path, monkeypatch, metric, title, scale):
    rows = [{metric if key == "accuracy" else key: row[key] for key in row} for row in ROWS]
    values = [row[metric] for row in rows if metric in row]
    axes = drawn(monkeypatch, write_run(tmp_path / "r", rows))[f"validation {title}"]
    assert axes.get_ylabel() == title
    assert list(axes.lines[0].get_ydata()) == pytest.approx([scale * value for value in values])
    assert axes.yaxis.get_major_formatter()(50.0).endswith("%") == (scale == 100)


def test_a_run_under_way_has_no_result_and_maybe_no_accuracy(tmp_path, monkeypatch):
    rows = [{"updates": 10, "loss": 1.0, "accuracy": None}, {"updates": 20, "loss": math.nan}]
    panels = drawn(monkeypatch, write_run(tmp_path / "r", rows, tail='{"updates": 30, "lo'))
    assert panels["validation accuracy@1"].texts[0].get_text() == "not measured"
    assert list(panels["training loss"].lines[0].get_xdata()) == [10]
    assert "mean staleness" in panels


def test_a_cut_off_last_line_is_left_out(tmp_path):
    folder = write_run(tmp_path / "r", ROWS[:3], tail='{"elapsed_s": 1.0, "upd')
    assert read_metrics(folder / "metrics.jsonl") == ROWS[:3]
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write("ü".encode()[:1])  # half a character
    assert read_metrics(folder / "metrics.jsonl") == ROWS[:3]


def test_a_damaged_line_before_the_last_is_named(tmp_path):
    folder = write_run(tmp_path / "r", ROWS[:1], tail='oops\n\n{"updates": 1}\n')
    with pytest.raises(ReportError, match=r"metrics\.jsonl, line 2 is not a JSON object"):
        read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    ("tail", "result", "message"),
    [
        ("", None, "holds no metrics yet"),
        ('{"updates": 1}\n', {"staleness": {"histogram": [1, 2]}}, "list of .lower edge, count"),
    ],
)
def test_what_cannot_be_plotted_is_said(tmp_path, tail, result, message):
    with pytest.raises(ReportError, match=message):
        plot_run(write_run(tmp_path / "r", [], result, tail))


def test_a_folder_that_is_no_run_is_said(tmp_path):
    with pytest.raises(ReportError, match=r"no metrics\.jsonl in .*; is it the folder of a run"):
        plot_run(tmp_path)


def test_a_damaged_result_is_said(tmp_path):
    folder = write_run(tmp_path / "r")
    (folder / "result.json").write_text('{"stale')
    with pytest.raises(ReportError, match=r"cannot read .*result\.json"):
        plot_run(folder)


def test_series_takes_only_rows_with_both_numbers():
    rows = [{"updates": 1, "x": 2}, {"updates": 2}, {"x": 3}, {"updates": 3, "x": math.inf}]
    assert series(rows, "x") == ([1.0], [2.0])


def test_smoothing_is_free_of_bias_at_the_start():
    # By hand: (8/2)/(1/2), then (8/4 + 2/2)/(3/4), then (8/8 + 2/4 + 0/2)/(7/8).
    assert smoothed([8.0, 2.0, 0.0], decay=0.5) == pytest.approx([8.0, 4.0, 12 / 7])
    assert smoothed([5.0] * 10) == pytest.approx([5.0] * 10)
    assert smoothed([]) == []


def test_metrics_of_older_runs_are_read_under_the_present_names(tmp_path):
    folder = write_run(tmp_path / "r", [{"time_s": 1.0, "replicas": 3, "updates": 7}])
    assert read_metrics(folder / "metrics.jsonl") == [
        {"elapsed_s": 1.0, "replicas_alive": 3, "updates": 7}
    ]
