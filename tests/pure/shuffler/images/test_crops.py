"""Crops lie in the image, are as many as they say, and where GoogLeNet's paper puts them."""

from __future__ import annotations

import pytest

from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.crops import View, single_view, ten_views, views_144, views_of

SIZES = [(375, 500), (500, 375), (64, 64), (1, 1), (40, 1000), (224, 224), (223, 225), (5000, 7)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("size", [224, 56, 28, 1])
@pytest.mark.parametrize("crops", [1, 10, 144])
def test_every_view_is_a_square_of_the_image(height, width, size, crops):
    views = views_of(crops, height, width, size)
    assert len(views) == crops
    for view in views:
        assert 0 <= view.top <= view.image_height - view.side
        assert 0 <= view.left <= view.image_width - view.side
        assert view.side >= size
        short, long = sorted((view.image_height, view.image_width))
        assert abs(long - short * max(height, width) / min(height, width)) <= 0.5
        assert (view.image_height - view.image_width) * (height - width) >= 0


def test_the_single_crop_is_the_centre():
    assert single_view(375, 500, 224) == (View(256, 341, 16, 58, 224),)
    assert single_view(500, 375, 224) == (View(341, 256, 58, 16, 224),)
    assert single_view(64, 64, 56) == (View(64, 64, 4, 4, 56),)
    assert single_view(32, 32, 28) == (View(32, 32, 2, 2, 28),)


def test_ten_crops_are_of_the_central_square():
    views = ten_views(375, 500, 224)
    assert [(v.top, v.left) for v in views[:5]] == [(0, 42), (0, 74), (32, 42), (32, 74), (16, 58)]
    assert {(v.image_height, v.image_width, v.side) for v in views} == {(256, 341, 224)}
    assert views[4].mirror is False
    assert views[4:5] == single_view(375, 500, 224)


def test_144_crops_are_4_scales_of_3_squares_of_6_crops_of_2_mirrors():
    views = views_144(375, 500, 224)
    assert len(set(views)) == 144
    assert [min(v.image_height, v.image_width) for v in views[:72:18]] == [256, 288, 320, 352]
    left, centre, right = (views[18 + 6 * i : 24 + 6 * i] for i in range(3))
    assert [v.left for v in left] == [0, 64, 0, 64, 32, 0]
    assert [v.top for v in left] == [0, 0, 64, 64, 32, 0]
    assert [v.side for v in left] == [224] * 5 + [288]
    assert centre[5] == View(288, 384, 0, 48, 288)
    assert right[5] == View(288, 384, 0, 96, 288)
    tall = views_144(500, 375, 224)
    assert [(v.top, v.left) for v in tall[23:36:6]] == [(0, 0), (48, 0), (96, 0)]


@pytest.mark.parametrize("crops", [10, 144])
def test_the_second_half_mirrors_the_first(crops):
    views = views_of(crops, 300, 400, 224)
    half = crops // 2
    for view, other in zip(views[:half], views[half:], strict=True):
        assert not view.mirror
        assert other.mirror
        assert (view.top, view.left, view.side) == (other.top, other.left, other.side)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((5, 10, 10, 8), "crops=5 .* 1, 10, 144"), ((10, 0, 9, 8), "0x9"), ((1, 9, 9, 0), "0x0")],
)
def test_errors_name_the_value(arguments, message):
    with pytest.raises(DecodeError, match=message):
        views_of(*arguments)
