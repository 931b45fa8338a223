"""Materials that show what a surface is instead of how it is lit, for as long as a context is open.

Coverage, depth, normals and base colour must not depend on light, angle, or on what shines through. Each shader that
reflects or transmits is replaced by an emission of its base colour, and each alpha by a step: a surface is there or it
is not. Cycles' own passes make metals black, half-transparent surfaces vanish or count twice, and glass a hole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from render.materials import reachable_nodes

_COLOUR_INPUTS = ("Base Color", "Color")
_UNKNOWN_COLOUR = (0.5, 0.5, 0.5, 1.0)

Undo = Callable[[], None]


@contextmanager
def bare_surfaces(materials: Iterable[Any], threshold: float) -> Iterator[None]:
    """Show base colours as light, opaque where alpha exceeds `threshold` and absent elsewhere.

    Radiance is then the base colour, scene-linear, in [0, 1], and the film's alpha is coverage: it no longer depends on
    how many layers lie behind each other, and so agrees between views.
    """
    undo: list[Undo] = []
    try:
        for material in materials:
            if material.node_tree is None:
                continue
            undo.append(_no_light_source(material))
            for node in [*reachable_nodes(material)]:
                if node.type == "MIX_SHADER":
                    undo.extend(_step_mix(node, threshold))
                elif _reflects(node):
                    undo.append(_emit(node, threshold))
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _reflects(node: Any) -> bool:
    kind = str(node.type)
    return kind != "BSDF_TRANSPARENT" and (kind.startswith("BSDF_") or kind in ("EMISSION", "SUBSURFACE_SCATTERING"))


def _no_light_source(material: Any) -> Undo:
    """Keep emission from being sampled as light: a tree over all triangles would be built for nothing."""
    settings, before = material.cycles, material.cycles.emission_sampling
    settings.emission_sampling = "NONE"

    def restore() -> None:
        settings.emission_sampling = before

    return restore


def _emit(node: Any, threshold: float) -> Undo:
    """Put an emission of a shader's colour in its place, behind a step of its alpha if it has one."""
    tree = node.id_data
    made = [tree.nodes.new("ShaderNodeEmission")]
    colour = next((node.inputs[name] for name in _COLOUR_INPUTS if name in node.inputs), None)
    _copy_input(tree, colour, made[0].inputs["Color"])
    shader = made[0].outputs[0]
    alpha = node.inputs["Alpha"] if node.type == "BSDF_PRINCIPLED" else None
    if alpha is not None and (alpha.is_linked or alpha.default_value < 1):
        clear, mix, step = (tree.nodes.new(f"ShaderNode{name}") for name in ("BsdfTransparent", "MixShader", "Math"))
        made += [clear, mix, step]
        step.operation = "GREATER_THAN"
        step.inputs[1].default_value = threshold
        _copy_input(tree, alpha, step.inputs[0])
        tree.links.new(step.outputs[0], mix.inputs[0])
        tree.links.new(clear.outputs[0], mix.inputs[1])
        tree.links.new(shader, mix.inputs[2])
        shader = mix.outputs[0]
    source = node.outputs[0]
    targets = [link.to_socket for link in source.links]
    for target in targets:
        tree.links.new(shader, target)

    def restore() -> None:
        for target in targets:
            tree.links.new(source, target)
        for one in made:
            tree.nodes.remove(one)

    return restore


def _copy_input(tree: Any, source: Any, target: Any) -> None:
    if source is None:
        target.default_value = _UNKNOWN_COLOUR
    elif source.is_linked:
        tree.links.new(source.links[0].from_socket, target)
    else:
        target.default_value = source.default_value


def _step_mix(node: Any, threshold: float) -> list[Undo]:
    """Make a mix with a transparent shader choose one of both; other mixes stay."""
    first, second = (
        any(link.from_node.type == "BSDF_TRANSPARENT" for link in socket.links) for socket in node.inputs[1:3]
    )
    if first == second:
        return []
    return [_step(node.id_data, node.inputs[0], threshold if first else 1 - threshold)]


def _step(tree: Any, socket: Any, threshold: float) -> Undo:
    """Replace a socket's value by whether it exceeds the threshold; return what restores it."""
    if not socket.is_linked:
        before = socket.default_value
        socket.default_value = float(before > threshold)

        def restore_value() -> None:
            socket.default_value = before

        return restore_value
    source = socket.links[0].from_socket
    step = tree.nodes.new("ShaderNodeMath")
    step.operation = "GREATER_THAN"
    step.inputs[1].default_value = threshold
    tree.links.new(source, step.inputs[0])
    tree.links.new(step.outputs[0], socket)

    def restore_link() -> None:
        tree.links.new(source, socket)
        tree.nodes.remove(step)

    return restore_link
