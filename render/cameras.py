"""Camera poses of a sample: numpy only, a pure function of (spec, seed).

The recipe `lrm` is the LRM paper's (arXiv 2311.04400, section 4.1): 32 views of an object in [-1, 1]^3 from a distance
of 1.5 to 3.0 and a height of -0.75 to 1.60, looking at the origin. The paper does not state its field of view; 50
degrees is what InstantMesh reports for the same recipe (InstantMesh issue 13), and a setting here.

Public scripts draw directions as normalised points of a cube, which puts 45 % of the azimuths within 15 degrees of a
cube diagonal where 33 % belong. Here azimuth is uniform and height is uniform in the interval that the radius allows:
by Archimedes' hat-box theorem that is uniform by area over the allowed zone of the sphere. No draw is rejected, so
view i of a sample does not depend on how many views there are.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.spec import RenderSpec
from pipeline.types import Camera, Float64, derive_seed

RADIUS_RANGE = (1.5, 3.0)
"""Distance from the origin in world units, LRM section 4.1."""

HEIGHT_RANGE = (-0.75, 1.60)
"""World z of the camera centre, LRM section 4.1."""

_FLIP_YZ = np.diag([1.0, -1.0, -1.0, 1.0])


def flip_camera_axes(world_from_camera: Float64) -> Float64:
    """Convert a pose [4, 4] from OpenCV axes (x right, y down, z forward) to OpenGL's and Blender's, or back.

    OpenGL cameras have x right, y up and look along -z; the conversion is its own inverse.
    """
    flipped: Float64 = np.asarray(world_from_camera, np.float64) @ _FLIP_YZ
    return flipped


def look_at(centre: Float64) -> Float64:
    """Return world_from_camera [4, 4], OpenCV axes, of a camera at `centre` [3] that looks at the origin.

    The image's up is the world's +z, so that camera y has no positive world z. At a pole of the sphere, where that
    leaves the roll open, the image's up is the world's +y.
    """
    centre = np.asarray(centre, np.float64)
    distance = float(np.linalg.norm(centre))
    if not distance > 0:
        raise ValueError(f"a camera at {centre.tolist()} cannot look at the origin")
    forward = -centre / distance
    right = np.cross(forward, [0.0, 0.0, 1.0])
    if np.linalg.norm(right) < 1e-9:
        right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = centre
    return pose


def intrinsics(resolution_px: int, fov_deg: float) -> Float64:
    """Return the pinhole matrix [3, 3] in pixels: square pixels, principal point in the middle of the image."""
    focal_px = resolution_px / 2 / math.tan(math.radians(fov_deg) / 2)
    return np.array([[focal_px, 0, resolution_px / 2], [0, focal_px, resolution_px / 2], [0, 0, 1]], np.float64)


def sample_centres(num_views: int, seed: int) -> Float64:
    """Draw camera centres [num_views, 3] by the recipe `lrm`: each view has a generator of its own."""
    return np.stack([_sample_centre(derive_seed("camera", seed, view)) for view in range(num_views)])


def _sample_centre(seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    radius = rng.uniform(*RADIUS_RANGE)
    z = rng.uniform(max(HEIGHT_RANGE[0], -radius), min(HEIGHT_RANGE[1], radius))
    azimuth = rng.uniform(0.0, 2 * math.pi)
    planar = math.sqrt(max(0.0, radius * radius - z * z))
    return np.array([planar * math.cos(azimuth), planar * math.sin(azimuth), z])


def cameras_for(spec: RenderSpec, seed: int) -> list[Camera]:
    """Return the cameras of a sample: a pure function of the spec's pixel part and the sample's seed."""
    matrix = intrinsics(spec.resolution_px, spec.fov_deg or 50.0)
    return [
        Camera(
            world_from_camera=look_at(centre),
            intrinsics=matrix.copy(),
            width=spec.resolution_px,
            height=spec.resolution_px,
        )
        for centre in sample_centres(spec.num_views, seed)
    ]
