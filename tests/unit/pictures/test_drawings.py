"""Pictures of emoji."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lmms_mtv.errors import InstallationError
from lmms_mtv.pictures import drawings, names

CAT = "1F431"


def still(size: float = 1.0, x: float = 0.0, y: float = 0.0, colour: float = 1.0, ground: float = 1.0) -> torch.Tensor:
    """Return a look without rotation."""
    return torch.tensor([[size, 0.0, 1.0, x, y, *[colour] * 3, *[ground] * 3]])


@pytest.fixture
def square() -> torch.Tensor:
    """An emoji that is one red square without transparency."""
    emoji = torch.zeros(1, 4, 72, 72, dtype=torch.uint8)
    emoji[:, 0], emoji[:, 3] = 255, 255
    return emoji


def test_a_picture_depends_on_its_emoji_and_its_seed_alone():
    torch.manual_seed(1)
    first = np.asarray(drawings.draw(CAT, 3))
    torch.manual_seed(2)
    drawings.draw("1F34E", 4)
    assert np.array_equal(np.asarray(drawings.draw(CAT, 3)), first)
    assert not np.array_equal(np.asarray(drawings.draw(CAT, 4)), first)
    assert not np.array_equal(np.asarray(drawings.draw("1F34E", 3)), first)
    assert first.shape == (64, 64, 3)


def test_an_emoji_as_it_is_fills_the_picture(square):
    picture = drawings.render(square, still())
    assert torch.allclose(picture, torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand_as(picture))


def test_half_of_the_size_at_the_upper_left_is_a_quarter_of_the_picture(square):
    picture = drawings.render(square, still(size=0.5, x=-1, y=-1, ground=0.75))[0]
    red = (picture[0] == 1) & (picture[1] == 0)
    assert red[:31, :31].all()
    assert torch.allclose(picture[:, 33:, :], torch.tensor(0.75))
    assert torch.allclose(picture[:, :, 33:], torch.tensor(0.75))


def test_where_an_emoji_ends_the_background_shows_without_a_seam():
    emoji = torch.zeros(1, 4, 72, 72, dtype=torch.uint8)
    emoji[:, :3, :, 36:] = 255  # white, and black where it is transparent
    emoji[:, 3, :, 36:] = 255
    picture = drawings.render(emoji, still(ground=1.0))
    assert picture.min() > 1 - 1e-6


def test_colours_are_factors(square):
    assert drawings.render(square, still(colour=0.8))[0, 0].mean().item() == pytest.approx(0.8)


def test_looks_stay_in_their_ranges():
    size, sine, cosine, x, y, *others = drawings.random_looks(1000, torch.Generator().manual_seed(0)).T
    assert 0.7 <= size.min() <= size.max() <= 1
    assert torch.allclose(sine.square() + cosine.square(), torch.ones(1000))
    assert sine.abs().max() <= 0.3421  # 20 degrees
    assert max(x.abs().max(), y.abs().max()) <= 1
    assert all(0.8 <= each.min() <= each.max() <= 1 for each in others[:3])
    assert all(0.6 <= each.min() <= each.max() <= 1 for each in others[3:])


def test_every_emoji_of_the_tasks_can_be_drawn():
    for code in names.codes():
        emoji = drawings.artwork(code)
        assert emoji.shape == (4, 72, 72)
        assert (emoji[3] > 200).float().mean() > 0.02, f"{code} is nearly empty"


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    drawings.artwork.cache_clear()
    with pytest.raises(InstallationError, match=r"pip install 'lmms-mtv\[pictures\]'"):
        drawings.draw(CAT, 0)


def test_a_picture_is_an_rgb_image():
    assert isinstance(drawings.draw(CAT, 0), Image.Image)
    assert drawings.draw(CAT, 0).mode == "RGB"
