"""flux-emoji's pictures and captions."""

import pytest
import torch

from helpers.emoji import BODIES, COLLECTION, drawn_icons
from stepgraph.assets.emoji_captions import BACKGROUNDS, caption
from stepgraph.assets.flux_emoji import WordEncoder
from stepgraph.bench.emoji.captions import (
    CALIBRATION,
    MEASURING,
    NOISE_SEEDS,
    UNSEEN,
    captions_of,
    distinct_names,
    longest,
    may_mirror,
    vocabulary,
    write_split,
)
from stepgraph.bench.emoji.choose_icons import divided, most_distinct
from stepgraph.bench.emoji.emoji_data import STILL, EmojiData, Jitter, place, unseen
from stepgraph.bench.emoji.icons import TARBALL, Icons, fetch, render_icons
from stepgraph.errors import FileFormatError

JITTER = Jitter(shift=1.5, scale=(0.8, 1.0), mirrored=0.5)


def still(pixels: torch.Tensor, colours: torch.Tensor, **changed) -> torch.Tensor:
    count = len(pixels)
    placing = {"shift": torch.zeros(count, 2), "scale": torch.ones(count), "mirrored": torch.zeros(count, dtype=torch.bool)}
    return place(pixels, colours, **{**placing, **changed})


def composed(pixels: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Averages of 2 x 2 pixels over a plain background, written out again."""
    values = pixels.double() / 255
    over = values[:, :3] * values[:, 3:] + colours.double()[:, :, None, None] * (1 - values[:, 3:])
    count, _, side, _ = over.shape
    return (2 * over.view(count, 3, side // 2, 2, side // 2, 2).mean((3, 5)) - 1).float()


def test_an_icon_that_stays_where_it_is_lies_over_its_background():
    pixels, colours = drawn_icons().pixels, torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(still(pixels, colours), composed(pixels, colours), atol=1e-5)


def test_a_shift_moves_it_by_pixels_and_shows_the_background_behind():
    pixels, colours = drawn_icons().pixels, torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    plain, moved = composed(pixels, colours), still(pixels, colours, shift=torch.tensor([[2.0, -1.0]]).expand(5, 2))
    assert torch.allclose(moved[:, :, :-1, 2:], plain[:, :, 1:, :-2], atol=1e-5)
    assert torch.allclose(moved[:, :, :, :2], (2 * colours - 1)[:, :, None, None].expand(5, 3, 8, 2), atol=1e-5)


def test_a_mirrored_icon_is_the_other_way_round():
    pixels, colours = drawn_icons().pixels, torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    mirrored = still(pixels, colours, mirrored=torch.ones(5, dtype=torch.bool))
    assert torch.allclose(mirrored, composed(pixels.flip(-1), colours), atol=1e-5)
    # The shift is the picture's, whatever the icon is turned to.
    shift = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    moved = still(pixels, colours, mirrored=torch.ones(5, dtype=torch.bool), shift=shift)
    assert torch.allclose(moved[..., 1:], mirrored[..., :-1], atol=1e-5)


def test_a_smaller_icon_covers_the_middle():
    solid, colours = torch.full((1, 4, 16, 16), 255, dtype=torch.uint8), torch.zeros(1, 3)
    small = still(solid, colours, scale=torch.tensor([0.5]))
    assert torch.equal(small[0, 0, 2:6, 2:6], torch.ones(4, 4))
    assert torch.equal(small[0, 0, 0], -torch.ones(8))


def test_batches_follow_from_the_generator_and_only_some_icons_are_mirrored():
    data = EmojiData(drawn_icons())
    first, again, other = (data.batch(64, JITTER, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.pictures, again.pictures)
    assert not torch.equal(first.pictures, other.pictures)
    turned = data.batch(64, Jitter(mirrored=1.0), torch.Generator().manual_seed(3))
    pixels = data.pixels[turned.icons]
    arrows = torch.tensor([data.icons.names[icon] == "left-arrow" for icon in turned.icons])
    assert 0 < int(arrows.sum()) < 64
    pixels[~arrows] = pixels[~arrows].flip(-1)
    assert torch.allclose(turned.pictures, composed(pixels, data.backgrounds[turned.backgrounds]), atol=1e-5)


def test_still_pictures_are_those_of_every_background_in_turn():
    data = EmojiData(drawn_icons())
    pictures = data.still()
    assert len(pictures) == len(BACKGROUNDS) * len(BODIES)
    assert torch.allclose(pictures[5 + 2], composed(data.pixels[2:3], data.backgrounds[1:2])[0], atol=1e-5)


def test_the_retrieval_network_is_tested_on_backgrounds_that_no_caption_names():
    assert not set(UNSEEN) & set(BACKGROUNDS.values())
    test = unseen(drawn_icons(), 32, seed=3)
    assert int(test.backgrounds.max()) < len(UNSEEN)
    assert not torch.equal(test.pictures, unseen(drawn_icons(), 32, seed=4).pictures)


def test_captions_are_the_words_of_the_icon_and_its_background():
    assert caption("waving-hand", "mint") == "waving hand on mint"
    names = list(BODIES)
    assert longest(names) == 5
    encoder = WordEncoder(words=vocabulary(names), length=longest(names), width=12)
    tokens = EmojiData(drawn_icons()).caption_tokens(encoder)
    assert tokens.shape == (5, len(BACKGROUNDS), 5)
    assert torch.equal(tokens[4, 0], encoder.tokens(["waving hand on mint"])[0])


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("pizza", True), ("left-arrow", False), ("keycap-1", False), ("pool-8-ball", False), ("one-oclock", False), ("fox", True)],
)
def test_names_say_what_may_be_mirrored(name: str, allowed: bool):
    assert may_mirror(name) is allowed


def test_the_halves_share_neither_captions_nor_noise(tmp_path):
    path, names = tmp_path / "split.txt", list(BODIES)
    write_split(divided(names), path)
    halves = [captions_of(half, names, path) for half in (CALIBRATION, MEASURING)]
    assert len(set(halves[0]) | set(halves[1])) == len(halves[0]) + len(halves[1]) == len(names) * len(BACKGROUNDS)
    assert [name for name, _ in halves[1][:5]] == names
    assert not set(NOISE_SEEDS[CALIBRATION]) & set(NOISE_SEEDS[MEASURING])
    with pytest.raises(FileFormatError, match="lacks taco"):
        captions_of(MEASURING, ["taco"], path)


def test_the_files_that_lie_here_fit_each_other():
    names = distinct_names()
    assert len(set(names)) == 512
    assert distinct_names(256) == names[:256]
    assert "pizza" in names
    halves = [set(captions_of(half, names)) for half in (CALIBRATION, MEASURING)]
    assert not halves[0] & halves[1]
    assert {len(half) for half in halves} == {512 * len(BACKGROUNDS) // 2}
    with pytest.raises(FileFormatError, match="not 600"):
        distinct_names(600)


def test_the_most_distinct_icons_come_first():
    pixels = torch.full((4, 4, 16, 16), 255, dtype=torch.uint8)
    pixels[1, 0], pixels[2, :3], pixels[3, 0] = 250, 0, 245
    icons = Icons(("pizza", "red-pizza", "night", "pink-pizza"), pixels)
    assert most_distinct(icons, 3) == ["pizza", "night", "pink-pizza"]


def test_icons_are_rendered_without_other_skin_tones(tmp_path):
    pytest.importorskip("resvg_py")
    icons = render_icons(COLLECTION, 8)
    assert icons.names == tuple(BODIES)
    assert icons.pixels.shape == (5, 4, 16, 16)
    assert icons.size == 8
    red, clear = torch.tensor([255, 0, 0, 255]), torch.tensor(0)
    assert torch.equal(icons.pixels[0, :, :8], red[:, None, None].expand(4, 8, 16).byte())
    assert bool((icons.pixels[0, 3, 8:] == clear).all())
    icons.save(tmp_path / "icons.npz")
    loaded = Icons.load(tmp_path / "icons.npz").chosen(["police-car", "pizza"])
    assert torch.equal(loaded.pixels, icons.pixels[[2, 0]])
    with pytest.raises(FileFormatError, match="lack taco"):
        icons.chosen(["taco"])


def test_an_archive_that_is_not_the_pinned_one_is_refused(tmp_path):
    (tmp_path / TARBALL).write_bytes(b"another")
    with pytest.raises(FileFormatError, match="expected 7d064769"):
        fetch(tmp_path)


def test_no_jitter_is_none():
    data = EmojiData(drawn_icons())
    drawn = data.batch(8, STILL, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.pictures, composed(data.pixels[drawn.icons], data.backgrounds[drawn.backgrounds]), atol=1e-5)
