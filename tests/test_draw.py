"""The images: what is painted, named, marked and left alone."""

import numpy as np
from PIL import Image

from util import draw, toy

NAMES, GREY = ("car", "cow"), (90, 100, 110)
PHOTO = Image.new("RGB", (60, 60), GREY)
HALVES = np.uint8([[0, 255]]).repeat(30, 1).repeat(60, 0)  # (60, 60): car, no label


def shows(image, colour, where=np.s_[:]) -> bool:
    return (np.asarray(image)[where] == colour).all(-1).any()


def test_classes_have_the_colours_of_voc_and_rugs_their_own_texture():
    tiles = draw.fills([*(f"class {i}" for i in range(20)), "Striped blue rug"])
    assert (tiles[14] == (192, 128, 128)).all() and (tiles[19] == (0, 64, 128)).all()
    assert (tiles[20] == toy.texture("striped", "blue").repeat(3, 0).repeat(3, 1)).all()
    assert [draw.plain(["crème", "道路"], i) for i in (0, 1)] == ["creme", "1"]
    png = draw.palette_png(HALVES, NAMES)
    assert np.array_equal(png, HALVES) and png.getpalette()[:7] == [128, 0, 0, 0, 128, 0, 255]


def test_a_name_is_written_once_where_its_segment_is_widest_and_yellow_if_unseen():
    label = HALVES.copy()
    label[:, 10:16] = 255  # car is 10 pixels wide on the left, 14 in the middle
    for unseen in ((), (0,)):
        image = draw.label_image(PHOTO, label, NAMES, unseen, side=600)
        written = [shows(image, draw.INK, where) for where in (np.s_[:, :100], np.s_[:, 160:300])]
        assert written == [False, True] and shows(image, draw.YELLOW) == bool(unseen)


def test_a_figure_shows_labels_by_their_colours_and_the_last_by_where_it_is_right():
    label = HALVES.copy()
    label[30, 30:40] = 1  # a cow too flat for its name, which goes into the legend
    prediction = np.uint8([[0], [1]]).repeat(30, 0).repeat(60, 1)
    figure = draw.figure([(PHOTO, [label, prediction], HALVES)], "abc", NAMES, ())
    left, middle, right = (np.asarray(figure)[56:582, x:x + 526] for x in (12, 550, 1088))
    assert (left == GREY).all() and (right[:450, 267:] == GREY).all()
    assert shows(middle, (114, 35, 38))  # 0.35 grey + 0.65 (128, 0, 0)
    assert shows(right[:258], (13, 111, 167)) and shows(right[268:], (194, 94, 16))  # blue, orange
    assert shows(figure, (0, 128, 0), np.s_[586:])
