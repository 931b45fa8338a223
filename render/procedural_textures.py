"""Seeded tileable textures and palettes for the procedural source, in numpy alone.

Every texture is a function of (generator, size, palette) that returns sRGB colours [n, n, 3] in [0, 1] and repeats
without a seam in both directions, so that meshes may run their coordinates past 1. Each has a readable structure at a
large scale (cells, bands, planks, glyphs), a second one inside it (edges, tints, rivets), and a grain on top; noise
alone gives a reconstruction model nothing to match. Fractal noise is synthesised in the frequency domain, which is
periodic for nothing and costs one inverse FFT (about 8 ms for 512^2), where lattice noise costs one pass an octave.

Colours are chosen in OKLCH (https://bottosson.github.io/posts/oklab/), where equal steps look equal, so that a random
hue keeps its lightness and a palette its contrast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Floats = NDArray[np.floating[Any]]
Int = NDArray[np.int64]
Texture = Callable[[np.random.Generator, int, Float32], Float32]

NUM_COLORS = 5  # main, second, accent, dark, light
_MOODS = {  # lightness and chroma ranges of the first three colours
    "jewel": ((0.42, 0.62), (0.12, 0.20)),
    "vivid": ((0.58, 0.78), (0.14, 0.24)),
    "earth": ((0.40, 0.68), (0.05, 0.10)),
    "pastel": ((0.72, 0.86), (0.06, 0.12)),
    "toy": ((0.55, 0.82), (0.16, 0.26)),
}
_SCHEMES = {  # hue steps in degrees from the main colour
    "analogous": (0, 32, -38),
    "complementary": (0, 180, 25),
    "triad": (0, 120, 240),
    "split": (0, 150, 210),
    "accent": (0, 12, 170),
    "square": (0, 90, 180),
}


def oklch_to_srgb(lightness: float, chroma: float, hue_rad: float) -> Float32:
    """Return the sRGB colour [3] in [0.02, 0.95] of an OKLCH colour, clipped to the gamut."""
    a, b = chroma * np.cos(hue_rad), chroma * np.sin(hue_rad)
    lms = lightness + np.array([0.3963377774 * a + 0.2158037573 * b, -0.1055613458 * a - 0.0638541728 * b,
                                -0.0894841775 * a - 1.2914855480 * b])  # fmt: skip
    long, medium, short = lms**3
    linear = np.array([
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    ]).clip(0.0, 1.0)  # fmt: skip
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return srgb.clip(0.02, 0.95).astype(np.float32)


def palette(rng: np.random.Generator) -> Float32:
    """Return five sRGB colours [5, 3] that go together: main, second, accent, dark, light."""
    (low, high), chromas = _MOODS[str(rng.choice(list(_MOODS)))]
    steps = _SCHEMES[str(rng.choice(list(_SCHEMES)))]
    hue = rng.uniform(0, 360)
    hues = [np.deg2rad(hue + step + rng.uniform(-8, 8)) for step in steps]
    # The three lightnesses are spread over the range, since hues alone vanish in a grey image.
    lightness = rng.permutation(np.linspace(low - 0.12, high + 0.08, 3)) + rng.uniform(-0.03, 0.03, 3)
    colors = [oklch_to_srgb(float(lightness[i]), rng.uniform(*chromas), hues[i]) for i in range(3)]
    colors.append(oklch_to_srgb(rng.uniform(0.20, 0.32), rng.uniform(0.01, 0.06), hues[int(rng.integers(3))]))
    colors.append(oklch_to_srgb(rng.uniform(0.88, 0.95), rng.uniform(0.01, 0.05), hues[int(rng.integers(3))]))
    return np.stack(colors)


def grid(n: int) -> tuple[Float32, Float32]:
    """Return the coordinates u, v [n, n] in (0, 1) of the pixel centres."""
    centers = ((np.arange(n) + 0.5) / n).astype(np.float32)
    u, v = np.meshgrid(centers, centers)
    return u, v


def fractal(rng: np.random.Generator, n: int, lowest: float = 2, slope: float = 1.7, stretch: float = 1.0) -> Float32:
    """Return periodic noise [n, n] of mean 0 and deviation 1 whose spectrum falls as frequency ** -slope.

    Args:
        rng: source of randomness.
        n: size in pixels.
        lowest: lowest frequency in periods an image.
        slope: 1 is gritty, 2 is soft.
        stretch: above 1 draws features out along u.
    """
    frequency = np.hypot(np.fft.fftfreq(n)[:, None] * n, np.fft.rfftfreq(n) * n * stretch)
    gain = np.where(frequency >= lowest, np.maximum(frequency, 1) ** -slope, 0)
    spectrum = rng.standard_normal((n, n // 2 + 1)) + 1j * rng.standard_normal((n, n // 2 + 1))
    field = np.fft.irfft2(spectrum * gain, s=(n, n))
    return (field / max(float(field.std()), 1e-12)).astype(np.float32)


def mix(a: Floats, b: Floats, t: Floats) -> Float32:
    """Return colours [n, n, 3] that go from a to b ([3] or [n, n, 3]) as t [n, n] goes from 0 to 1."""
    weight = t.clip(0, 1)[..., None].astype(np.float32)
    return np.asarray(a * (1 - weight) + b * weight, np.float32)


def ramp(t: Floats, colors: Float32) -> Float32:
    """Return colours [n, n, 3] of a piecewise linear gradient through colors [k, 3] at t [n, n] in [0, 1]."""
    table = np.stack([np.interp(np.linspace(0, 1, 256), np.linspace(0, 1, len(colors)), c) for c in colors.T], -1)
    return table.astype(np.float32)[(t.clip(0, 1) * 255).astype(np.int64)]


def step(value: Floats, edge: float, width: float) -> Float32:
    """Return a smoothed step [n, n]: 0 below edge - width, 1 above edge + width."""
    t = ((value - edge) / (2 * width) + 0.5).clip(0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _pick(rng: np.random.Generator, colors: Float32, count: int) -> Float32:
    """Return `count` different colours of a palette [5, 3] in random order, the saturated ones first in odds."""
    return np.asarray(colors[rng.choice(NUM_COLORS, count, replace=False, p=[0.25, 0.25, 0.2, 0.15, 0.15])])


def _tint(rng: np.random.Generator, colors: Float32, shape: tuple[int, ...], amount: float) -> Float32:
    """Return random picks [*shape, 3] from colors [k, 3] with their brightness jittered by +-amount."""
    picks = colors[rng.integers(len(colors), size=shape)]
    return np.asarray(picks * (1 + rng.uniform(-amount, amount, (*shape, 1))), np.float32)


def cells(rng: np.random.Generator, n: int, rows: int, jitter: float) -> tuple[Float32, Float32, Int]:
    """Return a periodic Voronoi diagram: nearest and second distance [n, n] in cell sizes, cell number [n, n].

    With jitter 0 the sites form an offset grid, whose cells are hexagons. `rows` must be even for that to repeat.
    """
    u, v = grid(n)
    x, y = u * rows, v * rows
    column, row = x.astype(np.int64), y.astype(np.int64)
    sites = 0.5 + (rng.random((rows, rows, 2)) - 0.5) * jitter
    first = np.full((n, n), 9.0, np.float32)
    second, number = first.copy(), np.zeros((n, n), np.int64)
    for dy in (-1, 0, 1):
        r = (row + dy) % rows
        for dx in (-1, 0, 1):
            c = (column + dx) % rows
            shift = 0.5 * (r % 2) - 0.25
            gap_x = column + dx + sites[r, c, 0] + shift - x
            gap_y = row + dy + sites[r, c, 1] - y
            distance = np.hypot(gap_x, gap_y).astype(np.float32)
            nearer = distance < first
            second = np.where(nearer, first, np.minimum(second, distance))
            number = np.where(nearer, r * rows + c, number)
            first = np.where(nearer, distance, first)
    return first, second, number


def stripes(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Bands of uneven width, slanted, sometimes wavy, with pin lines between them."""
    u, v = grid(n)
    along, across = int(rng.integers(0, 3)), int(rng.integers(1, 4))
    wave = rng.choice([0.0, 0.04, 0.12]) * fractal(rng, n, 1, 2.6)
    t = (along * u + across * v + wave) % 1.0
    count = int(rng.integers(4, 9))
    widths = rng.dirichlet(np.full(count, 3.0))
    order = np.concatenate([_pick(rng, colors, 4), _pick(rng, colors, 4)])[:count]
    edges = np.cumsum(widths)[:-1]
    image = order[np.searchsorted(edges, t)]
    nearest = np.abs(t[..., None] - edges.astype(np.float32)).min(-1)
    return mix(colors[3], image, step(nearest, 0.006, 0.003))


def plaid(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Tartan: two crossed sets of bands with a thread pattern."""
    u, v = grid(n)
    repeats = int(rng.integers(2, 4))
    widths = np.cumsum(rng.dirichlet(np.full(7, 1.5)))[:-1]
    band = _pick(rng, colors, 4)[rng.integers(4, size=7)]
    warp, weft = (band[np.searchsorted(widths, (t * repeats) % 1.0)] for t in (u, v))
    thread = ((u + v) * 64).astype(np.int64) % 2
    return mix(warp, weft, 0.25 + 0.5 * thread.astype(np.float32))


def checker(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Squares of two colours, each tinted and holding a small diamond, disc or frame."""
    u, v = grid(n)
    count = 2 * int(rng.integers(2, 5))
    x, y = u * count, v * count
    i, j = y.astype(np.int64), x.astype(np.int64)
    a, b, mark, line = _pick(rng, colors, 4)
    tint = 1 + rng.uniform(-0.15, 0.15, (count, count, 1)).astype(np.float32)
    parity = ((i + j) % 2).astype(np.float32)
    image = mix(a, b, parity) * tint[i, j]
    dx, dy = np.abs(x % 1 - 0.5), np.abs(y % 1 - 0.5)
    kind = int(rng.integers(3))
    inside = (dx + dy, np.hypot(dx, dy), np.maximum(dx, dy))[kind]
    shown = (rng.random((count, count)) < 0.7)[i, j]
    image = mix(image, mark, (1 - step(inside, 0.24, 0.015)) * shown)
    return mix(line, image, 1 - step(np.maximum(dx, dy), 0.475, 0.01))


def mosaic(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Irregular cells in palette colours with dark joints: stained glass, giraffe or cracked glaze."""
    rows = 2 * int(rng.integers(2, 6))
    first, second, number = cells(rng, n, rows, rng.uniform(0.6, 1.0))
    table = _tint(rng, _pick(rng, colors, int(rng.integers(2, 5))), (rows * rows,), 0.2)
    image = table[number] * (1.12 - 0.35 * first[..., None])
    width = rng.uniform(0.04, 0.12)
    return mix(colors[int(rng.integers(3, 5))], image, step(second - first, width, 0.03))


def hexagons(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Hexagonal tiles with an inner ring, a few of them in the accent colour."""
    rows = 2 * int(rng.integers(2, 6))
    first, second, number = cells(rng, n, rows, 0.0)
    a, b, joint = _pick(rng, colors, 3)
    table = _tint(rng, np.stack([a, a, b]), (rows * rows,), 0.15)
    edge = second - first
    image = mix(table[number] * 0.75, table[number], step(edge, 0.28, 0.04))
    image = mix(image, joint, 1 - step(first, 0.16, 0.02)) if rng.random() < 0.5 else image
    return mix(joint, image, step(edge, 0.07, 0.02))


def terrazzo(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Chips of stone of two sizes in a plain ground."""
    ground, *chips = _pick(rng, colors, 4)
    image = np.broadcast_to(ground, (n, n, 3)).astype(np.float32)
    for rows, share in ((2 * int(rng.integers(6, 9)), 0.45), (2 * int(rng.integers(2, 4)), 0.55)):
        first, second, number = cells(rng, n, rows, 1.0)
        shown = (rng.random(rows * rows) < share)[number]
        chip = _tint(rng, np.stack(chips), (rows * rows,), 0.15)[number]
        image = mix(image, chip, step(second - first, 0.22, 0.03) * (first < 0.5) * shown)
    return image


def bricks(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Courses of bricks with lit upper and dark lower edges, each its own tint."""
    u, v = grid(n)
    rows, columns = 2 * int(rng.integers(3, 6)), int(rng.integers(2, 6))
    row = (v * rows).astype(np.int64)
    x = u * columns + 0.5 * (row % 2)
    column = x.astype(np.int64) % columns
    body, other, mortar = _pick(rng, colors, 3)
    table = _tint(rng, np.stack([body, body, body, other]), (rows, columns), 0.2)
    dx = (0.5 - np.abs(x % 1 - 0.5)) * rows / columns
    dy = 0.5 - np.abs((v * rows) % 1 - 0.5)
    edge = np.minimum(dx, dy) + 0.02 * fractal(rng, n, 8, 1.6)
    image = table[row, column] * (0.9 + 0.25 * ((v * rows) % 1))[..., None]
    return mix(mortar, image, step(edge, 0.09, 0.03))


def dots(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Discs and rings of random size on a striped or plain ground."""
    u, v = grid(n)
    count = 2 * int(rng.integers(2, 5))
    row = (v * count).astype(np.int64)
    x = u * count + 0.5 * (row % 2)
    column = x.astype(np.int64) % count
    distance = np.hypot(x % 1 - 0.5, (v * count) % 1 - 0.5)
    ground, band, *discs = _pick(rng, colors, 5)
    radius = rng.uniform(0.22, 0.45, (count, count)).astype(np.float32)[row, column]
    disc = _tint(rng, np.stack(discs), (count, count), 0.1)[row, column]
    core = _tint(rng, colors, (count, count), 0.1)[row, column]
    image = mix(ground, band, step(np.abs((v * count / 2) % 1 - 0.5), 0.25, 0.01) * (rng.random() < 0.6))
    image = mix(image, disc, 1 - step(distance - radius, 0.0, 0.02))
    return mix(image, core, 1 - step(distance - 0.55 * radius, 0.0, 0.02))


def wood(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Planks with grain lines along u, butt joints, and tints of one colour."""
    u, v = grid(n)
    planks = int(rng.integers(3, 7))
    row = (v * planks).astype(np.int64)
    x = (u + rng.random(planks).astype(np.float32)[row]) * 2
    end = np.abs(x % 1 - 0.5)
    tint = rng.uniform(0.75, 1.15, (planks, 2)).astype(np.float32)[row, x.astype(np.int64) % 2]
    rings = (v * rng.integers(14, 30) + 1.3 * fractal(rng, n, 1, 2.2, 5.0) + row * 0.37) % 1.0
    fibre = fractal(rng, n, 12, 1.0, 14.0)
    a, b = rng.permutation(colors[:3])[:2] if rng.random() < 0.3 else _browns(rng)
    image = mix(a, b, rings**1.6 + 0.08 * fibre) * tint[..., None]
    gap = step(0.5 - np.abs((v * planks) % 1 - 0.5), 0.03, 0.015) * step(0.5 - end, 0.008, 0.004)
    return mix(colors[3], image, gap)


def _browns(rng: np.random.Generator) -> Float32:
    """Return the light and the dark colour [2, 3] of some wood."""
    lightness, hue = rng.uniform(0.55, 0.78), np.deg2rad(rng.uniform(45, 80))
    return np.stack([oklch_to_srgb(lightness, 0.09, hue), oklch_to_srgb(lightness - 0.22, 0.08, hue - 0.15)])


def marble(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Veins of two widths through clouded stone."""
    u, v = grid(n)
    warp = fractal(rng, n, 1, 2.0)
    ground, cloud, vein, fine = _pick(rng, colors, 4)
    image = mix(ground, cloud, 0.4 + 0.35 * fractal(rng, n, 2, 1.9))
    a, b = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    wide = np.abs(np.sin(np.pi * (a * u + b * v + 0.45 * warp)))
    thin = np.abs(fractal(rng, n, 3, 1.9))
    image = mix(image, fine, 0.8 * (1 - step(thin, 0.06, 0.05)))
    return mix(image, vein, 1 - step(wide, 0.12, 0.1))


def glyphs(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Rows of mirrored bitmap signs on coloured plates."""
    u, v = grid(n)
    count, pixels = int(rng.integers(3, 7)), int(rng.integers(5, 8))
    half = rng.random((count, count, pixels, (pixels + 1) // 2)) < 0.5
    signs = np.concatenate([half, half[..., : pixels // 2][..., ::-1]], -1)
    x, y = u * count, v * count
    i, j = y.astype(np.int64), x.astype(np.int64)
    inside_x, inside_y = (x % 1 - 0.14) / 0.72, (y % 1 - 0.14) / 0.72
    bit = signs[i, j, (inside_y * pixels).astype(np.int64).clip(0, pixels - 1),
                (inside_x * pixels).astype(np.int64).clip(0, pixels - 1)]  # fmt: skip
    on = bit & (inside_x > 0) & (inside_x < 1) & (inside_y > 0) & (inside_y < 1)
    plates, inks = _pick(rng, colors, 4).reshape(2, 2, 3)
    swap = rng.integers(2, size=(count, count))
    image = mix(plates[swap][i, j] * 0.95, inks[swap][i, j], on.astype(np.float32))
    border = np.maximum(np.abs(x % 1 - 0.5), np.abs(y % 1 - 0.5))
    return mix(image, colors[3], step(border, 0.475, 0.01))


def panels(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Sheet-metal plates of many sizes with seams, rivets, vents and warning stripes."""
    u, v = grid(n)
    rectangles = [(0, 0, n, n)]
    for _ in range(int(rng.integers(14, 30))):
        index = int(np.argmax([(y1 - y0) * (x1 - x0) * rng.uniform(0.3, 1) for y0, x0, y1, x1 in rectangles]))
        y0, x0, y1, x1 = rectangles.pop(index)
        share = rng.uniform(0.3, 0.7)
        if y1 - y0 > x1 - x0:
            cut = int(y0 + share * (y1 - y0))
            rectangles += [(y0, x0, cut, x1), (cut, x0, y1, x1)]
        else:
            cut = int(x0 + share * (x1 - x0))
            rectangles += [(y0, x0, y1, cut), (y0, cut, y1, x1)]
    plate, other, mark, seam = _pick(rng, colors, 4)
    image = np.empty((n, n, 3), np.float32)
    hazard = step(np.abs(((u + v) * 16) % 1 - 0.5), 0.25, 0.05)
    vent = step(np.abs((v * 32) % 1 - 0.5), 0.25, 0.08)
    width = max(n // 170, 1)
    for y0, x0, y1, x1 in rectangles:
        area = image[y0:y1, x0:x1]
        area[:] = (plate, plate, other)[int(rng.integers(3))] * rng.uniform(0.8, 1.12)
        inner = np.s_[y0 + 5 * width : y1 - 5 * width, x0 + 5 * width : x1 - 5 * width]
        kind = rng.random()
        if kind < 0.3:
            image[inner] = mix(seam, mark, (hazard if kind < 0.12 else vent)[inner])
        for edge in (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:]):
            area[edge] = seam * 0.8
        if min(y1 - y0, x1 - x0) > 16 * width:
            for y, x in ((y0, x0), (y0, x1 - 6 * width), (y1 - 6 * width, x0), (y1 - 6 * width, x1 - 6 * width)):
                image[y + 2 * width : y + 4 * width, x + 2 * width : x + 4 * width] = mark
    return image


def contours(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Height bands of a soft noise with dark contour lines, like a map or an agate."""
    height = 0.5 + 0.2 * fractal(rng, n, int(rng.integers(1, 3)), 2.5)
    bands = int(rng.integers(6, 12))
    t = height * bands
    image = ramp(np.floor(t) / bands, _pick(rng, colors, 4))
    return mix(colors[3], image, step(0.5 - np.abs(t % 1 - 0.5), 0.06, 0.04))


def scales(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Overlapping round shingles, each with a light rim and a tint: roof, fish or feathers."""
    u, v = grid(n)
    rows = 2 * int(rng.integers(3, 7))
    body, other, rim = _pick(rng, colors, 3)
    table = _tint(rng, np.stack([body, body, other]), (rows, rows), 0.15)
    image = np.zeros((n, n, 3), np.float32)
    y = v * rows
    for back in (1, 0):  # the row below covers the one above it
        row = np.floor(y).astype(np.int64) + back
        x = u * rows + 0.5 * (row % 2)
        distance = np.hypot(x % 1 - 0.5, (y - row + 0.02) * 0.75)
        color = table[row % rows, x.astype(np.int64) % rows]
        shade = mix(color * 0.55, color, step(distance, 0.25, 0.25))
        scale = mix(shade, rim, step(distance, 0.46, 0.02) * 0.85)
        image = mix(image, scale, 1 - step(distance, 0.53, 0.015)) if back == 0 else scale
    return image


def camouflage(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Hard-edged patches of four colours in layers."""
    image = np.broadcast_to(_pick(rng, colors, 1)[0], (n, n, 3)).astype(np.float32)
    for layer, color in enumerate(_pick(rng, colors, 4)):
        patch = fractal(rng, n, 2 + layer, 2.3)
        image = mix(image, color, step(patch, 0.55 + 0.12 * layer, 0.04))
    return image


def truchet(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Quarter arcs in random turns that join to winding ribbons."""
    u, v = grid(n)
    count = int(rng.integers(3, 8))
    x, y = u * count, v * count
    i, j = y.astype(np.int64), x.astype(np.int64)
    turned = (rng.random((count, count)) < 0.5)[i, j]
    fx, fy = np.where(turned, 1 - x % 1, x % 1), y % 1
    distance = np.abs(np.minimum(np.hypot(fx, fy), np.hypot(1 - fx, 1 - fy)) - 0.5)
    ground, ribbon, core, edge = _pick(rng, colors, 4)
    width = rng.uniform(0.12, 0.2)
    image = mix(edge, ground, step(distance, width + 0.04, 0.015))
    image = mix(ribbon, image, step(distance, width, 0.015))
    return mix(core, image, step(distance, width * 0.3, 0.015))


def weave(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Basket work: strands over and under, round in shade, with fibres along them."""
    u, v = grid(n)
    count = 2 * int(rng.integers(3, 7))
    x, y = u * count, v * count
    over = ((x.astype(np.int64) + y.astype(np.int64)) % 2).astype(bool)
    across, along = np.where(over, y % 1, x % 1) - 0.5, np.where(over, x % 1, y % 1) - 0.5
    a, b, gap = _pick(rng, colors, 3)
    shade = (1 - 1.6 * across**2) * (1 - 0.9 * along**2) * (1 + 0.12 * np.sin(across * 40))
    image = mix(a, b, over.astype(np.float32)) * shade[..., None]
    return mix(image, gap * 0.6, step(np.abs(across), 0.44, 0.03))


def rosette(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Rings and petals about the centre of each tile, with quarter rings at its corners."""
    u, v = grid(n)
    count = int(rng.integers(1, 4))
    x, y = (u * count) % 1 - 0.5, (v * count) % 1 - 0.5
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    petals = int(rng.integers(2, 6)) * 2
    t = radius * rng.uniform(1.6, 2.2) + 0.09 * np.cos(petals * angle) * (radius > 0.1)
    bands = int(rng.integers(4, 8))
    order = np.concatenate([_pick(rng, colors, 5), _pick(rng, colors, 5)])
    index = (t * bands).astype(np.int64).clip(0, 9)
    image = order[index]
    corner = np.hypot(0.5 - np.abs(x), 0.5 - np.abs(y))
    image = mix(order[1], image, step(corner, 0.2, 0.01))
    image = mix(order[2], image, step(corner, 0.11, 0.01))
    return mix(colors[3], image, step(np.abs((t * bands) % 1 - 0.5), 0.46, 0.03) * -1 + 1)


def lacquer(rng: np.random.Generator, n: int, colors: Float32) -> Float32:
    """Calm paint with brush strokes, one broad band between pin lines, and a few round badges."""
    v = grid(n)[1]
    ground, band, badge = _pick(rng, colors, 3)
    strokes = 0.12 * fractal(rng, n, 2, 1.2, 12.0) + 0.1 * np.sin(2 * np.pi * v + rng.uniform(0, 6))
    image = mix(ground * 0.8, ground * 1.1, 0.5 + strokes)
    middle = np.abs((v + rng.random()) % 1 - 0.5)
    width = rng.uniform(0.06, 0.16)
    image = mix(image, badge, step(-np.abs(middle - width - 0.04), -0.012, 0.004))
    image = mix(band, image, step(middle, width, 0.006))
    first, _, number = cells(rng, n, 2 * int(rng.integers(1, 3)), 0.5)
    shown = (rng.random(int(number.max()) + 1) < 0.5)[number]
    ring = step(first, 0.2, 0.01) - step(first, 0.26, 0.01)
    return mix(image, badge, (ring + 1 - step(first, 0.12, 0.01)) * shown)


TEXTURES: dict[str, Texture] = {
    "stripes": stripes, "plaid": plaid, "checker": checker, "mosaic": mosaic, "hexagons": hexagons,
    "terrazzo": terrazzo, "bricks": bricks, "dots": dots, "wood": wood, "marble": marble, "glyphs": glyphs,
    "panels": panels, "contours": contours, "scales": scales, "camouflage": camouflage, "truchet": truchet,
    "weave": weave, "rosette": rosette, "lacquer": lacquer,
}  # fmt: skip


def finish(rng: np.random.Generator, image: Float32, colors: Float32) -> Float32:
    """Return an image [n, n, 3] with clouded brightness, fine grain and, at times, dirt or chipped paint on it."""
    n = len(image)
    clouds = 1 + 0.07 * fractal(rng, n, 1, 1.9) + 0.035 * fractal(rng, n, 24, 0.6)
    image = image * clouds[..., None]
    if rng.random() < 0.35:
        wear = step(fractal(rng, n, 3, 1.5), rng.uniform(1.3, 1.9), 0.1)
        image = mix(image, colors[int(rng.integers(3, 5))], wear * rng.uniform(0.5, 0.9))
    return np.asarray(image.clip(0.015, 0.96), np.float32)


def texture(rng: np.random.Generator, kind: str, n: int, colors: Float32) -> NDArray[np.uint8]:
    """Return a finished tileable sRGB image [n, n, 3], 8-bit, of one of TEXTURES in a palette [5, 3]."""
    image = finish(rng, TEXTURES[kind](rng, n, colors), colors)
    return np.asarray(np.rint(image * 255), np.uint8)
