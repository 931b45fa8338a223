"""Random solids, outlines and profiles: the vocabulary of the procedural recipes, in numpy alone."""

from __future__ import annotations

import numpy as np

from render.procedural_shapes import (
    TAU,
    Float64,
    Mesh,
    blob,
    box,
    circle,
    lathe,
    polar,
    prism,
    rounded_rectangle,
    spline,
    superquadric,
    supershape_radius,
)

Rng = np.random.Generator


def some_outline(rng: Rng) -> Float64:
    """Return a random closed outline [n, 2] of radius about 1, star-shaped about the origin."""
    kind = int(rng.integers(6))
    sides = int(rng.integers(3, 9))
    if kind == 0:
        return circle(sides)
    if kind == 1:  # star
        depth = rng.uniform(0.45, 0.75)
        radius = np.where(np.arange(2 * sides) % 2 == 0, 1.0, depth)
        return np.asarray(circle(2 * sides) * radius[:, None])
    if kind == 2:  # gear
        teeth, depth = int(rng.integers(7, 16)), rng.uniform(0.1, 0.22)
        return polar(lambda a: 1 - depth / 2 + depth / 2 * np.tanh(6 * np.sin(teeth * a)), 12 * teeth)
    if kind == 3:
        return rounded_rectangle(rng.uniform(1.3, 2), rng.uniform(1.0, 2), rng.uniform(0.1, 0.45), 6)
    if kind == 4:  # flower
        petals, depth = int(rng.integers(3, 9)), rng.uniform(0.1, 0.28)
        return polar(lambda a: 1 - depth + depth * np.cos(petals * a))
    lobes, n1, n2 = float(rng.integers(3, 8)), rng.uniform(0.6, 3), rng.uniform(0.8, 3)
    shape = polar(lambda a: supershape_radius(a, lobes, n1, n2, n2))
    return np.asarray(shape / np.abs(shape).max())


def some_profile(rng: Rng, wild: float = 1.0) -> Float64:
    """Return a smooth turned profile [m, 2] of (radius, z), z from 0 to 1."""
    knots = int(rng.integers(4, 8))
    radius = rng.uniform(0.55 - 0.35 * wild, 1.0, knots)
    curve = spline(np.stack([radius, np.linspace(0, 1, knots)], -1), 40)
    return np.asarray(np.maximum(curve, [0.12, 0.0]))


def some_rock(rng: Rng, steps: int = 20) -> Mesh:
    """Return a lumpy closed solid of radius about 1."""
    waves, phase = rng.normal(0, 2.2, (7, 3)), rng.uniform(0, TAU, 7)
    depth = rng.uniform(0.03, 0.09)
    return blob(lambda d: np.maximum(1 + depth * np.sin(d @ waves.T + phase).sum(1), 0.4), steps)


def some_solid(rng: Rng) -> Mesh:
    """Return a random closed solid, to be fitted to a size by the caller."""
    kind = int(rng.integers(9))
    if kind == 0:
        return lathe(some_profile(rng))
    if kind == 1:
        return superquadric(rng.uniform(0.8, 6), rng.uniform(0.9, 6))
    if kind == 2:
        return prism(some_outline(rng), rng.uniform(0.6, 1.6), rng.uniform(0.03, 0.15))
    if kind == 3:
        return prism(some_outline(rng), 2, 0.06, rows=28, twist_rad=rng.uniform(-2.5, 2.5), top=rng.uniform(0.4, 1.1))
    if kind == 4:
        return box(rng.uniform(0.6, 1.2), rng.uniform(0.6, 1.2), rng.uniform(0.6, 1.2), rng.uniform(0.02, 0.2))
    if kind == 5:
        return some_rock(rng)
    if kind == 6:
        flutes, depth, turn = int(rng.integers(6, 18)), rng.uniform(0.04, 0.12), rng.uniform(-3, 3)
        return lathe(some_profile(rng, 0.6), 96, lambda a, z: 1 + depth * np.cos(flutes * a + turn * z))
    if kind == 7:
        return prism(some_outline(rng), 1, 0.05, rows=16, top=rng.uniform(0.5, 1), bulge=rng.uniform(0.1, 0.5))
    lobes, power = float(rng.integers(3, 7)), rng.uniform(0.8, 2.5)

    def radius(d: Float64) -> Float64:
        flat = supershape_radius(np.arctan2(d[:, 1], d[:, 0]), lobes, power, 1.7, 1.7)
        return flat ** (1 - d[:, 2] ** 2) * supershape_radius(np.arcsin(d[:, 2].clip(-1, 1)), 4, 3, 4, 4)

    return blob(radius, 22)


def affordable(mesh: Mesh, count: int, budget: int = 14_000) -> int:
    """Return how many of `count` copies of a mesh, at least 1, stay within a budget of triangles."""
    return max(1, min(count, budget // mesh.num_triangles))
