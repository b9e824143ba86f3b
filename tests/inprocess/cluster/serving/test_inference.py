"""Scoring, recalibrating and predicting with a trained run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from downpour.cluster.cli.commands import downpour
from downpour.cluster.config.derive import model_spec
from downpour.cluster.errors import run_cli
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.serving import inference
from downpour.workers.evaluation.disagreement import disagreement
from downpour.workers.evaluation.evaluator import Evaluator
from downpour.workers.evaluation.predictor import Predictor, rows_of
from tests.helpers.oriented import oriented
from tests.helpers.tiny import write_split
from tests.helpers.trained import NAMES, as_file, coloured, failed_command, run_command


class TestEvaluate:
    def test_crops_and_ensembles(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        one = run_command("evaluate", place / "one", capsys=capsys)
        assert one["accuracy"] > 0.5
        assert one["top5_accuracy"] == 1, "there are but four classes"
        assert one["examples"] == 90
        ten = run_command("evaluate", place / "one", "--crops", 10, capsys=capsys)
        both = run_command("evaluate", place / "one", place / "two", "--crops", 10, capsys=capsys)
        assert ten["crops"] == 10
        assert ten["loss"] != one["loss"]
        assert both["loss"] != ten["loss"]
        assert len(both["run"]) == 2

    def test_one_crop_is_what_training_scores(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from downpour.workers.evaluation.split import SplitBatches

        config = RunFolder.open(place / "one").config()
        spec = model_spec(config)
        evaluator = Evaluator(spec, SplitBatches(spec, config.data.data, "test"))
        evaluator.load(str(place / "one" / "model.safetensors"))
        score = evaluator.score()
        told = run_command("evaluate", place / "one", capsys=capsys)
        assert told["accuracy"] == score.accuracy
        assert told["loss"] == pytest.approx(score.loss, abs=1e-4)

    def test_an_ensemble_averages_probabilities(self, place: Path) -> None:
        networks = [inference.load(place / name).network for name in ("one", "two")]
        rows = rows_of([as_file(image) for image in coloured(5, 9)[0]])
        alone = [Predictor([network]).probabilities(rows) for network in networks]
        together = Predictor(networks).probabilities(rows)
        torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)
        torch.testing.assert_close(together.sum(1), torch.ones(5))

    def test_crops_of_an_image_are_averaged(self, place: Path) -> None:
        network = inference.load(place / "one").network
        rows = rows_of([as_file(image) for image in coloured(2, 9, side=50)[0]])
        from downpour.shuffler.images.views import decode_views

        views = decode_views(rows, network.spec.image, 144).inputs
        assert views.shape[:2] == (2, 144)
        with torch.inference_mode():
            each = network.model.module(torch.from_numpy(views[1])).softmax(1)
        found = Predictor([network], crops=144).probabilities(rows)[1]
        torch.testing.assert_close(found, each.mean(0), rtol=1e-4, atol=1e-5)

    def test_what_cannot_be_an_ensemble(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(place / "one", tmp_path / "other")
        config = json.loads((tmp_path / "other" / "config.json").read_text())
        config["model"]["num_classes"] = 5
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        error = failed_command("evaluate", place / "one", tmp_path / "other", capsys=capsys)
        assert "use one of the same model and options" in error

    def test_other_classes_are_refused(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Between networks and data, and within an ensemble: other names, or another order."""
        pixels, labels = coloured(12, 7)
        one = place / "one"
        for names, words in (
            (("0", "1", "2", "3"), "one tells red, green, blue, grey apart, and split 'test' of"),
            (("red", "green", "grey", "blue"), "label 2 is 'blue' in"),
            (("red", "green", "blue"), "red, green, blue: give what has the same classes"),
        ):
            data = tmp_path / "-".join(names)
            write_split(data, "test", pixels, np.minimum(labels, 2), shards=1, class_names=names)
            error = failed_command("evaluate", one, "--data", data, capsys=capsys)
            assert words in error
            assert str(data) in error
        data = tmp_path / "same"
        write_split(data, "test", pixels, labels, shards=1, class_names=NAMES)
        assert run_command("evaluate", one, "--data", data, capsys=capsys)["examples"] == 12

        other = tmp_path / "other"
        shutil.copytree(one, other)
        about = {"train_fingerprint": "", "class_names": ["cat", "dog", "emu", "fox"]}
        (other / "data.json").write_text(json.dumps(about))
        image = tmp_path / "a.png"
        image.write_bytes(as_file(pixels[0]))
        for command in (("evaluate", one, other), ("predict", one, image, "--also", other)):
            assert "cat, dog, emu, fox" in failed_command(*command, capsys=capsys)

    def test_data_without_names_is_told_of(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_split(tmp_path, "test", *coloured(12, 7), shards=1)
        assert run_cli(downpour, ["evaluate", str(place / "one"), "--data", str(tmp_path)]) == 0
        assert "does not name its classes" in capsys.readouterr().err

    def test_bad_images_are_skipped_if_the_run_does_so(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = tmp_path / "data"
        write_split(data, "test", *coloured(12, 7), shards=1, spoilt=(3, 8), class_names=NAMES)
        one = str(place / "one")
        error = failed_command("evaluate", one, "--data", data, capsys=capsys)
        assert "row 3 (3.png" in error
        assert "--on-bad-image skip" in error
        words = ["evaluate", one, "--data", str(data), "--on-bad-image", "skip", "--crops", "10"]
        assert run_cli(downpour, words) == 0
        captured = capsys.readouterr()
        told = json.loads(captured.out)
        assert (told["examples"], told["images_skipped"]) == (10, 2)
        assert "skipped: the image of row 8 (8.png" in captured.err


class TestRecalibrate:
    def test_statistics_of_other_data(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pixels, labels = coloured(160, 5)
        write_split(tmp_path, "train", 255 - pixels, labels)
        output = tmp_path / "new.safetensors"
        told = run_command(
            "recalibrate", place / "one", "--data", tmp_path, "--output", output, capsys=capsys
        )
        assert told["mini_batches"] == 5
        assert told["disagreement"] > 0.1, "the images were inverted"
        before, after = (
            inference.load(place / "one", weights=weights).network.model
            for weights in (None, str(output))
        )
        assert torch.equal(before.weights, after.weights)
        assert not torch.equal(before.statistics, after.statistics)

    def test_on_the_training_split_it_agrees(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        told = run_command("recalibrate", place / "two", capsys=capsys)
        assert told["disagreement"] < 0.05
        assert (place / "two" / "recalibrated.safetensors").is_file()
        scored = run_command(
            "evaluate", place / "two", "--weights", "recalibrated.safetensors", capsys=capsys
        )
        assert scored["weights"] == "recalibrated.safetensors"

    def test_disagreement_by_hand(self) -> None:
        kept = torch.tensor([[0.0, 1.0], [4.0, 1.0]])
        recomputed = torch.tensor([[2.0, 1.0], [4.0, 9.0]])
        assert disagreement(kept, kept) == 0
        # Feature 0 shifts by 1 standard deviation, feature 1 is 3 times as wide: (1 + 4)/2.
        assert disagreement(kept, recomputed, eps=0) == pytest.approx(2.5**0.5)


class TestPredict:
    def test_is_what_evaluate_finds(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pixels, labels = coloured(10, 7)
        write_split(tmp_path / "data", "test", pixels, labels, shards=1)
        paths = []
        for i, image in enumerate(pixels):
            paths.append(tmp_path / f"{i}.png")
            paths[-1].write_bytes(as_file(image))
        told = run_command("predict", place / "one", *paths, "--top", 4, "--json", capsys=capsys)
        hits = [
            t["predictions"][0]["label"] == label for t, label in zip(told, labels, strict=True)
        ]
        scored = run_command("evaluate", place / "one", "--data", tmp_path / "data", capsys=capsys)
        assert scored["accuracy"] == sum(hits) / 10
        nats = [
            -np.log(next(p["probability"] for p in t["predictions"] if p["label"] == label))
            for t, label in zip(told, labels, strict=True)
        ]
        assert scored["loss"] == pytest.approx(np.mean(nats), abs=1e-4)
        assert {p["class"] for p in told[0]["predictions"]} == set(NAMES)

    def test_any_size_and_format(self, place: Path, tmp_path: Path) -> None:
        big = tmp_path / "big.jpg"
        big.write_bytes(as_file(coloured(1, 3, side=120)[0][0], "JPEG"))
        assert run_cli(downpour, ["predict", str(place / "one"), str(big)]) == 0

    def test_a_bad_file_costs_no_other_its_answer(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As with `grep`: each is answered or named, and the exit status says that one was bad."""
        paths = []
        for i, image in enumerate(coloured(100, 7)[0]):
            paths.append(tmp_path / f"{i}.png")
            paths[-1].write_bytes(as_file(image))
        paths[17].write_bytes(b"no image")
        paths[70].unlink()
        words = ["predict", str(place / "one"), *map(str, paths)]
        assert run_cli(downpour, [*words, "--json"]) == 2
        captured = capsys.readouterr()
        told = json.loads(captured.out)
        assert [t["image"] for t in told] == [str(path) for path in paths]
        assert [i for i, t in enumerate(told) if "error" in t] == [17, 70]
        assert [i for i, t in enumerate(told) if not t["predictions"]] == [17, 70]
        lines = captured.err.splitlines()
        assert [f"{i}.png" in line for i, line in zip((17, 70), lines, strict=True)] == [True] * 2
        assert run_cli(downpour, words) == 2
        shown = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in shown] == [
            str(path) for i, path in enumerate(paths) if i not in (17, 70)
        ]
        assert run_cli(downpour, words[:4]) == 0

    def test_photos_are_upright_unless_the_run_or_an_option_says_otherwise(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pixels = coloured(1, 7, side=40)[0][0]
        pixels[:20] = 255  # a lopsided scene
        paths = []
        for turned in range(1, 9):
            paths.append(tmp_path / f"{turned}.png")
            paths[-1].write_bytes(oriented(pixels, turned, "PNG"))
        told = run_command("predict", place / "one", *paths, "--json", capsys=capsys)
        assert all(t["predictions"] == told[0]["predictions"] for t in told)
        words = ("--orientation", "ignore", "--json")
        ignoring = run_command("predict", place / "one", *paths, *words, capsys=capsys)
        assert ignoring[0] == told[0]
        assert ignoring[2]["predictions"] != told[2]["predictions"]
        old = tmp_path / "old"  # a run from before orientation was followed
        shutil.copytree(place / "one", old)
        config = json.loads((old / "config.json").read_text())
        del config["model"]["image"]["orientation"], config["model"]["image"]["transparency"]
        (old / "config.json").write_text(json.dumps(config))
        assert run_command("predict", old, *paths, "--json", capsys=capsys) == ignoring

    @pytest.mark.parametrize("content", [b"no image at all", b"\xff\xd8\xff\xe0 cut short"])
    def test_what_is_no_image(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
    ) -> None:
        bad = tmp_path / "bad.jpg"
        bad.write_bytes(content)
        assert "bad.jpg" in failed_command("predict", place / "one", bad, capsys=capsys)

    def test_wrong_words(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        one = place / "one"
        assert "nothing.png" in failed_command(
            "predict", one, tmp_path / "nothing.png", capsys=capsys
        )
        assert "there are no weights x" in failed_command(
            "evaluate", one, "--weights", "x", capsys=capsys
        )
        assert "best.safetensors does not exist" in failed_command(
            "evaluate", one, "--best", capsys=capsys
        )
