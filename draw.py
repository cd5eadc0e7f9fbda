"""All drawing in one place: label colours, masks over pictures, legends, tiles (Fig. 6), regions (Fig. 2), charts.

    python draw.py                  draws the method at a glance (Fig. 3) to method.png
"""

import argparse
import functools
import itertools
import math
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

INK, GREY, PALE, RED = (30, 30, 30), (120, 120, 120), (222, 222, 222), (200, 0, 20)
# Okabe and Ito's seven, told apart with and without colour-blindness
FIRST_COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (204, 121, 167), (240, 228, 66),
                 (86, 180, 233))
# what eyes without one kind of cone make of linear red, green and blue (Machado et al. 2009, severity 1)
EYES = {"protan": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
        "deutan": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
        "tritan": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304))}


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def lab(rgb: np.ndarray, eye: str | None = None) -> np.ndarray:
    """CIE Lab, in which distance is how different two colours look: (..., 3) 0..255 -> (..., 3); eye: one of EYES."""
    linear = np.where(rgb <= 10, rgb / 3294.6, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    if eye:
        linear = (linear @ np.array(EYES[eye]).T).clip(0, 1)
    xyz = linear @ np.array([[0.4339, 0.2126, 0.0178], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8727]])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


@functools.cache
def _colours() -> np.ndarray:
    """(255, 3) uint8: FIRST_COLOURS, then always the one that the eye it suits least tells best from all before it and
    from white. Colour-blind eyes count double: they have less room to begin with."""
    steps = np.arange(16, 256, 20)
    candidates = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)  # (n, 3)
    lightness, *ab = lab(candidates).T
    chroma = np.hypot(*ab)  # grey looks like "no label", pure colours drown the picture
    candidates = candidates[(chroma > 22) & (chroma < 90) & (lightness > 33) & (lightness < 93)]

    def points(colours: np.ndarray) -> np.ndarray:  # (eyes, n, 3)
        return np.stack([lab(colours), *(2 * lab(colours, eye) for eye in EYES)])

    seen = points(candidates)
    chosen = points(np.array([*FIRST_COLOURS, (255, 255, 255)]))
    distance = np.linalg.norm(seen[:, :, None] - chosen[:, None], axis=-1).min((0, 2))  # (n,)
    picked = list(FIRST_COLOURS)
    while len(picked) < 255:
        best = distance.argmax()
        picked.append(tuple(candidates[best]))
        distance = np.minimum(distance, np.linalg.norm(seen - seen[:, best, None], axis=-1).min(0))
    return np.array(picked, np.uint8)


def palette(n: int) -> np.ndarray:
    """The classes' colours in every figure: (n, 3) uint8, the same for a class whatever n is. ValueError above 255."""
    if not 0 <= n <= 255:
        raise ValueError(f"{n} classes: a label map has colours for 255 at most")
    return _colours()[:n].copy()


def index_png_palette(n: int) -> list[int]:
    """`palette` as Image.putpalette takes it: 768 values, white from n on (so also for 255, no label)."""
    table = np.full((256, 3), 255, np.uint8)
    table[:n] = palette(n)
    return table.ravel().tolist()


def overlay(image: np.ndarray, label: np.ndarray, colours: np.ndarray, alpha: float) -> Image.Image:
    """A column of Fig. 6: (H, W, 3) uint8 under its (H, W) uint8 label; 255 is left as it is.

    alpha: weight of the label's colour. Where two labels meet, one pixel of each side is drawn, white outside dark.
    """
    table = np.zeros((256, 3), np.float32)
    table[:len(colours)] = colours
    labelled = label != 255
    out = image.astype(np.float32)
    out[labelled] = (1 - alpha) * out[labelled] + alpha * table[label[labelled]]
    near, far = np.zeros(label.shape, bool), np.zeros(label.shape, bool)
    for axis in (0, 1):
        first, second = (slice(None), slice(None, -1)), (slice(None), slice(1, None))
        first, second = first[::-1] if axis == 0 else first, second[::-1] if axis == 0 else second
        meet = label[first] != label[second]
        near[first] |= meet
        far[second] |= meet
    out[far & labelled] = 255
    out[near & labelled] = 0.45 * table[label[near & labelled]]
    return Image.fromarray(out.round().astype(np.uint8))


def _fit(text: str, size: int, width: float = math.inf) -> str:
    """Text on one line without accents (Pillow's own font has none), cut with dots to at most `width` pixels."""
    text = "".join(c for c in unicodedata.normalize("NFKD", " ".join(text.split())) if not unicodedata.combining(c))
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def legend(names: list[str], colours: np.ndarray, unseen: set[int], width: int) -> Image.Image:
    """Fig. 6's tags: a swatch and a name per class in columns that fill `width`; unseen names in red with a *.

    names, colours (n, 3) uint8: in the order to show; unseen: their positions. Returns a picture `width` pixels wide.
    """
    size = 15 if len(names) <= 40 else 12
    line, indent = size + 9, int(1.4 * size) + 6
    texts = [_fit(name + " *" * (i in unseen), size, width - indent - 12) for i, name in enumerate(names)]
    lengths = [_font(size).getlength(text) + indent + 12 for text in texts]
    cell = min(max(lengths, default=width), 1.5 * np.quantile(lengths or [width], 0.9))  # what is longer spans several
    columns = max(1, int(width // cell))
    places, slot = [], 0
    for length in lengths:
        span = min(columns, math.ceil(length / (width / columns)))
        if slot % columns + span > columns:
            slot += columns - slot % columns
        places.append(divmod(slot, columns))
        slot += span
    rows = max(1, -(-slot // columns)) + bool(unseen)
    out = Image.new("RGB", (width, rows * line + 8), "white")
    pen = ImageDraw.Draw(out)
    for i, (row, column) in enumerate(places):
        x, y = 4 + column * width / columns, 4 + row * line
        pen.rectangle((x, y + 3, x + 1.4 * size, y + line - 4), tuple(map(int, colours[i])), GREY)
        pen.text((x + indent, y + line / 2), texts[i], RED if i in unseen else INK, _font(size), anchor="lm")
    if unseen:
        pen.text((4, out.height - line / 2 - 4), _fit("* red: no mask in training", size, width - 8), GREY, _font(size),
                 anchor="lm")
    return out


def region_names(image: Image.Image, answers: list[list[int]], names: Sequence[str], unseen: set[int]) -> Image.Image:
    """Fig. 2: the name that each region of an m x m grid was given, written in its cell; unseen names in red with a *.

    answers: m rows of m indices into names. Returns a copy of the image.
    """
    out, m = image.copy(), len(answers)
    pen = ImageDraw.Draw(out)
    width, height = out.width / m, out.height / m
    size = max(9, min(15, int(height / 6)))
    line_height = size + 3
    for i, answer in enumerate(sum(answers, [])):
        left, top = i % m * width, i // m * height
        lines, words = [], (names[answer] + " *" * (answer in unseen)).split()
        while words:  # as many words a line as fit
            fit = max(n for n in range(1, len(words) + 1)
                      if n == 1 or _font(size).getlength(" ".join(words[:n])) <= width - 12)
            lines.append(_fit(" ".join(words[:fit]), size, width - 12))
            words = words[fit:]
        lines = lines[:max(1, int((height - 6) // line_height))]
        longest = max(map(_font(size).getlength, lines), default=0)
        pen.rectangle((left, top, left + width - 1, top + height - 1), outline="white")
        pen.rectangle((left + 2, top + 2, left + longest + 10, top + line_height * len(lines) + 4), "white")
        for n, line in enumerate(lines):  # in the corner, where it hides the least
            pen.text((left + 6, top + 3 + (n + 0.5) * line_height), line, RED if answer in unseen else INK, _font(size),
                     anchor="lm")
    return out


def grid(rows: list[list[Image.Image]], headers: list[str] | None = None) -> Image.Image:
    """Fig. 6's arrangement: tiles in rows and columns on white, captions above the columns."""
    gap, size = 6, 16
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(max(map(len, rows)))]
    heights = [max(tile.height for tile in row) for row in rows]
    top = gap + (size + 2 * gap if headers else 0)
    out = Image.new("RGB", (gap + sum(widths) + gap * len(widths), top + sum(heights) + gap * len(heights)), "white")
    pen = ImageDraw.Draw(out)
    y = top
    for r, row in enumerate(rows):
        x = gap
        for c, tile in enumerate(row):
            if r == 0 and headers:
                pen.text((x + widths[c] / 2, top / 2), _fit(headers[c], size, widths[c]), INK, _font(size), anchor="mm")
            out.paste(tile, (x, y))
            x += widths[c] + gap
        y += heights[r] + gap
    return out


def fit_to_look_at(photo: Image.Image, longest: int, least: tuple[int, int] = (1, 1)) -> Image.Image:
    """A figure's copy of a photo: a large one reduced to `longest` pixels a side, a tiny one enlarged to about half of
    that by a whole number, its pixels as they are; larger where (width, height) would be less than `least`, and a
    very thin one stretched to it."""
    scale = min(longest / max(photo.size), max(1, longest // 2 // max(photo.size)))
    scale = max(scale, min(max(least[0] / photo.width, least[1] / photo.height), 3 * longest / max(photo.size)))
    size = [max(1, smallest, round(side * scale)) for side, smallest in zip(photo.size, least)]
    return photo.resize(size, Image.Resampling.NEAREST if scale == int(scale) else Image.Resampling.LANCZOS)


def label_figure(photo: Image.Image, maps: dict[str, np.ndarray], names: list[str], unseen: set[int]) -> Image.Image:
    """Fig. 6: a photo under its label map, or captioned ones side by side behind the bare photo, and their legend.

    maps: {caption: (H, W) uint8 of rows of names, or 255}, of the photo's size. The legend, below a wide picture and
    beside a tall one, has the last map's classes, the largest first, then what only the others show.
    """
    bare = fit_to_look_at(photo, 1600 if len(maps) == 1 else 800)
    colours, tiles, counts = palette(len(names)), [], []
    for label in maps.values():
        small = np.asarray(Image.fromarray(label).resize(bare.size, Image.Resampling.NEAREST))
        # under a label the photo turns grey, or its own colours would change the legend's
        pixels = np.where(small[..., None] == 255, np.asarray(bare), np.asarray(bare.convert("L"))[..., None])
        tiles.append(overlay(pixels, small, colours, 0.5))
        counts.append(np.bincount(label.ravel(), minlength=256)[:len(names)])
    present = [i for i in np.lexsort((-sum(counts), -counts[-1])) if any(count[i] for count in counts)]
    picture = tiles[0] if len(maps) == 1 else grid([[bare, *tiles]], ["photo", *maps])
    tall = picture.height > 1.2 * picture.width
    in_red = {place for place, i in enumerate(present) if i in unseen}
    tags = legend([names[i] for i in present], colours[present], in_red, 260 if tall else max(260, picture.width))
    return grid([[picture, tags]] if tall else [[picture], [tags]])


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values that divide [low, high] into about five parts (decades with a log axis)."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1,) if len(decades) > 4 else (1, 2, 5)
        return [f * 10.0**d for d in decades[::-(-len(decades) // 8)] for f in factors if low <= f * 10.0**d <= high]
    rough = (high - low) / 5
    step = 10 ** math.floor(math.log10(rough))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if m * step >= rough * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(series: dict[str, list[tuple[float, float]]], title: str, size: tuple[int, int] = (800, 480),
               log_y: bool = False) -> Image.Image:
    """Curves the paper does not print (losses, scores): named lists of (x, y) -> a chart of `size` pixels.

    Points that are not finite, or not positive with log_y, are left out. Drawn at twice the size for smooth lines.
    """
    kept = {name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log_y)]
            for name, points in series.items()}
    xs, ys = [[point[axis] for points in kept.values() for point in points] or [1.0] for axis in (0, 1)]
    width, height = 2 * size[0], 2 * size[1]
    out = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(out), _font(26)
    pen.text((130, 26), _fit(title, 32, width - 170), INK, _font(32))
    left, right, top, bottom = 130, width - 40, 80, height - 70
    x = left  # the curves' names stand in rows between title and axes, where they hide nothing
    for colour, name in zip(palette(len(kept)), kept):
        text = _fit(name, 26, right - left - 60)
        if x > left and x + 60 + font.getlength(text) > right:
            x, top = left, top + 38
        pen.line((x, top + 14, x + 40, top + 14), tuple(map(int, colour)), 8)
        pen.text((x + 52, top + 14), text, INK, font, anchor="lm")
        x += 90 + font.getlength(text)
    top += 60 if kept else 0

    def spread(values: list[float], log: bool) -> tuple[float, float]:
        low, high = min(values), max(values)
        if low == high:  # one value has no extent of its own
            return (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        return (low / 1.1, high * 1.1) if log else (low, high)

    (x0, x1), (y0, y1) = spread(xs, False), spread(ys, log_y)
    scale = math.log if log_y else float

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (x - x0) / (x1 - x0) * (right - left),
                bottom - (scale(y) - scale(y0)) / (scale(y1) - scale(y0)) * (bottom - top))

    for value in _ticks(y0, y1, log_y):
        y = place(x0, value)[1]
        pen.line((left, y, right, y), PALE, 2)
        pen.text((left - 12, y), f"{value:.4g}", GREY, font, anchor="rm")
    for value in _ticks(x0, x1, False):
        x = place(value, y0)[0]
        pen.line((x, top, x, bottom), PALE, 2)
        pen.text((x, bottom + 12), f"{value:,.6g}", GREY, font, anchor="mt")
    pen.line((left, top, left, bottom, right, bottom), GREY, 2)
    for colour, points in zip(palette(len(kept)), kept.values()):
        path = [place(x, y) for x, y in points]
        pen.line(path, tuple(map(int, colour)), 4, joint="curve")
        for x, y in path if len(path) < 30 else []:
            pen.ellipse((x - 6, y - 6, x + 6, y + 6), tuple(map(int, colour)))
    return out.reduce(2)


def method_figure(image: Image.Image, answer: Image.Image) -> Image.Image:
    """Fig. 3, with Fig. 4 and 5 (a) inside, in the code's symbols, shapes and files; 2000 x 1050, to be shown at half.

    image, answer: what stands at its beginning and its end, cut square; 4 x 4 patches of the image in 2 x 2 cells.
    """
    frozen, trained, plain = ((218, 228, 241), (70, 98, 138)), ((255, 231, 196), (196, 98, 0)), ("white", GREY)
    boxes = (  # left, top, right, bottom, (fill, outline), a title tab and remark, more lines
        (20, 24, 276, 76, frozen, "frozen"), (20, 92, 276, 144, trained, "trained"),
        (20, 504, 276, 584, None, "image", "(B, 3, H, W)"),
        (306, 24, 866, 762, frozen, "CLIP's image encoder with RLB\tfrozen",
         "region-level bridge, Sec. 3.2 · rlb_attention.py", "X (B, E, D_v),  E = 1 + K + N + M\tEq. 1"),
        (306, 274, 866, 384, None, "L layers with masked attention\tEq. 2", "trained here: new prompts in each, their",
         "common Linear and a last LayerNorm"),
        (592, 416, 866, 660, None, "Each region token", "reads its own cell", "only, as [CLS] reads",
         "the whole image: R is", "CLIP's answer for", "each of the M = m x m", "regions."),
        (306, 690, 866, 752, None, "After the last layer: I, G, R\tEq. 3"),
        (894, 342, 1026, 430, plain, "I\tpatches", "(B, N, D)"), (894, 476, 1026, 564, plain, "G\timage", "(B, D)"),
        (894, 610, 1026, 698, plain, "R\tregions", "(B, M, D)"), (894, 866, 1026, 954, plain, "T\tnames", "(C, D)"),
        (20, 830, 276, 990, plain, "class names", "in training: seen", "at test: any", '"a photo of a ..."'),
        (306, 846, 866, 974, frozen, "CLIP's text encoder\tfrozen", "Sec. 3.3 · model.py", "once for each class"),
        (1062, 330, 1392, 762, trained, "region alignment\tSec. 3.3", "RAM · model.py"),
        (1078, 414, 1376, 542, plain, "v\t(B, N, D)  Eq. 4", "Î = [Up(G), Up(R), I]", "v = Linear(Î)"),
        (1078, 586, 1376, 746, plain, "q\t(B, M C, D)  Eq. 5-6", "R_a = R + G", "R̂ = [T * R_a, T]", "q = Linear(R̂)"),
        (1446, 330, 1690, 762, trained, "decoder\tSec. 3.4", "3 layers · model.py"),
        (1462, 414, 1674, 542, plain, "v reads q\tEq. 7", "MHCA and FFN", "v_d, paper: Î_d"),
        (1462, 602, 1674, 730, plain, "q reads v\tEq. 7", "MHCA and FFN", "q_d, paper: R̂_d"),
        (1736, 414, 1980, 730, plain, "q_d · v_d\tEq. 8", "each descriptor", "with each patch,", "mean over regions:",
         "(B, C, N)", "sized as the image:", "(B, C, H, W)", "model.py"),
        (1446, 850, 1700, 990, None, "a map per class", "(B, C, H, W)", "the highest score", "names the pixel"),
        (1066, 24, 1686, 76, None, "recovery\tRDL, Sec. 3.4 · model.py · training only"),
        (1078, 80, 1376, 242, plain, "recovery loss\tEq. 10", "mean |q_r - R̂|", "+ mean |v_r - I|",
         "R̂ and I as constants"),
        (1446, 80, 1674, 242, trained, "decoder\tEq. 9", "1 layer", "q_r (B, M C, 2D)", "v_r (B, N, D)"),
    )
    arrows = (  # x, y of the corners
        (276, 376, 306, 376), (866, 386, 894, 386), (866, 520, 894, 520), (866, 654, 894, 654), (1026, 386, 1062, 386),
        (1026, 520, 1062, 520), (1026, 654, 1062, 654), (276, 910, 306, 910), (866, 910, 894, 910),
        (1026, 910, 1227, 910, 1227, 762), (1376, 478, 1462, 478), (1376, 666, 1462, 666), (1568, 572, 1568, 542),
        (1568, 572, 1568, 602), (1674, 478, 1736, 478), (1674, 666, 1736, 666), (1858, 730, 1858, 784),
    )
    in_training = ((960, 342, 960, 161, 1078, 161), (1227, 330, 1227, 242), (1510, 330, 1510, 242),
                   (1610, 330, 1610, 242), (1446, 161, 1376, 161))
    labels = ((92, 178, "training only"), (328, 168, "1"), (396, 168, "K"), (580, 168, "N"), (792, 168, "M"),
              (317, 244, "cls"), (364, 244, "prompts"), (545, 244, "patches"), (761, 244, "regions"), (1412, 456, "v"),
              (1412, 644, "q"), (1698, 450, "v_d"), (1698, 638, "q_d"), (976, 140, "I"), (1243, 296, "R̂"),
              (1526, 296, "q_d"), (1626, 296, "v_d"))
    out = Image.new("RGB", (2000, 1050), "white")
    pen, ink = ImageDraw.Draw(out), (80, 80, 80)

    def write(x: float, y: float, text: str, size: int, bold: float = 0, colour: tuple = INK) -> float:
        for part in re.split("(\u0302|(?<=[DIRqv\u0302])_[a-z])", unicodedata.normalize("NFD", text)):
            if part == "\u0302":  # Pillow's own font has no letters with hats
                pen.text((x - width / 2, y - 0.1 * size), "^", colour, _font(int(0.8 * size)), "ms", stroke_width=bold)
                continue
            small = part[:1] == "_"  # a subscript
            font = _font(int(0.75 * size) if small else size)
            pen.text((x, y + 0.3 * size * small), part[small:], colour, font, "lm", stroke_width=bold)
            x, width = x + font.getlength(part[small:]), font.getlength(part[-1:])
        return x

    def line(corners: tuple, dashed: bool) -> None:
        for start, end in itertools.pairwise(np.reshape(corners, (-1, 2))):
            dashes = np.linspace(start, end, 2 * round(np.abs(end - start).sum() / 20) if dashed else 2)
            for dash in dashes.reshape(-1, 4).tolist():
                pen.line(dash, ink, 4)

    def picture(source: Image.Image, side: int, x: int, y: int, frame: tuple | str) -> None:
        pen.rectangle((x - 4, y - 4, x + side + 3, y + side + 3), frame)
        out.paste(source.resize((side, side)), (x, y))

    line((22, 178, 82, 178), dashed=True)
    line((1062, 24, 1690, 24, 1690, 258, 1062, 258, 1062, 24), dashed=True)
    for left, top, right, bottom, colours, *texts in boxes:
        if colours:
            pen.rounded_rectangle((left, top, right, bottom), 12, *colours, 3)
        for i, text in enumerate(texts):
            text, _, remark = text.partition("\t")
            y = top + 26 + 34 * i + 2 * (i > 0)
            x = write(left + 12, y, text, *((25, 0), (27, 0.6))[i == 0])
            write(x + 12, y, remark, 23, colour=ink)
    for corners in arrows + in_training:
        line(corners, corners in in_training)
        *_, x0, y0, x, y = corners
        dx, dy = 16 * np.sign((x - x0, y - y0))
        pen.polygon([(x, y), (x - dx + dy / 2, y - dy + dx / 2), (x - dx - dy / 2, y - dy - dx / 2)], ink)
    for x, y, text in labels:
        write(x, y, text, 25)

    image, answer = (ImageOps.fit(each.convert("RGB"), (256, 256)) for each in (image, answer))
    picture(image, 256, 20, 248, GREY)
    for offset in (24, 12, 0):
        picture(answer, 220, 1736 + offset, 792 + offset, GREY)
    cells = (*(FIRST_COLOURS[i] for i in (0, 2, 4)), INK)  # a colour for each region and its patches
    tokens = [(322, 192, *frozen), (380, 192, *trained), (406, 192, *trained)]
    for i, colour in enumerate(cells):
        tokens += (752 + 26 * i, 192, frozen[0], colour), (374 + 132 * (i % 2), 468 + 132 * (i // 2), frozen[0], colour)
    for i in range(16):
        row, column = divmod(i, 4)
        patch = image.crop((64 * column, 64 * row, 64 * column + 64, 64 * row + 64))
        colour = cells[row // 2 * 2 + column // 2]
        out.paste(patch.resize((15, 15)), (446 + 18 * i, 192))
        pen.rectangle((446 + 18 * i, 212, 460 + 18 * i, 219), colour)
        picture(patch, 52, 328 + 60 * column + 12 * (column // 2), 424 + 60 * row + 12 * (row // 2), colour)
    for x, y, fill, outline in tokens:
        pen.rectangle((x, y, x + 22, y + 27), fill, outline, 5)
    return out


def save(image: Image.Image, path: str | Path) -> None:
    """Writes a figure beside its place and renames it, so that no half-written file ever bears the name.

    ValueError for a suffix Pillow does not know, OSError naming the file where it cannot be written.
    """
    path = Path(path)
    file_format = Image.registered_extensions().get(path.suffix.lower())
    if file_format is None:
        raise ValueError(f"{path}: unknown kind of picture '{path.suffix}'; end the name in .png")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, file_format)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}); name another place") from error
    finally:
        if temporary.parent.is_dir() and len(os.fsencode(temporary.name)) < 256:
            temporary.unlink(missing_ok=True)


def main() -> None:
    """Draws Fig. 3."""
    parser = argparse.ArgumentParser(description="Draw CLIP-RC at a glance (Fig. 3), around a scene of the small world "
                                                 "and the labels it was drawn with.")
    parser.add_argument("--out", default="method.png", help="the picture's path (default %(default)s)")
    args = parser.parse_args()
    import toy  # only this picture needs it, and it imports this file

    classes = [toy.CLASSES.index(rug) for rug in (("striped", "yellow"), ("dotted", "blue"), ("plain", "red"))]
    scene, label = toy.draw_scene(np.random.default_rng(0), [toy.CLASSES[i] for i in classes])
    scene, label = (array.repeat(4, 0).repeat(4, 1) for array in (scene, np.array([255, *classes], np.uint8)[label]))
    save(method_figure(Image.fromarray(scene), overlay(scene, label, palette(len(toy.CLASSES)), 0.75)), args.out)
    print(f"{args.out}: written")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {' '.join(str(error).split())}", file=sys.stderr) or 2)
