"""Write small .blend files, each with one trap in it: `python -m tests.render.blends KIND PATH [EXTRA]`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np


def write_blend(kind: str, path: Path, *extra: str) -> Path:
    """Write the .blend file of a kind in a process of its own, whose temporary files go beside the file."""
    subprocess.run(
        [sys.executable, "-m", "tests.render.blends", kind, str(path), *extra],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=60,
        env=os.environ | {"TMPDIR": str(path.parent)},
    )
    return path


def _cube(name: str, at: Any = (0, 0, 0), size: float = 1.0, collection: Any = None) -> Any:
    import bpy

    bpy.ops.mesh.primitive_cube_add(size=size, location=at)
    obj = bpy.context.object
    obj.name = name
    for old in obj.users_collection:
        old.objects.unlink(obj)
    (collection or bpy.context.scene.collection).objects.link(obj)
    return obj


def _instances(bpy: Any) -> None:
    hidden = bpy.data.collections.new("library")
    _cube("original", collection=hidden)
    for x in (0, 6):
        empty = bpy.data.objects.new("instancer", None)
        empty.instance_type, empty.instance_collection, empty.location = "COLLECTION", hidden, (x, 0, 0)
        bpy.context.scene.collection.objects.link(empty)


def _geometry_nodes(bpy: Any) -> None:
    """A cube whose modifier replaces it by two instances, at x of -3 and 3, of a cube that hides from the render."""
    source = _cube("source", (0, 0, 40))
    source.hide_render = True
    source.data.materials.append(bpy.data.materials.new("of the source"))
    obj = _cube("host")
    tree = bpy.data.node_groups.new("scatter", "GeometryNodeTree")
    tree.interface.new_socket("Geometry", in_out="OUTPUT", socket_type="NodeSocketGeometry")
    line, info = tree.nodes.new("GeometryNodeMeshLine"), tree.nodes.new("GeometryNodeObjectInfo")
    line.mode, line.inputs["Count"].default_value = "END_POINTS", 2
    line.inputs["Start Location"].default_value, line.inputs["Offset"].default_value = (-3, 0, 0), (3, 0, 0)
    info.inputs["Object"].default_value = source
    scatter, out = tree.nodes.new("GeometryNodeInstanceOnPoints"), tree.nodes.new("NodeGroupOutput")
    tree.links.new(line.outputs["Mesh"], scatter.inputs["Points"])
    tree.links.new(info.outputs["Geometry"], scatter.inputs["Instance"])
    tree.links.new(scatter.outputs["Instances"], out.inputs[0])
    obj.modifiers.new("scatter", "NODES").node_group = tree


def _particles(bpy: Any) -> None:
    """Cubes of edge 0.2 on the eight corners of a cube of edge 4 that is itself not shown."""
    grain = _cube("grain", (0, 0, 40), size=0.2)
    grain.hide_render = True
    host = _cube("host", size=4.0)
    host.show_instancer_for_render = host.show_instancer_for_viewport = False
    host.modifiers.new("grains", "PARTICLE_SYSTEM")
    settings = host.particle_systems[0].settings
    settings.type, settings.count, settings.emit_from, settings.use_emit_random = "HAIR", 8, "VERT", False
    settings.render_type, settings.instance_object, settings.particle_size = "OBJECT", grain, 1.0
    settings.use_advanced_hair, settings.hair_length = True, 1.0


def _curves(bpy: Any) -> None:
    bpy.ops.curve.primitive_bezier_circle_add(radius=2.0)
    bpy.context.object.data.bevel_depth = 0.5
    bpy.context.object.data.materials.append(bpy.data.materials.new("ring"))
    bpy.ops.object.text_add(location=(0, 0, 3))
    bpy.context.object.data.extrude = 0.1


def _metaballs(bpy: Any) -> None:
    bpy.ops.object.metaball_add(type="BALL", radius=2.0)
    bpy.ops.object.metaball_add(type="BALL", radius=2.0, location=(1.5, 0, 0))


def _hidden(bpy: Any) -> None:
    scene = bpy.context.scene
    _cube("seen")
    _cube("hidden from render", (30, 0, 0)).hide_render = True
    _cube("hidden from camera rays", (-30, 0, 0)).visible_camera = False
    excluded = bpy.data.collections.new("excluded")
    scene.collection.children.link(excluded)
    _cube("in excluded", (0, 30, 0), collection=excluded)
    bpy.context.view_layer.layer_collection.children["excluded"].exclude = True
    dark = bpy.data.collections.new("dark")
    scene.collection.children.link(dark)
    _cube("in hidden collection", (0, 0, 30), collection=dark)
    dark.hide_render = True
    _cube("hidden from the viewport only", (1, 0, 0)).hide_viewport = True


def _company(bpy: Any) -> None:
    scene = bpy.context.scene
    _cube("seen")
    data = bpy.data.lights.new("Light", "SUN")
    data.energy = 1000
    light = bpy.data.objects.new("Light", data)
    light.location = (50, 0, 0)
    camera = bpy.data.objects.new("Camera", bpy.data.cameras.new("Camera"))
    camera.location, camera.scale = (0, -8, 0), (2, 2, 2)
    for obj in (light, camera):
        scene.collection.objects.link(obj)
    scene.camera = camera
    _cube("held by the camera", (0, 0, 1)).parent = camera
    scene.world = bpy.data.worlds.new("bright")
    scene.world.use_nodes = True
    scene.world.node_tree.nodes["Background"].inputs["Strength"].default_value = 1000
    scene.render.film_transparent = False
    scene.render.resolution_percentage = 50


def _scenes(bpy: Any) -> None:
    """The active scene holds a cube of edge 1 at the origin, the other one a cube of edge 2 at x = 50."""
    other = bpy.data.scenes.new("other")
    _cube("elsewhere", (50, 0, 0), size=2.0, collection=other.collection)
    _cube("here")


def _moving(bpy: Any) -> None:
    """A cube at x = frame from frame 1 to 40, saved at frame 20, and one at rest at z = 3."""
    obj = _cube("mover")
    for frame in (1, 40):
        obj.location = (frame, 0, 0)
        obj.keyframe_insert("location", frame=frame)
    for curve in obj.animation_data.action.layers[0].strips[0].channelbags[0].fcurves:
        for key in curve.keyframe_points:
            key.interpolation = "LINEAR"
    _cube("fixed", (0, 0, 3))
    bpy.context.scene.frame_set(20)


def _late(bpy: Any) -> None:
    """As `moving`, but the file's own range begins at frame 10."""
    _moving(bpy)
    bpy.context.scene.frame_start = 10


def _strip(bpy: Any) -> None:
    """As `moving`, but by an NLA strip that begins at frame 5."""
    _moving(bpy)
    data = bpy.data.objects["mover"].animation_data
    action, data.action = data.action, None
    data.nla_tracks.new().strips.new("moves", 5, action)
    bpy.context.scene.frame_start = 5
    bpy.context.scene.frame_set(24)


def _shape_keys(bpy: Any) -> None:
    """A cube whose key moves it by 4 along x; the key is 0.5 as saved, and animated from 1 (frame 1) to 0.5."""
    obj = _cube("keyed")
    obj.shape_key_add(name="Basis")
    key = obj.shape_key_add(name="along")
    for point in key.data:
        point.co.x += 4
    for frame, value in ((1, 1.0), (20, 0.5)):
        key.value = value
        key.keyframe_insert("value", frame=frame)
    _cube("fixed", (0, 0, 3))
    bpy.context.scene.frame_set(20)


def _colour_changes(bpy: Any) -> None:
    """A cube whose material turns from black to white between frames 1 and 250."""
    material = bpy.data.materials.new("changing")
    material.use_nodes = True
    colour = next(n for n in material.node_tree.nodes if n.type == "BSDF_PRINCIPLED").inputs["Base Color"]
    for frame, value in ((1, 0.0), (250, 1.0)):
        colour.default_value = (value, value, value, 1)
        colour.keyframe_insert("default_value", frame=frame)
    _cube("seen").data.materials.append(material)


def _bones(bpy: Any) -> None:
    """A cube held by one bone, which is posed 5 up at every frame; in rest position it stands at the origin."""
    obj = _cube("skin")
    bpy.ops.object.armature_add()
    rig = bpy.context.object
    group = obj.vertex_groups.new(name=rig.data.bones[0].name)
    group.add(range(8), 1.0, "ADD")
    obj.modifiers.new("rig", "ARMATURE").object = rig
    rig.pose.bones[0].location = (0, 5, 0)  # a bone's y is its length, upright here
    rig.pose.bones[0].keyframe_insert("location", frame=1)
    _cube("fixed", (0, 0, -3))


def _constrained(bpy: Any) -> None:
    """A cube that a constraint holds at another's place: its matrix is stale until the scene is evaluated."""
    target = _cube("target", (7, 0, 0))
    follower = _cube("follower")
    follower.constraints.new("COPY_LOCATION").target = target
    target.hide_render = True
    _cube("fixed", (0, 0, 3))


def _scripts(bpy: Any) -> None:
    _cube("seen")
    mark = sys.argv[3]
    text = bpy.data.texts.new("run.py")
    text.write(f"import pathlib; pathlib.Path({mark!r}).write_text('ran')")
    text.use_module = True
    driver = bpy.context.object.driver_add("location", 0).driver
    driver.expression = f"__import__('pathlib').Path({mark!r}).write_text('ran')"


def _intruder(bpy: Any) -> None:
    """A cube that tries to run scripts and to show a picture from elsewhere; argv[3] is a folder, argv[4] a port."""
    cage, port = sys.argv[3], sys.argv[4]
    _cube("seen")
    act = (
        f"import pathlib, socket; pathlib.Path({cage + '/cuckoo'!r}).write_text('ran'); "
        f"socket.create_connection(('127.0.0.1', {port})).send(b'ran')"
    )
    text = bpy.data.texts.new("run.py")
    text.write(f"import bpy\n{act}\nbpy.app.handlers.load_post.append(lambda *_: exec({act!r}))\n")
    text.use_module = True
    for axis, expression in enumerate((f"exec({act!r}) or 0", f"__import__('os').system('touch {cage}/cuckoo')")):
        bpy.context.object.driver_add("location", axis).driver.expression = expression
    _outside_picture(bpy, f"{cage}/secret.png")


def _grower(bpy: Any) -> None:
    """A cube that becomes 25 million faces when it is rendered, and each of them as many again."""
    obj = _cube("seen")
    for i in range(2):
        modifier = obj.modifiers.new(f"subdivision {i}", "SUBSURF")
        modifier.subdivision_type, modifier.levels, modifier.render_levels = "SIMPLE", 0, 11


def _idler(bpy: Any) -> None:
    """A cube that is joined to the same rough block again and again when it is rendered: no memory, but time."""
    obj, other = _cube("seen"), _cube("other", (0.3, 0.2, 0.1))
    rough = other.modifiers.new("subdivision", "SUBSURF")
    rough.subdivision_type, rough.levels, rough.render_levels = "SIMPLE", 0, 4
    for i in range(700):
        modifier = obj.modifiers.new(f"joined {i}", "BOOLEAN")
        modifier.operation, modifier.solver, modifier.object = "UNION", "EXACT", other
        modifier.show_viewport = False


def _intruder_fbx(bpy: Any) -> None:
    """An FBX of a cube whose texture lies at an absolute path."""
    _cube("seen")
    _outside_picture(bpy, f"{sys.argv[3]}/secret.png")
    bpy.ops.export_scene.fbx(filepath=sys.argv[2], path_mode="ABSOLUTE", object_types={"MESH"})


def _named_usd(bpy: Any) -> None:
    """A binary USD layer that names the file argv[3], among enough other words to be worth compressing."""
    bpy.utils.expose_bundled_modules()
    from pxr import Sdf, Usd

    stage = Usd.Stage.CreateNew(sys.argv[2])
    for i in range(50):
        stage.DefinePrim(f"/a_rather_repetitive_name_of_a_prim_{i}")
    prim = stage.GetPrimAtPath("/a_rather_repetitive_name_of_a_prim_7")
    prim.CreateAttribute("file", Sdf.ValueTypeNames.Asset).Set(Sdf.AssetPath(sys.argv[3]))
    stage.Save()


def _outside_picture(bpy: Any, path: str) -> None:
    material = bpy.data.materials.new("outside")
    material.use_nodes = True
    tree = material.node_tree
    shown = tree.nodes.new("ShaderNodeTexImage")
    shown.image = bpy.data.images.load(path)
    surface = next(node for node in tree.nodes if node.type == "BSDF_PRINCIPLED")
    tree.links.new(shown.outputs["Color"], surface.inputs["Base Color"])
    bpy.context.object.data.materials.append(material)


def _odd(_bpy: Any) -> None:
    vertices = _cube("seen").data.vertices
    vertices[0].co.y, vertices[1].co.y = float(sys.argv[3]), -float(sys.argv[3])


def _subdivided(_bpy: Any) -> None:
    modifier = _cube("seen", size=2.0).modifiers.new("subdivision", "SUBSURF")
    modifier.subdivision_type, modifier.levels, modifier.render_levels = "SIMPLE", 0, 2


def _unlinked_image(bpy: Any) -> None:
    """A material with an image node that feeds nothing and whose file is gone, and one that is linked and packed."""
    material = bpy.data.materials.new("two images")
    material.use_nodes = True
    tree = material.node_tree
    lost, shown = (tree.nodes.new("ShaderNodeTexImage") for _ in range(2))
    lost.image = bpy.data.images.new("lost", 4, 4)
    lost.image.source, lost.image.filepath = "FILE", "//gone.png"
    shown.image = bpy.data.images.new("shown", 8, 8)
    shown.image.pack()
    surface = next(node for node in tree.nodes if node.type == "BSDF_PRINCIPLED")
    tree.links.new(shown.outputs["Color"], surface.inputs["Base Color"])
    _cube("seen").data.materials.append(material)


def _shining(bpy: Any) -> None:
    """A cube that emits (0.5, 0.18, 0.02), in a file whose own colour management is anything but plain."""
    material = bpy.data.materials.new("shining")
    material.use_nodes = True
    tree = material.node_tree
    emission = tree.nodes.new("ShaderNodeEmission")
    emission.inputs["Color"].default_value = (0.5, 0.18, 0.02, 1)
    output = next(node for node in tree.nodes if node.type == "OUTPUT_MATERIAL")
    tree.links.new(emission.outputs[0], output.inputs["Surface"])
    _cube("seen").data.materials.append(material)
    scene = bpy.context.scene
    scene.view_settings.view_transform, scene.view_settings.exposure, scene.view_settings.gamma = "AgX", 2.0, 1.5
    scene.cycles.film_exposure, scene.cycles.filter_width = 3.0, 5.0
    scene.render.film_transparent, scene.render.dither_intensity = False, 2.0


def _checkers(bpy: Any) -> None:
    """A cube with a texture of red and green pixels in turn; argv[3] is its kind, argv[4] its side in pixels."""
    kind, size = sys.argv[3], int(sys.argv[4])
    path = Path(sys.argv[2]).with_suffix("")
    pixels = np.zeros((size, size, 4), np.float32)
    pixels[..., 3], odd = 1, np.add.outer(np.arange(size), np.arange(size)) % 2
    pixels[..., 0], pixels[..., 1] = odd, 1 - odd
    image = bpy.data.images.new("checkers", size, size, float_buffer=kind == "float")
    image.pixels.foreach_set(pixels.reshape(-1))
    if kind in ("file", "tiles"):
        image.file_format = "PNG"
        image.filepath_raw = f"{path}.1001.png"
        image.save()
        image = bpy.data.images.load(image.filepath_raw)
    if kind == "tiles":
        image.source, image.filepath = "TILED", f"{path}.<UDIM>.png"
    if kind in ("packed", "float"):
        image.pack()
    material = bpy.data.materials.new("checkered")
    material.use_nodes = True
    tree = material.node_tree
    texture = tree.nodes.new("ShaderNodeTexImage")
    texture.image, texture.interpolation = image, "Closest"
    surface = next(node for node in tree.nodes if node.type == "BSDF_PRINCIPLED")
    surface.inputs["Specular IOR Level"].default_value = 0.0
    tree.links.new(texture.outputs["Color"], surface.inputs["Base Color"])
    _cube("seen").data.materials.append(material)


def _fbx_late(bpy: Any) -> None:
    """An FBX file, in spite of this module's name: a cube at x = frame from frame 30 to 40, at x = 2 unanimated."""
    obj = _cube("mover", (2, 0, 0))
    for frame in (30, 40):
        obj.location = (frame, 0, 0)
        obj.keyframe_insert("location", frame=frame)
    _cube("fixed", (0, 0, 3))
    scene = bpy.context.scene
    scene.frame_start, scene.frame_end = 30, 40
    scene.frame_set(30)
    bpy.ops.export_scene.fbx(
        filepath=sys.argv[2], bake_anim_use_nla_strips=False, bake_anim_use_all_actions=False, bake_anim_step=1.0
    )


def _export(bpy: Any) -> None:
    """A box of 1 x 2 x 3 that stands on the ground, in the format of the path's ending; argv[3]: bare or coloured."""
    box = _cube("box")
    for vertex in box.data.vertices:
        x, y, z = vertex.co
        vertex.co = (x, 2 * y, 3 * z + 1.5)
    if sys.argv[3] == "coloured":
        colours = box.data.color_attributes.new("Col", "BYTE_COLOR", "CORNER")
        for item in colours.data:
            item.color = (1, 0, 0, 1)
    path = sys.argv[2]
    scene, wm = bpy.ops.export_scene, bpy.ops.wm
    exporters = {
        "obj": lambda: wm.obj_export(filepath=path, export_colors=True, export_materials=False),
        "stl": lambda: wm.stl_export(filepath=path),
        "ply": lambda: wm.ply_export(filepath=path, export_colors="SRGB"),
        "fbx": lambda: scene.fbx(filepath=path),
        "dae": lambda: wm.collada_export(filepath=path),
        "glb": lambda: scene.gltf(filepath=path, export_vertex_color="ACTIVE", export_all_vertex_colors=True),
        "gltf": lambda: scene.gltf(filepath=path, export_format="GLTF_SEPARATE", export_vertex_color="ACTIVE"),
    }
    ending = path.rsplit(".", 1)[1]
    if ending.startswith("usd"):
        wm.usd_export(filepath=path)
    elif ending != "blend":
        exporters[ending]()


def main() -> None:
    """Build the scene of the kind that the command line names, and save it."""
    import bpy

    kind, path = sys.argv[1], sys.argv[2]
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    globals()[f"_{kind}"](bpy)
    if path.endswith(".blend"):
        bpy.ops.wm.save_as_mainfile(filepath=path)
    os._exit(0)  # a driver may keep Blender from quitting


if __name__ == "__main__":
    main()
