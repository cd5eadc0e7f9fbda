"""All drawing in one place: label colours, masks over pictures, legends and grids of tiles (Fig. 6), line charts."""

import functools
import math
import os
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, GREY, PALE, RED = (30, 30, 30), (120, 120, 120), (222, 222, 222), (200, 0, 20)
# told apart with and without colour-blindness: seven by Okabe and Ito, then five of Tol's "muted" and "light" sets
FIRST_COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (204, 121, 167), (240, 228, 66),
                 (86, 180, 233), (136, 34, 85), (51, 34, 136), (187, 204, 51), (153, 153, 51), (255, 170, 187))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@functools.cache
def _colours() -> np.ndarray:
    """(255, 3) uint8: FIRST_COLOURS, then always the colour farthest, in CIE Lab, from all before it and from white."""
    steps = np.arange(16, 256, 20)
    candidates = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)  # (n, 3)
    chosen = np.array([*FIRST_COLOURS, (255, 255, 255)])

    def lab(rgb: np.ndarray) -> np.ndarray:
        linear = np.where(rgb <= 10, rgb / 3294.6, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
        xyz = linear @ np.array([[0.4339, 0.2126, 0.0178], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8727]])
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)

    points = lab(candidates)
    chroma = np.hypot(points[:, 1], points[:, 2])  # grey looks like "no label", pure colours drown the picture
    candidates = candidates[(chroma > 22) & (chroma < 90) & (points[:, 0] > 33) & (points[:, 0] < 93)]
    points = lab(candidates)
    distance = np.linalg.norm(points[:, None] - lab(chosen), axis=-1).min(1)  # (n,)
    picked = list(FIRST_COLOURS)
    while len(picked) < 255:
        best = distance.argmax()
        picked.append(tuple(candidates[best]))
        distance = np.minimum(distance, np.linalg.norm(points - points[best], axis=-1))
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
    """Fig. 6's tags: a swatch and a name per class in columns that fill `width`; unseen names in red with a *."""
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
    out = Image.new("RGB", (width, max(1, -(-slot // columns)) * line + 8), "white")
    pen = ImageDraw.Draw(out)
    for i, (row, column) in enumerate(places):
        x, y = 4 + column * width / columns, 4 + row * line
        pen.rectangle((x, y + 3, x + 1.4 * size, y + line - 4), tuple(map(int, colours[i])), GREY)
        pen.text((x + indent, y + line / 2), texts[i], RED if i in unseen else INK, _font(size), anchor="lm")
    return out


def grid(rows: list[list[Image.Image]], headers: list[str] | None = None,
         row_labels: list[str] | None = None) -> Image.Image:
    """Fig. 6's arrangement: tiles in rows and columns on white, captions above the columns and left of the rows."""
    gap, size = 6, 16
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(max(map(len, rows)))]
    heights = [max(tile.height for tile in row) for row in rows]
    left = gap + (int(max(_font(size).getlength(_fit(text, size)) for text in row_labels)) + gap if row_labels else 0)
    top = gap + (size + 2 * gap if headers else 0)
    out = Image.new("RGB", (left + sum(widths) + gap * len(widths), top + sum(heights) + gap * len(heights)), "white")
    pen = ImageDraw.Draw(out)
    y = top
    for r, row in enumerate(rows):
        x = left
        if row_labels:
            pen.text((gap, y + heights[r] / 2), _fit(row_labels[r], size), INK, _font(size), anchor="lm")
        for c, tile in enumerate(row):
            if r == 0 and headers:
                pen.text((x + widths[c] / 2, top / 2), _fit(headers[c], size, widths[c]), INK, _font(size), anchor="mm")
            out.paste(tile, (x, y))
            x += widths[c] + gap
        y += heights[r] + gap
    return out


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


def save(image: Image.Image, path: str | Path) -> None:
    """Writes a figure beside its place and renames it, so that no half-written file ever bears the name.

    ValueError for a suffix Pillow does not know.
    """
    path = Path(path)
    file_format = Image.registered_extensions().get(path.suffix.lower())
    if file_format is None:
        raise ValueError(f"{path}: unknown kind of picture '{path.suffix}'; end the name in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(temporary, file_format)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
