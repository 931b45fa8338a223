"""What the procedural source builds: recipes that compose a few touching parts into an object, in numpy alone.

A recipe takes a generator and returns 1 to 9 parts in a space of about two units, z up, standing near z = 0. Parts that
belong together overlap by a little, so that nothing floats, and never share a face, so that nothing flickers. A
part names its material by role; boolean cuts and wireframes are only described here and carried out in Blender.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from render.procedural_shapes import (
    TAU,
    Mesh,
    around,
    blob,
    box,
    circle,
    cylinder,
    height_field,
    join,
    lathe,
    mirrored,
    polar,
    prism,
    rounded_rectangle,
    sphere,
    spline,
    superquadric,
    torus,
    tube,
)
from render.procedural_solids import Rng, affordable, some_outline, some_profile, some_rock, some_solid

MAIN, SECOND, ACCENT, TRIM = range(4)  # roles of materials; TRIM is plain


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A mesh of one material, with what is still to be done to it.

    Attributes:
        mesh: the uncut solid.
        material: role of its material.
        cutters: closed solids to take away from it.
        cut_material: role of the material of the cut faces.
        wire: thickness of the bars if only the edges are to remain, else 0.
    """

    mesh: Mesh
    material: int
    cutters: tuple[Mesh, ...] = ()
    cut_material: int = TRIM
    wire: float = 0.0


def totem(rng: Rng) -> list[Part]:
    """Three to six solids on top of one another, wide and narrow in turn, sometimes with ears or arms."""
    parts, z = [], 0.0
    count = int(rng.integers(3, 7))
    for i in range(count):
        height, width = rng.uniform(0.3, 0.65), rng.uniform(0.45, 1.0) * (1 if i % 2 == 0 else 0.75)
        piece = some_solid(rng).turned("z", rng.uniform(0, TAU)).fitted(width, width * rng.uniform(0.8, 1), height)
        parts.append(Part(piece.moved(z=z), (MAIN, SECOND, ACCENT)[(i + count) % 3]))
        if rng.random() < 0.3:
            arm = tube(spline(np.array([[0, 0, 0], [width * 0.6, 0, 0], [width * 0.8, 0, 0.3]]), 14), 0.07)
            parts.append(Part(mirrored(arm).moved(z=z + height / 2), TRIM))
        z += height * 0.9
    return parts[:9]


def vase(rng: Rng) -> list[Part]:
    """A turned vessel with a wall, fluted or plain, with handles, a lid or a foot ring."""
    height = rng.uniform(1.3, 2.0)
    outer = some_profile(rng) * (rng.uniform(0.5, 0.75), height)
    outer = np.concatenate([[[outer[0, 0] * 0.9, 0.0]], outer + np.array([0, 0.02])])
    wall = 0.05
    inner = outer[:3:-1] - (wall, 0)
    profile = np.concatenate([outer, [outer[-1] + (-wall / 2, wall / 2)], np.maximum(inner, (0.02, 0))])
    flutes, depth, turn = int(rng.integers(5, 14)), rng.uniform(0.02, 0.07), rng.uniform(-2.5, 2.5)
    fluted = rng.random() < 0.5
    body = lathe(profile, 96, (lambda a, z: 1 + depth * np.cos(flutes * a + turn * z)) if fluted else None)
    parts = [Part(body, MAIN)]
    top, kind = outer[-1, 0], rng.random()
    if kind < 0.45:
        low, high = (float(np.interp(z, outer[:, 1], outer[:, 0])) for z in (height * 0.35, height * 0.8))
        reach = max(low, high) + rng.uniform(0.15, 0.35)
        knots = np.array([[low - 0.03, 0, 0.35], [reach, 0, 0.45], [reach, 0, 0.7], [high - 0.03, 0, 0.8]])
        handle = tube(spline(knots * (1, 1, height), 24), rng.uniform(0.035, 0.07), 12)
        parts.append(Part(around(handle, int(rng.integers(2, 4))), SECOND))
    if kind > 0.3:
        lid = lathe(np.array([[top * 1.08, 0], [top * 1.1, 0.06], [top * 0.7, 0.16], [0.06, 0.22], [0.0, 0.23]]))
        parts.append(Part(lid.moved(z=height + 0.03), SECOND))
        parts.append(Part(some_solid(rng).fitted(0.22, 0.22, 0.24).moved(z=height + 0.22), ACCENT))
    for share in rng.uniform(0.1, 0.9, int(rng.integers(0, 3))):
        radius = float(np.interp(share * height, outer[:, 1], outer[:, 0]))
        parts.append(Part(torus(radius, 0.045, 64, 12).moved(z=share * height), ACCENT))
    return parts


def machine(rng: Rng) -> list[Part]:
    """A bevelled housing with blocks, cylinders, pipes, a gear and vents on its faces."""
    x, y, z = rng.uniform(0.8, 1.5), rng.uniform(0.7, 1.2), rng.uniform(0.5, 1.1)
    slots = [box(0.05, 2 * y, z * 0.5, 0.005).moved(x=s, z=z * 0.28) for s in np.arange(-2, 3) * 0.12]
    vented = rng.random() < 0.5
    parts = [Part(box(x, y, z, rng.uniform(0.02, 0.12)), MAIN)]
    if vented:  # vents run through a block of their own, so that the housing keeps its mass
        grille = box(0.75, y * 0.4, z * 0.8, 0.03).moved(z=0.08, y=-y * 0.42)
        cuts = tuple(slot.moved(y=-y * 1.45) for slot in slots)
        parts.append(Part(grille, SECOND, cutters=cuts))
    blocks = []
    for _ in range(int(rng.integers(1, 4))):
        width, depth, height = rng.uniform(0.25, 0.6, 3)
        block = box(width, depth, height, 0.03)
        blocks.append(block.moved(rng.uniform(-0.4, 0.4) * x, rng.uniform(-0.4, 0.4) * y, z - 0.06))
    parts.append(Part(join(blocks), SECOND))
    stack = cylinder(rng.uniform(0.1, 0.22), rng.uniform(0.4, 0.9)).moved(rng.uniform(-0.3, 0.3) * x, 0.2 * y, z - 0.05)
    parts.append(Part(stack, ACCENT))
    teeth = int(rng.integers(9, 16))
    gear = prism(polar(lambda a: 1 + 0.08 * np.tanh(5 * np.sin(teeth * a)), 12 * teeth) * 0.33, 0.16, 0.02)
    gear = join([gear, cylinder(0.1, 0.28, 0.02).with_slot(0)]).turned("y", np.pi / 2)
    parts.append(Part(gear.moved(x / 2 - 0.04, rng.uniform(-0.15, 0.15) * y, z * 0.5), ACCENT))
    if rng.random() < 0.75:
        high = z * rng.uniform(1.2, 1.7)
        knots = np.array([[-x / 2 + 0.1, 0, z * 0.3], [-x / 2 - 0.25, 0, z * 0.4], [-x / 2 - 0.2, 0, high],
                          [-x * 0.2, 0.0, high], [-x * 0.15, 0.0, z - 0.05]])  # fmt: skip
        pipe = tube(spline(knots, 40), rng.uniform(0.05, 0.1), 16)
        parts.append(Part(pipe.moved(y=rng.uniform(-0.2, 0.2) * y), TRIM))
    foot = cylinder(0.09, 0.2) if rng.random() < 0.5 else cylinder(0.2, 0.14).turned("x", np.pi / 2).moved(y=0.07)
    feet = [foot.moved(sx * x * 0.36, sy * y * 0.4, -0.12) for sx in (-1, 1) for sy in (-1, 1)]
    parts.append(Part(join(feet), TRIM))
    return parts


def terrain(rng: Rng) -> list[Part]:
    """A slab with a landscape on top, framed, with towers, trees or stones that stand in it."""
    n, size = 80, 1.9
    axis = np.linspace(-1, 1, n)
    x, y = np.meshgrid(axis, axis)
    heights = np.zeros((n, n))
    for octave in range(5):
        waves, phase = rng.normal(0, 2.2 * 1.8**octave, (4, 2)), rng.uniform(0, TAU, 4)
        heights += np.sin(x[..., None] * waves[:, 0] + y[..., None] * waves[:, 1] + phase).sum(-1) / 2.0**octave
    kind = int(rng.integers(4))
    if kind == 1:
        heights = -np.abs(heights)  # ridges
    elif kind == 2:
        heights = np.round(heights * 1.1) + 0.15 * heights  # terraces
    elif kind == 3:
        radius = np.hypot(x, y)
        heights = 0.35 * heights + 5 * np.exp(-4 * radius**2) - 3.5 * np.exp(-30 * radius**2)  # volcano
    heights = (heights - heights.min()) / np.ptp(heights) * rng.uniform(0.35, 0.8) + 0.18
    parts = [Part(height_field(heights, size, size), MAIN)]
    parts.append(Part(box(size + 0.12, size + 0.12, 0.2, 0.03).moved(z=-0.06), SECOND))
    for role in (SECOND, ACCENT):
        if rng.random() < 0.75:
            prop, things = some_solid(rng), []
            for _ in range(affordable(prop, int(rng.integers(2, 7)))):
                i, j = rng.integers(8, n - 8, 2)
                width, height = rng.uniform(0.12, 0.28), rng.uniform(0.15, 0.6)
                place = (axis[j] * size / 2, axis[i] * size / 2, heights[i - 3 : i + 4, j - 3 : j + 4].min() - 0.04)
                things.append(prop.fitted(width, width, height).moved(*place))
            parts.append(Part(join(things), role))
    return parts


def caged(rng: Rng) -> list[Part]:
    """A solid inside a wireframe cage on a base, or hung in it by an axle."""
    kind = int(rng.integers(4))
    core = some_solid(rng).fitted(1.0, 1.0, 1.0).moved(z=-0.5)
    if kind == 0:
        frame = blob(lambda d: np.full(len(d), 0.95), int(rng.integers(2, 5)))
    elif kind == 1:
        frame = prism(circle(int(rng.integers(4, 10))) * 0.85, 1.5, rows=int(rng.integers(1, 4))).moved(z=-0.75)
    elif kind == 2:
        frame = lathe(some_profile(rng, 0.5)[::8] * (0.9, 1.6), int(rng.integers(5, 11))).moved(z=-0.8)
    else:
        frame = torus(0.78, 0.24, int(rng.integers(8, 16)), int(rng.integers(4, 7)))
    parts = [Part(core, MAIN), Part(frame, SECOND, wire=rng.uniform(0.05, 0.11))]
    low, high = frame.bounds[:, 2]
    # The pole carries the core, the pedestal most frames; what lies round the core hangs on a bar.
    low, high = min(low, -0.6), max(high, 0.5)
    pole = cylinder(0.07, high - low + 0.2).moved(z=low - 0.1)
    bar = cylinder(0.06, 1.6).moved(z=-0.8).turned("x", np.pi / 2)
    ringed = rng.random() < 0.5
    parts.append(Part(join([pole, bar]) if ringed or kind == 3 else pole, TRIM))
    foot = np.linalg.norm(frame.vertices[frame.vertices[:, 2] < low + 0.1, :2], axis=1)
    width = max(0.7, 1.1 * float(foot.max(initial=0.0)))
    parts.append(Part(prism(some_outline(rng) * width, 0.25, 0.05).moved(z=low - 0.17), ACCENT))
    if ringed:
        parts.append(Part(torus(0.72, 0.07), ACCENT))
    return parts


def carved(rng: Rng) -> list[Part]:
    """A solid with holes and notches cut out of it, whose inside has another material, and at times a core."""
    kind = int(rng.integers(4))
    if kind == 0:
        body = box(1.4, 1.4, 1.4, rng.uniform(0.03, 0.25)).moved(z=-0.7)
    elif kind == 1:
        body = superquadric(rng.uniform(2, 6), rng.uniform(2, 6), 28).scaled(0.85)
    elif kind == 2:
        body = prism(some_outline(rng) * 0.85, 1.3, 0.06, rows=10, twist_rad=rng.uniform(-0.8, 0.8)).moved(z=-0.65)
    else:
        body = lathe(some_profile(rng, 0.6)).fitted(1.5, 1.5, 1.6).moved(z=-0.8)
    cutters = []
    for axis in ("y", *rng.permutation(["x", "z"])[: int(rng.integers(0, 3))]):
        drill = prism(some_outline(rng) * rng.uniform(0.25, 0.45), 3).moved(z=-1.5).turned("z", rng.uniform(0, TAU))
        cutters.append(drill if axis == "z" else drill.turned("x" if axis == "y" else "y", np.pi / 2))
    for _ in range(int(rng.integers(1, 5))):
        place = body.vertices[int(rng.integers(len(body.vertices)))] * rng.uniform(0.8, 1.0)
        bite = sphere(rng.uniform(0.25, 0.5), 14) if rng.random() < 0.6 else box(0.6, 0.6, 0.6, 0.02).moved(z=-0.3)
        cutters.append(bite.turned("x", rng.uniform(0, TAU)).shifted(place))
    parts = [Part(body, MAIN, cutters=tuple(cutters), cut_material=int(rng.choice([SECOND, ACCENT])))]
    low = body.bounds[0, 2]
    if rng.random() < 0.6:
        parts.append(Part(some_solid(rng).fitted(0.7, 0.7, 1.2).moved(z=low - 0.05), ACCENT))
    parts.append(Part(prism(some_outline(rng) * 0.8, 0.22, 0.05).moved(z=low - 0.16), SECOND))
    return parts


def tower(rng: Rng) -> list[Part]:
    """A tall twisted loft with rings, buttresses and a crown."""
    outline, height = some_outline(rng), rng.uniform(1.5, 2.1)
    top, twist = rng.uniform(0.45, 1.0), rng.uniform(-3.5, 3.5)
    outline = outline * 0.5
    bulge = rng.uniform(-0.3, 0.2)
    shaft = prism(outline, height, 0.03, rows=40, twist_rad=twist, top=top, bulge=bulge)
    parts = [Part(shaft, MAIN)]
    parts.append(Part(prism(some_outline(rng) * 0.68, 0.2, 0.05).moved(z=-0.1), SECOND))
    roof = lathe(np.array([[0.62, 0], [0.66, 0.08], [0.3, 0.3], [0.12, 0.6], [0, 0.66]]) * rng.uniform(0.7, 1.2, 2))
    cap = roof if rng.random() < 0.5 else some_solid(rng).fitted(0.8 * top, 0.8 * top, 0.6)
    parts.append(Part(cap.moved(z=height - 0.06), SECOND))
    reach = np.linalg.norm(outline, axis=1)

    def radius(share: float) -> float:  # between the valleys and the ridges of the shaft, so that rings bite into it
        wide = 0.3 * float(reach.min()) + 0.7 * float(reach.max())
        return wide * float(1 + (top - 1) * share + bulge * np.sin(np.pi * share))

    if rng.random() < 0.6:
        shares = rng.uniform(0.1, 0.9, int(rng.integers(1, 4)))
        parts.append(Part(join([torus(radius(s), 0.07, 64, 14).moved(z=height * s) for s in shares]), ACCENT))
    if rng.random() < 0.5:
        knots = np.array([[0.9, 0, -0.08], [0.75, 0, 0.3], [0.7 * radius(0.5), 0, height * 0.5]])
        parts.append(Part(around(tube(spline(knots, 16), 0.06), int(rng.integers(3, 7))), TRIM))
    return parts


def creature(rng: Rng) -> list[Part]:
    """A mirrored animal or robot: body, head, legs, eyes, and at times horns, a tail or back plates."""
    length, width, leg = rng.uniform(0.9, 1.5), rng.uniform(0.5, 0.85), rng.uniform(0.25, 0.7)
    body = superquadric(rng.uniform(1.8, 5), rng.uniform(1.8, 5)) if rng.random() < 0.6 else some_rock(rng)
    body = body.fitted(width, length, width * rng.uniform(0.8, 1.1)).moved(z=leg)
    middle, half = leg + body.bounds[1, 2] / 2 - leg / 2, length / 2
    head_size = rng.uniform(0.4, 0.65)
    rise = rng.uniform(0.0, 0.45)
    head = superquadric(rng.uniform(1.8, 5), rng.uniform(1.8, 5), 16).scaled(head_size / 2)
    at = (0.0, -half - head_size * 0.15, middle + rise)
    neck = tube(
        spline(np.array([[0, -half * 0.5, middle], [0, -half * 0.8, middle + rise * 0.4], at]), 16), head_size * 0.3
    )
    parts = [Part(body, MAIN), Part(join([head.moved(*at), neck]), SECOND)]
    knee = rng.uniform(-0.15, 0.15)
    limb = np.array([[width * 0.3, 0, leg + 0.25], [width * 0.45, knee, leg * 0.5], [width * 0.45, 0, 0.0]])
    pairs = int(rng.integers(1, 4)) + 1
    legs = [
        tube(spline(limb, 14), np.linspace(0.12, 0.08, 14), 12).moved(y=s)
        for s in np.linspace(-0.3, 0.3, pairs) * length
    ]
    parts.append(Part(mirrored(join(legs)), SECOND))
    feet = [
        box(0.22, 0.28, 0.1, 0.03).moved(width * 0.45, s - 0.04, -0.05) for s in np.linspace(-0.3, 0.3, pairs) * length
    ]
    parts.append(Part(mirrored(join(feet)), TRIM))
    eye = sphere(head_size * 0.16, 8).moved(
        at[0] + head_size * 0.25, at[1] - head_size * 0.38, at[2] + head_size * 0.15
    )
    parts.append(Part(mirrored(eye), ACCENT))
    _, y, z = at
    horn = np.array(
        [[0.1, y, z + head_size * 0.3], [0.28, y - 0.05, z + 0.5], [0.25, y - 0.25, z + rng.uniform(0.6, 0.8)]]
    )
    if rng.random() < 0.65:
        parts.append(Part(mirrored(tube(spline(horn, 14), np.linspace(0.07, 0.02, 14), 10)), TRIM))
    if rng.random() < 0.6:
        tail = np.array(
            [[0, half * 0.8, middle], [0, half + 0.3, middle + 0.1], [0, half + 0.4, middle + rng.uniform(-0.4, 0.6)]]
        )
        parts.append(Part(tube(spline(tail, 20), np.linspace(0.14, 0.04, 20), 12), ACCENT))
    if rng.random() < 0.6:
        plate = prism(circle(3) * 0.2, 0.07, 0.015).turned("x", np.pi / 2).turned("z", np.pi / 2).turned("x", np.pi / 2)
        top = body.bounds[1, 2]
        plates = [plate.moved(y=s, z=top - 0.02 - 0.25 * (s / half) ** 2) for s in np.linspace(-0.6, 0.6, 5) * half]
        parts.append(Part(join(plates), ACCENT))
    return parts


def furniture(rng: Rng) -> list[Part]:
    """A table, chair, stool, shelf or lamp."""
    kind = int(rng.integers(3))
    if kind == 0:
        return _seat(rng)
    if kind == 1:
        return _shelf(rng)
    reach = rng.uniform(0.9, 1.5)
    foot = prism(some_outline(rng) * 0.45, 0.14, 0.04)
    bend = np.array([[0, 0, 0.05], [0, 0, reach * 0.5], [rng.uniform(-0.2, 0.2), 0, reach]])
    profile = np.array([[0.5, 0], [0.46, 0.12], [0.3, 0.4], [0.16, 0.5], [0.0, 0.52]]) * rng.uniform(0.8, 1.3, 2)
    shade = (
        lathe(spline(profile, 24).clip(0)) if rng.random() < 0.5 else prism(some_outline(rng) * 0.5, 0.5, 0.03, top=0.6)
    )
    parts = [Part(foot, SECOND), Part(tube(spline(bend, 20), 0.05), TRIM)]
    parts.append(Part(shade.moved(bend[-1, 0], 0, reach - 0.15), MAIN))
    knob = some_solid(rng).fitted(0.3, 0.3, 0.35).moved(z=0.1)
    parts.append(Part(knob, ACCENT))
    return parts


def _seat(rng: Rng) -> list[Part]:
    """Return a table, chair or stool with turned or square legs."""
    x, y, z = rng.uniform(0.8, 1.6), rng.uniform(0.8, 1.3), rng.uniform(0.6, 1.0)
    round_top = rng.random() < 0.4
    top = prism(some_outline(rng) * (x / 2, y / 2), 0.14, 0.03) if round_top else box(x, y, 0.14, 0.04)
    spread = 0.3 if round_top else 0.42
    turned = lathe(some_profile(rng) * (0.1, z), 24) if rng.random() < 0.5 else box(0.13, 0.13, z, 0.02)
    legs = [turned.moved(sx * x * spread, sy * y * spread) for sx in (-1, 1) for sy in (-1, 1)]
    parts = [Part(top.moved(z=z - 0.03), MAIN), Part(join(legs), SECOND)]
    rails = [box(x * spread * 2, 0.06, 0.08, 0.01).moved(y=s * y * spread, z=z * 0.35) for s in (-1, 1)]
    parts.append(Part(join(rails), TRIM))
    kind = rng.random()
    if kind < 0.55:  # back rest and cushion
        back = box(x * 0.9, 0.1, rng.uniform(0.6, 0.9), 0.04)
        holes = tuple(box(0.1, 1, 0.35, 0.0).moved(x=s * x, z=0.16) for s in (-0.25, 0, 0.25))
        cut = back.turned("x", -0.12).moved(y=y * spread, z=z + 0.02)
        parts.append(Part(cut, SECOND, cutters=tuple(h.moved(y=y * spread, z=z) for h in holes)))
        parts.append(Part(superquadric(5, 2.5).fitted(x * 0.75, y * 0.7, 0.2).moved(z=z + 0.06), ACCENT))
    else:
        for role, side in ((ACCENT, -0.2), (SECOND, 0.22)):
            thing = some_solid(rng).fitted(0.35, 0.35, rng.uniform(0.3, 0.6))
            parts.append(Part(thing.moved(side * x, rng.uniform(-0.15, 0.15) * y, z + 0.1), role))
    return parts


def _shelf(rng: Rng) -> list[Part]:
    """Return a shelf or cabinet with boards, a back and things on the boards."""
    x, y, z, levels = rng.uniform(0.9, 1.4), rng.uniform(0.4, 0.6), rng.uniform(1.2, 1.9), int(rng.integers(2, 5))
    sides = [box(0.08, y, z, 0.015).moved(x=s * x / 2) for s in (-1, 1)]
    gap = (z - 0.2) / levels
    boards = [box(x, y * 0.97, 0.07, 0.01).moved(z=0.08 + gap * i) for i in range(levels + 1)]
    parts = [Part(join(sides), MAIN), Part(join(boards), SECOND)]
    parts.append(Part(box(x, 0.05, z * 0.97, 0.01).moved(y=y / 2 - 0.04, z=0.03), ACCENT))
    for role in (ACCENT, MAIN, SECOND):
        things, prop = [], some_solid(rng)
        for level in rng.permutation(levels)[: affordable(prop, levels)]:
            if rng.random() < 0.85:
                width = rng.uniform(0.18, 0.32)
                thing = prop.fitted(width, width, gap * rng.uniform(0.4, 0.8))
                side = (role - 1) * x * 0.3
                things.append(thing.moved(side, -0.03, 0.14 + gap * level))
        if things:
            parts.append(Part(join(things), role))
    return parts


def radial(rng: Rng) -> list[Part]:
    """A hub with blades, petals or arms about it: flower, turbine, crown, star fish."""
    count = int(rng.integers(3, 11))
    hub = some_solid(rng).fitted(0.65, 0.65, rng.uniform(0.4, 0.9))
    middle = hub.bounds[1, 2] / 2
    kind = int(rng.integers(4))
    if kind == 0:  # blades
        blade = box(0.85, rng.uniform(0.2, 0.5), 0.07, 0.02).moved(x=0.55).turned("x", rng.uniform(0.3, 1.0))
    elif kind == 1:  # petals
        blade = (
            superquadric(2, 2, 12)
            .scaled(0.45, rng.uniform(0.12, 0.3), 0.07)
            .moved(x=0.55)
            .turned("y", rng.uniform(-0.9, 0.3))
        )
    elif kind == 2:  # tentacles
        knots = np.array(
            [[0.1, 0, 0], [0.6, 0.1, 0.1], [0.9, 0.3, rng.uniform(-0.3, 0.4)], [1, 0.6, rng.uniform(-0.5, 0.7)]]
        )
        blade = tube(spline(knots, 30), np.linspace(0.14, 0.03, 30), 14)
    else:  # spokes with ends
        spoke = tube(np.array([[0.1, 0, 0], [0.5, 0, 0], [0.9, 0, 0]]), 0.06)
        blade = join([spoke, some_solid(rng).fitted(0.3, 0.3, 0.3).moved(0.9, 0, -0.15)])
        count = max(2, affordable(blade, count, 20_000))
    parts = [Part(hub, MAIN), Part(around(blade, count).moved(z=middle), SECOND)]
    if rng.random() < 0.5:
        parts.append(Part(torus(rng.uniform(0.45, 0.95), 0.06).moved(z=middle), ACCENT))
    else:
        parts.append(Part(sphere(0.24).moved(z=hub.bounds[1, 2]), ACCENT))
    if rng.random() < 0.6:  # stand it up on a pole
        parts = [Part(p.mesh.moved(z=-middle).turned("x", np.pi / 2).moved(z=1.3), p.material) for p in parts]
        parts.append(Part(tube(np.array([[0, 0.12, -0.1], [0, 0.12, 0.6], [0, 0.1, 1.3]]), 0.08), TRIM))
        parts.append(Part(prism(some_outline(rng) * 0.55, 0.2, 0.05).moved(y=0.12, z=-0.15), ACCENT))
    return parts


def knot(rng: Rng) -> list[Part]:
    """A knotted, coiled or interlocked tube on a pedestal."""
    kind = int(rng.integers(3))
    t = np.arange(220) * TAU / 220
    thick = rng.uniform(0.09, 0.17)
    if kind == 0:
        p, q = ((2, 3), (3, 2), (2, 5), (3, 4))[int(rng.integers(4))]
        radius = 0.6 + 0.26 * np.cos(q * t)
        path = np.stack([radius * np.cos(p * t), radius * np.sin(p * t), 0.3 * np.sin(q * t)], -1)
        main = tube(path, min(thick, 0.13), 18, loop=True).turned("x", np.pi / 2)
    elif kind == 1:
        turns = rng.uniform(2.5, 4.5)
        radius = 0.6 * np.linspace(1, rng.uniform(0.3, 1), 220)
        path = np.stack([radius * np.cos(turns * t), radius * np.sin(turns * t), np.linspace(-0.7, 0.7, 220)], -1)
        main = tube(path, min(thick, 0.13), 18)
    else:
        ring = torus(0.55, thick)
        main = join([ring.turned("x", np.pi / 2), ring.moved(x=1.1 - 1.9 * thick)]).moved(x=-0.15)
    low, high = main.bounds[:, 2]
    parts = [Part(main, MAIN)]
    stand = prism(
        some_outline(rng) * 0.75, 0.42, 0.06, rows=10, twist_rad=rng.uniform(-0.8, 0.8), top=rng.uniform(0.8, 1.1)
    )
    parts.append(Part(stand.moved(z=low - 0.36), SECOND))
    parts.append(Part(prism(some_outline(rng) * 0.75, 0.16, 0.04).moved(z=low - 0.5), TRIM))
    if kind == 1:
        parts.append(Part(some_solid(rng).fitted(0.55, 0.55, high - low).moved(z=low - 0.05), ACCENT))
    elif rng.random() < 0.6:
        top = main.vertices[int(np.argmax(main.vertices[:, 2]))]
        parts.append(Part(some_rock(rng, 14).scaled(0.25).shifted(top), ACCENT))
    return parts


def assembly(rng: Rng) -> list[Part]:
    """Random solids that grow out of one another in any direction, after LRM-Zero (arXiv 2406.09371)."""
    meshes = [some_solid(rng).fitted(0.9, 0.9, 0.9).moved(z=-0.45).turned("x", rng.uniform(0, TAU))]
    for _ in range(int(rng.integers(2, 7))):
        host = meshes[int(rng.integers(len(meshes)))]
        anchor = host.vertices[int(rng.integers(len(host.vertices)))]
        size = rng.uniform(0.3, 0.8, 3)
        piece = some_solid(rng).fitted(*(float(s) for s in size)).moved(z=-size[2] / 2)
        piece = piece.turned("x", rng.uniform(0, TAU)).turned("z", rng.uniform(0, TAU))
        meshes.append(piece.moved(*(anchor * 0.92)))
    parts = [Part(mesh, i % 4 if i else MAIN) for i, mesh in enumerate(meshes)]
    if rng.random() < 0.5:
        frame = some_solid(rng).fitted(1.0, 1.0, 1.0).moved(z=-0.5)
        bite = sphere(0.4, 12).moved(*rng.uniform(-0.5, 0.5, 3))
        parts[0] = Part(frame, MAIN, cutters=(bite,), cut_material=ACCENT)
    return parts


def castle(rng: Rng) -> list[Part]:
    """Walls with battlements and a gate, corner towers with roofs, and a keep."""
    x, y, z = rng.uniform(1.1, 1.6), rng.uniform(1.1, 1.6), rng.uniform(0.4, 0.7)
    wall = box(x, y, z, 0.01)
    teeth = [box(0.12, 3, 0.2, 0.0).moved(x=s * x, z=z - 0.1) for s in (-0.3, -0.1, 0.1, 0.3)]
    teeth += [box(3, 0.12, 0.2, 0.0).moved(y=s * y, z=z - 0.08) for s in (-0.3, -0.1, 0.1, 0.3)]
    court = box(x - 0.2, y - 0.2, z, 0.0).moved(z=0.1)
    gate = join([box(0.3, 0.5, 0.25, 0.0)]).moved(y=-y / 2, z=0.02)
    parts = [Part(wall, MAIN, cutters=(court, *teeth, gate), cut_material=MAIN)]
    radius, height = rng.uniform(0.16, 0.26), z + rng.uniform(0.15, 0.6)
    sides = int(rng.choice([4, 6, 8, 32]))
    shaft = prism(circle(sides) * radius, height, 0.02, top=rng.uniform(0.8, 1.1))
    roof = prism(circle(sides) * radius * 1.25, rng.uniform(0.3, 0.6), rows=4, top=0.08).moved(z=height - 0.02)
    places = [(sx * x / 2, sy * y / 2) for sx in (-1, 1) for sy in (-1, 1)]
    parts.append(Part(join([shaft.moved(*place) for place in places]), SECOND))
    parts.append(Part(join([roof.moved(*place) for place in places]), ACCENT))
    keep = rng.uniform(0.7, 1.2)
    parts.append(Part(prism(some_outline(rng) * 0.36, keep, 0.02, rows=8, top=0.85).moved(z=0.05), SECOND))
    parts.append(Part(lathe(np.array([[0.4, 0], [0.42, 0.04], [0.05, 0.55], [0, 0.56]])).moved(z=keep), ACCENT))
    parts.append(Part(prism(some_outline(rng) * 1.25, 0.16, 0.05).moved(z=-0.12), ACCENT))
    return parts


def vehicle(rng: Rng) -> list[Part]:
    """A car, cart or rover: hull, cabin, wheels, lamps and a load."""
    length, width, wheel = rng.uniform(1.4, 1.9), rng.uniform(0.7, 0.95), rng.uniform(0.18, 0.32)
    height = rng.uniform(0.28, 0.5)
    hull = box(width, length, height, rng.uniform(0.04, 0.14)).moved(z=wheel * 0.9)
    top = wheel * 0.9 + height
    cabin = prism(rounded_rectangle(width * 0.85, length * rng.uniform(0.35, 0.6), 0.1), rng.uniform(0.3, 0.5), 0.05,
                  rows=3, top=rng.uniform(0.6, 0.95))  # fmt: skip
    shift = rng.uniform(-0.15, 0.15) * length
    parts = [Part(hull, MAIN), Part(cabin.moved(y=shift, z=top - 0.05), SECOND)]
    axles = np.linspace(-0.34, 0.34, int(rng.integers(2, 5))) * length
    rim = np.array(
        [[0.05, -0.02], [0.55, -0.02], [0.62, 0.06], [0.8, 0.0], [0.98, 0.08], [1.0, 0.3], [0.9, 0.5], [0.0, 0.5]]
    )
    disc = lathe(rim * (wheel, 0.4), 40).turned("y", -np.pi / 2).moved(x=width / 2 + 0.12)
    wheels = [disc.moved(y=float(a), z=wheel) for a in axles]
    parts.append(Part(mirrored(join(wheels)), TRIM if rng.random() < 0.4 else ACCENT))
    lamp = sphere(0.09, 8).moved(width * 0.3, -length / 2, wheel + height * 0.5)
    parts.append(Part(mirrored(lamp), ACCENT))
    if rng.random() < 0.8:
        load = some_solid(rng).fitted(width * 0.6, width * 0.6, rng.uniform(0.3, 0.7))
        parts.append(Part(load.moved(y=length * 0.3, z=top - 0.05), ACCENT))
    if rng.random() < 0.5:
        pipe = tube(spline(np.array([[0.25, 0.3, 0], [0.3, 0.35, 0.4], [0.25, 0.6, 0.7]]) * (1, 0.8, 1), 16), 0.06)
        parts.append(Part(mirrored(pipe).moved(z=top - 0.08), TRIM))
    return parts


def plant(rng: Rng) -> list[Part]:
    """A potted tree, cactus or mushroom."""
    pot = lathe(np.array([[0.32, 0], [0.45, 0.45], [0.5, 0.46], [0.5, 0.58], [0.4, 0.58], [0.38, 0.5], [0.0, 0.5]]))
    parts = [Part(pot, MAIN)]
    lean, height = rng.uniform(-0.2, 0.2, 2), rng.uniform(0.5, 0.9)
    trunk = np.array([[0, 0, 0.4], [lean[0], lean[1], 0.5 + height / 2], [0, 0, 0.5 + height]])
    kind = int(rng.integers(3))
    if kind == 0:  # crown of lumps
        parts.append(Part(tube(spline(trunk, 16), np.linspace(0.11, 0.07, 16)), TRIM))
        lumps = []
        for _ in range(int(rng.integers(2, 6))):
            middle = rng.uniform(-0.25, 0.25, 3) + np.array([0, 0, height + 0.7])
            lumps.append(some_rock(rng, 12).scaled(rng.uniform(0.28, 0.45)).shifted(middle))
        parts.append(Part(join(lumps), SECOND))
        fruit = [sphere(0.09, 6).moved(*(lump.vertices[int(rng.integers(len(lump.vertices)))])) for lump in lumps]
        parts.append(Part(join(fruit), ACCENT))
        return parts
    if kind == 1:  # cactus
        ribs = int(rng.integers(7, 13))
        profile = np.array([[0.2, 0], [0.25, 0.4], [0.24, 0.8], [0.15, 1.05], [0.0, 1.12]]) * (1, height + 0.3)
        body = lathe(spline(profile, 30).clip(0), 96, lambda a, _: 1 + 0.1 * np.cos(ribs * a)).moved(z=0.45)
        knots = np.array([[0.15, 0, 0], [0.45, 0, 0.02], [0.5, 0, 0.4]])
        arms = [tube(spline(knots, 20), 0.1, 14).turned("z", rng.uniform(0, TAU)).moved(z=rng.uniform(0.8, 1.1))
                for _ in range(int(rng.integers(1, 4)))]  # fmt: skip
        top = body.bounds[1, 2]
        flower = around(superquadric(2, 2, 8).scaled(0.14, 0.06, 0.03).moved(x=0.12).turned("y", -0.5), 6).moved(z=top)
        return [*parts, Part(join([body, *arms]), SECOND), Part(flower, ACCENT)]
    caps, stems = [], []
    for i in range(int(rng.integers(1, 4))):  # mushrooms
        size, z = (
            rng.uniform(0.4, 0.7) * (1 if i == 0 else 0.6),
            0.6 + height * (1 if i == 0 else rng.uniform(0.4, 0.7)),
        )
        x, y = (0.0, 0.0) if i == 0 else rng.uniform(-0.28, 0.28, 2)
        profile = np.array([[0.1, 0.1], [0.8, 0.0], [1.0, 0.06], [0.85, 0.4], [0.4, 0.66], [0.0, 0.72]])
        caps.append(lathe(spline(profile, 28).clip(0) * size).moved(x, y, z - 0.1))
        stems.append(tube(np.array([[x, y, 0.4], [x, y, 0.8], [x, y, z]]), size * 0.22))
    return [*parts, Part(join(caps), SECOND), Part(join(stems), ACCENT)]


RECIPES: tuple[Callable[[Rng], list[Part]], ...] = (
    totem, vase, machine, terrain, caged, carved, tower, creature, furniture, radial, knot, assembly, castle, vehicle,
    plant,
)  # fmt: skip
