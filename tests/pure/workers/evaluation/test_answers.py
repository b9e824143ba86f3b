"""What is collected while a split is scored, against counting by hand."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from downpour.workers.evaluation.answers import MOST_MISTAKES, MOST_SIDE, Answers


def test_confusion_and_mistakes_are_those_of_all_examples_however_they_are_cut(
    tmp_path: Path,
) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.rand(300, 3, 6, 5, generator=generator)
    outputs = torch.randn(300, 7, generator=generator)
    targets = torch.randint(0, 7, (300,), generator=generator)
    answers = Answers()
    for start, stop in ((0, 1), (1, 120), (120, 300)):
        answers.add(inputs[start:stop], outputs[start:stop], targets[start:stop])
    given = outputs.argmax(1)
    expected = [
        [label, answer, int(((targets == label) & (given == answer)).sum())]
        for label in range(7)
        for answer in range(7)
    ]
    assert answers.confusion() == [entry for entry in expected if entry[2]]

    sure = torch.softmax(outputs.double(), 1).amax(1).masked_fill(given == targets, -1)
    worst = sure.argsort(descending=True)[:MOST_MISTAKES].tolist()
    assert [mistake.place for mistake in answers.worst()] == worst
    rows = np.arange(1000, 1300)
    answers.save(str(tmp_path / "answers.json"), rows.tolist())
    saved = json.loads((tmp_path / "answers.json").read_text())
    assert saved["examples"] == 300
    assert [m["row"] for m in saved["worst"]] == [1000 + place for place in worst]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(saved["worst"][0]["png"]))))
    np.testing.assert_allclose(picture, inputs[worst[0]].permute(1, 2, 0) * 255, atol=0.5)


def test_a_large_input_is_kept_small_and_other_inputs_have_no_picture() -> None:
    answers = Answers()
    wrong = torch.tensor([[1.0, 0.0]])
    answers.add(torch.rand(1, 1, 500, 300), wrong, torch.tensor([1]))
    (mistake,) = answers.worst()
    assert max(mistake.picture.shape) <= MOST_SIDE
    answers.add(torch.rand(1, 20), wrong, torch.tensor([1]))
    assert answers.confusion() == [[1, 0, 2]]
    assert len(answers.worst()) == 1


def test_flat_inputs_become_pictures_if_their_shape_is_known() -> None:
    image = torch.rand(1, 1, 4, 5)
    answers = Answers((1, 4, 5))
    answers.add(image.reshape(1, 20), torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    (mistake,) = answers.worst()
    np.testing.assert_allclose(mistake.picture[:, :, 0], image[0, 0] * 255, atol=0.5)
