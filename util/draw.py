"""All drawing: labels (paper Fig. 6), names of regions (Fig. 2), the mask (Fig. 5 c)."""

import functools
import itertools
import textwrap
import unicodedata
from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from util.images import IGNORE
from util.toy import RUGS, texture

INK, GREY, WHITE = (25, 25, 25), (110, 110, 110), (255, 255, 255)
GREEN, PINK, YELLOW = (0, 158, 115), (204, 121, 167), (255, 222, 60)
RIGHT, WRONG = (0, 114, 178), (213, 94, 0)  # blue and orange, told apart by colour-blind eyes too
VERDICTS = np.full((2, 24, 24, 3), [[[RIGHT]], [[WRONG]]], np.uint8)  # tiles; wrong is hatched
VERDICTS[1, np.add(*np.indices((24, 24))) % 12 < 3] = INK
TEXTURES = {f"{pattern} {colour} rug": texture(pattern, colour) for pattern, colour in RUGS}
SIZES = (46, 40, 34, 29, 25, 22)  # of letters: pages show these figures at half their size
NOTE = "* unseen: no mask of this class in training"
_font = functools.cache(ImageFont.load_default)


def fills(names: Sequence[str]) -> np.ndarray:
    """How the figures paint each class: (C, t, t, 3) uint8 tiles.
    A rug has its own texture. Another class i has colour i + 1 of VOC's colour map, whose numbers
    give their bits to red, green and blue in turn, highest bit first."""
    number = np.arange(1, len(names) + 1)[:, None]
    colours = sum((number >> (3 * bit + np.arange(3)) & 1) << (7 - bit) for bit in range(3))
    tiles = [TEXTURES.get(name.lower(), np.full((12, 12, 3), c)) for name, c in zip(names, colours)]
    return np.array(tiles, np.uint8).repeat(3, 1).repeat(3, 2)  # (C, 36, 36, 3)


def plain(names: Sequence[str], i: int) -> str:
    """Class i's name without accents, or the number i: Pillow's own font has ASCII's letters."""
    letters = unicodedata.normalize("NFKD", names[i])
    legible = all(letter.isascii() or unicodedata.combining(letter) for letter in letters)
    return letters.encode("ascii", "ignore").decode() if legible else str(i)


def palette_png(labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Labels (H, W) as an image of class numbers whose palette has the classes' mean colours."""
    image, white = Image.fromarray(labels), np.full((256 - len(names), 3), 255)
    colours = np.concatenate([fills(names).mean((1, 2)), white])  # (256, 3)
    image.putpalette(colours.astype(int).ravel().tolist())
    return image


def _write(pen: ImageDraw.ImageDraw, free: np.ndarray, name: str, starred: bool = False,
           sizes: Sequence[int] = SIZES) -> tuple[slice, slice] | None:
    """Write a name as large as the (H, W) bool area `free` allows, where that is most interior.
    Returns the rows and columns that it fills, None where it finds no room."""
    name += "*" * starred
    layouts = dict.fromkeys(textwrap.fill(name, n, break_long_words=False)
                            for n in range(len(name), 0, -1))
    coarse = Image.fromarray(np.pad(free[::4, ::4], 1) * np.uint8(255))

    def share(*radius: float) -> np.ndarray:  # how much of a box around each pixel is free
        return np.array(coarse.filter(ImageFilter.BoxBlur(radius))) / 255

    depth = sum(share(n, n) for n in (2, 5, 10, 20, 40, 80))
    for size, text in itertools.product(sizes, layouts):
        style = {"font": _font(size), "anchor": "mm", "align": "center", "spacing": size // -8,
                 "stroke_width": size // 9}
        left, top, right, bottom = map(round, pen.textbbox((0, 0), text, **style))
        fits = share((right - left) / 8, (bottom - top) / 8) > 0.9
        if fits.any():
            y, x = np.unravel_index(np.where(fits, depth, -1).argmax(), fits.shape)
            x = np.clip(4 * x - 4 - (left + right) // 2, -left, free.shape[1] - right)
            y = np.clip(4 * y - 4 - (top + bottom) // 2, -top, free.shape[0] - bottom)
            pen.text((x, y), text, YELLOW if starred else WHITE, stroke_fill=INK, **style)
            return slice(y + top, y + bottom), slice(x + left, x + right)


def fit(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side scaled to `side` pixels; a small drawing keeps its pixels."""
    method = Image.Resampling.NEAREST if 2 * max(image.size) < side else Image.Resampling.LANCZOS
    return ImageOps.contain(image, (side, side), method)


def _paint(image: Image.Image, label: np.ndarray, tiles: np.ndarray,
           weight: float) -> tuple[Image.Image, np.ndarray]:
    """Mix each segment of a label with its tile, with a thin white line between segments.
    label (H, W) uint8; where it is 255 the image stays. Returns also the label at its size."""
    resized = Image.fromarray(label).resize(image.size, Image.Resampling.NEAREST)
    label, pixels = np.array(resized), np.array(image)
    y, x = np.indices(label.shape) % tiles.shape[1]
    fill = tiles[np.where(label == IGNORE, 0, label), y, x]  # (H, W, 3)
    pixels[label != IGNORE] = ((1 - weight) * pixels + weight * fill)[label != IGNORE]
    pixels[np.array(resized.filter(ImageFilter.MaxFilter(5))) != label] = WHITE
    return Image.fromarray(pixels), label


def label_image(image: Image.Image, label: np.ndarray, names: Sequence[str],
                unseen: Collection[int], side: int = 390,
                no_room: set[int] | None = None) -> Image.Image:
    """Paper Fig. 6: an image under its label, each class name written once, on its segment.
    label (H, W) uint8: rows of names, 255 is left as it is; names in `unseen` are yellow with a
    star. side: the longer one. Classes that find no room for their names are added to no_room."""
    out, label = _paint(fit(image, side), label, fills(names), weight=0.65)
    for i in np.unique(label[label != IGNORE]).tolist():
        place = _write(ImageDraw.Draw(out), label == i, plain(names, i), i in unseen)
        if place:
            label[place] = IGNORE  # no other name goes there
        elif no_room is not None and (label == i).mean() > 0.002:  # no specks
            no_room.add(i)
    return out


def right_and_wrong(image: Image.Image, prediction: np.ndarray, label: np.ndarray,
                    side: int) -> Image.Image:
    """Where a prediction (H, W) is right, blue, and wrong, hatched in orange; 255 is not scored."""
    wrong = np.where(label == IGNORE, IGNORE, prediction != label).astype(np.uint8)
    out, wrong = _paint(fit(image, side), wrong, VERDICTS, weight=0.85)
    right = (wrong == 0).sum() / max(1, (wrong != IGNORE).sum())
    bottom = np.indices(wrong.shape)[0] > out.height - 60
    _write(ImageDraw.Draw(out), bottom, f"{right:.0%} right", sizes=(34,))
    return out


def figure(rows: Sequence[tuple], headers: Sequence[str], names: Sequence[str],
           unseen: Collection[int]) -> Image.Image:
    """Paper Fig. 6, and Fig. 2, where a label is one class per region. rows: an image, its labels
    (H, W), and None, or the truth: then the last label is shown by where it is right."""
    size, no_room, tiles = rows[0][0].size, set(), []
    wide = len(rows) == 1 and size[0] > 1.6 * size[1]
    side = 1560 if wide else 1580 // (1 + len(rows[0][1]))
    for image, labels, truth in rows:
        *painted, judged = (*labels, None) if truth is None else labels
        tiles.append([fit(image, side)])
        tiles[-1] += [label_image(image, label, names, unseen, side, no_room) for label in painted]
        if truth is not None:
            tiles[-1].append(right_and_wrong(image, judged, truth, side))
    legend = [] if truth is None else [*zip(VERDICTS, ("right", "wrong"))]
    legend += [(fills(names)[i], plain(names, i) + "*" * (i in unseen)) for i in sorted(no_room)]
    if wide:  # the image stands above its labels
        tiles, headers = [[tile] for tile in tiles[0]], ()
    return grid(tiles, headers, legend, NOTE if unseen else "")


def grid(rows: Sequence[Sequence[Image.Image]], headers: Sequence[str] = (),
         legend: Sequence[tuple] = (), note: str = "") -> Image.Image:
    """Tiles in rows and columns, headers above, a legend of (fill, text) and a note below."""
    gap, line, font = 12, 56, _font(34)
    widths = [max(tile.width for tile in column) + gap for column in zip(*rows)]
    heights = [max(tile.height for tile in row) + gap for row in rows]
    lefts = [*itertools.accumulate(widths, initial=gap)]
    tops = [*itertools.accumulate(heights, initial=line if headers else gap)]
    entry = max([round(font.getlength(text)) + 110 for _, text in legend], default=1)
    width = max(lefts[-1], entry, round(font.getlength(note)) + 2 * gap)
    columns = width // entry
    bottom = tops[-1] + line * -(-len(legend) // columns)
    out = Image.new("RGB", (width, bottom + line * bool(note)), "white")
    pen = ImageDraw.Draw(out)
    for header, left, right in zip(headers, lefts, lefts[1:]):
        pen.text(((left + right - gap) / 2, line / 2), header, INK, font, "mm")
    for top, row in zip(tops, rows):
        for left, tile in zip(lefts, row):
            out.paste(tile, (left, top))
    for i, (fill, text) in enumerate(legend):
        x, y = gap + i % columns * entry, tops[-1] + i // columns * line
        out.paste(Image.fromarray(np.tile(fill, (1, 2, 1))[:36, :54]), (x, y + 10))
        pen.text((x + 68, y + 28), text, INK, font, "lm")
    pen.text((gap, bottom + line / 2), note, GREY, font, "lm")
    return out


def mask_image(mask: np.ndarray, groups: Sequence[tuple[str, int]]) -> Image.Image:
    """Paper Fig. 5 (c): a square is coloured where its row's token may attend to its column's.
    mask (E, E) bool, True = may attend; groups: (name, number of tokens) in the tokens' order."""
    names, counts = zip(*((name, count) for name, count in groups if count))
    side, margin, font = max(2, 1000 // len(mask)), 200, _font(34)
    colours = np.array([GREY, (230, 159, 0), GREEN, PINK], np.uint8)[:len(counts)]
    squares = np.where(mask[..., None], colours.repeat(counts, 0), 255).astype(np.uint8)
    squares = squares.repeat(side, 0).repeat(side, 1)  # (side E, side E, 3)
    starts = side * np.cumsum([0, *counts[:-1]])
    for lines, colour in ((slice(0, None, side), 225), (starts, 25), (starts + 1, 25)):
        if side > 16 or colour == 25:
            squares[lines], squares[:, lines] = colour, colour
    out = Image.new("RGB", (margin + len(squares) + 20,) * 2, "white")
    out.paste(ImageOps.expand(Image.fromarray(squares), 2, INK), (margin, margin))
    pen = ImageDraw.Draw(out)
    pen.text((20, margin / 2), "rows attend\nto columns", GREY, _font(24), "lm")
    for name, colour, start, count in zip(names, colours.tolist(), starts, counts):
        middle, edge = margin + start + side * count / 2, margin - 14
        pen.text((edge, middle), name, tuple(colour), font, "rm")
        upright = ImageFont.TransposedFont(font, Image.Transpose.ROTATE_90)
        pen.text((middle - 20, edge - font.getlength(name)), name, tuple(colour), upright)
    return out
