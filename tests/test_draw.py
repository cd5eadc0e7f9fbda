"""The images: what is painted, named, marked and left alone."""

import numpy as np
from PIL import Image

from util import draw, toy

NAMES, GREY = ("car", "cow"), (90, 100, 110)
PHOTO = Image.new("RGB", (60, 60), GREY)
HALVES = np.repeat(np.array([[0, 255]], np.uint8), 30, 1).repeat(60, 0)  # (60, 60): car, not scored


def shows(image, colour, where=np.s_[:]) -> bool:
    return (np.asarray(image)[where] == colour).all(-1).any()


def test_classes_have_the_colours_of_voc_and_rugs_their_own_texture():
    tiles = draw.fills([*(f"class {i}" for i in range(20)), "striped blue rug"])
    assert (tiles[14] == (192, 128, 128)).all() and (tiles[19] == (0, 64, 128)).all()
    assert (tiles[20] == toy.texture("striped", "blue").repeat(3, 0).repeat(3, 1)).all()
    palette = np.reshape(draw.index_png_palette(NAMES), (256, 3))
    assert palette[:2].tolist() == [[128, 0, 0], [0, 128, 0]] and (palette[2:] == 255).all()


def test_a_segment_takes_its_class_colour_and_the_rest_stays_as_photographed():
    pixels = np.asarray(draw.label_image(PHOTO, HALVES, NAMES, (), side=600))
    assert (pixels[:, 300:] == GREY).all()
    assert pixels[20, 20].tolist() == [114, 35, 38]  # 0.35 grey + 0.65 (128, 0, 0)


def test_a_name_is_written_once_where_its_segment_is_widest_and_yellow_if_unseen():
    label = HALVES.copy()
    label[:, 10:16] = 255  # car is 10 pixels wide on the left, 14 in the middle
    for unseen in ((), (0,)):
        image = draw.label_image(PHOTO, label, NAMES, unseen, side=600)
        written = [shows(image, draw.INK, where) for where in (np.s_[:, :100], np.s_[:, 160:300])]
        assert written == [False, True] and shows(image, draw.YELLOW) == bool(unseen)


def test_a_name_without_room_is_left_to_the_legend():
    no_room, label = set(), HALVES.copy()
    label[30, 30] = 1
    image = draw.label_image(PHOTO, label, NAMES, (), 600, no_room)
    legend = draw.grid([[image]], legend=[(draw.fills(NAMES)[1], "cow")])
    assert no_room == {1} and shows(legend, (0, 128, 0), np.s_[image.height + 12:])


def test_right_is_blue_wrong_is_orange_and_what_is_not_scored_is_left_alone():
    prediction = np.repeat(np.uint8([[1], [0]]), 30, 0).repeat(60, 1)
    image = np.asarray(draw.right_and_wrong(PHOTO, prediction, HALVES, side=600))
    blue, orange = (13, 111, 167), (194, 94, 16)  # 0.15 grey + 0.85 RIGHT or WRONG
    assert [shows(image, c, np.s_[:290]) for c in (blue, orange)] == [False, True]
    assert [shows(image, c, np.s_[310:]) for c in (blue, orange)] == [True, False]
    assert (image[:500, 300:] == GREY).all()


def test_regions_are_marked_right_or_wrong_where_there_is_a_truth():
    truth = np.array([[0, 1], [255, 1]])
    image = draw.region_names(PHOTO, np.zeros((2, 2), int), NAMES, (), 600, truth)
    for where, marks in ((np.s_[:300, :300], [True, False]), (np.s_[:300, 300:], [False, True]),
                         (np.s_[300:, :300], [False, False])):
        assert [shows(image, colour, where) for colour in (draw.RIGHT, draw.WRONG)] == marks
        assert shows(image, draw.INK, where)  # every region has its name


def test_the_mask_is_coloured_where_a_row_may_attend_to_a_column():
    mask = np.random.default_rng(0).random((7, 7)) < 0.5
    image = draw.mask_image(mask, [("cls", 1), ("prompts", 2), ("patches", 4), ("regions", 0)])
    middles = 202 + np.arange(7) * 142 + 71
    assert ((np.asarray(image)[np.ix_(middles, middles)] < 255).any(-1) == mask).all()
