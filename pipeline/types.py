"""The nouns of the pipeline: frozen, checked when built, shared by every layer.

Conventions, stated once. Camera axes are OpenCV's: x right, y down, z forward. `world_from_camera` maps camera to
world coordinates. The world is right-handed with z up and holds the object in [-1, 1]^3. Intrinsics are in pixels with
the origin at the image's top-left corner, so that the centre of pixel (row i, column j) is at (j + 0.5, i + 0.5).
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

KEY_PATTERN = re.compile(r"^[a-z0-9_-]{1,80}$")  # with the longest member suffix it fits a plain tar name of 100 bytes
MAX_MESSAGE_CHARS = 500
MAX_LOG_TAIL_CHARS = 4000

PlaneName = Literal["rgba", "depth", "normal", "albedo"]
Codec = Literal["webp", "png", "jpg"]
CAPTURE_SOURCES = ("mvimgnet", "colmap")
"""Kinds of source whose assets are photographed, not rendered: `[capture]` is their pixel part, not `[render]`."""
SOURCES = ("procedural", "directory", "objaverse", *CAPTURE_SOURCES)
"""Kinds of source, whose names stand in the rows of a version."""


class UserError(ValueError):
    """A mistake in what the user asked for: printed as one line, exit status 2, no traceback.

    The message says which thing, what was found, what is allowed, what to do.
    """


class FailureKind(StrEnum):
    """Why an asset gave no sample. The set is closed: a new cause gets a new name here."""

    NOT_FOUND = "not_found"
    ACCESS_DENIED = "access_denied"
    NETWORK = "network"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    EMPTY_FILE = "empty_file"
    TRUNCATED = "truncated"
    NOT_AN_ASSET = "not_an_asset"  # an HTML page, an LFS pointer, an error body, a gzip stream
    CORRUPT_FILE = "corrupt_file"  # the container or its JSON contradicts itself
    UNSUPPORTED_FORMAT = "unsupported_format"
    MISSING_RESOURCE = "missing_resource"  # a buffer or side file that the asset names is not there
    MISSING_TEXTURE = "missing_texture"
    IMPORT_ERROR = "import_error"
    PARTIAL_IMPORT = "partial_import"
    EMPTY_SCENE = "empty_scene"
    DEGENERATE_GEOMETRY = "degenerate_geometry"  # zero extent, or positions that are not finite
    TOO_LARGE = "too_large"
    LICENCE_EXCLUDED = "licence_excluded"
    BLANK_IMAGE = "blank_image"
    CROPPED = "cropped"  # these six: refused by a rule on pictures (`[admission]`), which the message names
    OVER_EXPOSED = "over_exposed"
    THIN = "thin"
    SINGLE_COLOUR = "single_colour"
    UNTEXTURED = "untextured"
    TRANSPARENT = "transparent"
    BAD_VIEW_COUNT = "bad_view_count"
    DUPLICATE = "duplicate"  # decided where receipts are merged; the message names the one that stays
    WITHDRAWN = "withdrawn"  # by hand, by a tombstone
    RENDER_TIMEOUT = "render_timeout"
    RENDER_CRASH = "render_crash"
    OUT_OF_MEMORY = "out_of_memory"
    QUARANTINED = "quarantined"  # it took its worker down too often
    NO_MODEL = "no_model"
    CORRUPT_MODEL = "corrupt_model"
    NO_MASK = "no_mask"
    BAD_MASK = "bad_mask"  # empty, everything, in pieces, or jumping from frame to frame
    MASK_DISAGREES = "mask_disagrees"  # the masks and the model's points are of different things
    BAD_CAMERA = "bad_camera"  # absurd intrinsics, or frames whose size is not the camera's
    TOO_FEW_FRAMES = "too_few_frames"
    CUT_OFF = "cut_off"  # these three: refused by a rule on captures (`[admission]`), which the message names
    NARROW_SWEEP = "narrow_sweep"
    POOR_MODEL = "poor_model"
    EXCLUDED = "excluded"  # on a list of the user's
    INGEST_TIMEOUT = "ingest_timeout"
    INGEST_CRASH = "ingest_crash"
    INTERNAL = "internal"

    @property
    def retryable(self) -> bool:
        """Whether trying the same bytes again can end otherwise."""
        return self in _RETRYABLE


_RETRYABLE = frozenset(
    {
        FailureKind.NETWORK,
        FailureKind.RENDER_TIMEOUT,
        FailureKind.RENDER_CRASH,
        FailureKind.OUT_OF_MEMORY,
        FailureKind.INGEST_TIMEOUT,
        FailureKind.INGEST_CRASH,
        FailureKind.INTERNAL,
    }
)


class AssetError(Exception):
    """Raised anywhere between an Asset and its Sample; becomes a Failure of this kind."""

    def __init__(self, kind: FailureKind, message: str, log_tail: str = "") -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message
        self.log_tail = log_tail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, self.message, self.log_tail)


def sample_key(uid: str) -> str:
    """Return the shard key of a uid: the uid itself where it is a valid key, else a slug with a digest."""
    if KEY_PATTERN.match(uid):
        return uid
    slug = re.sub(r"[^a-z0-9_-]+", "-", uid.lower()).strip("-")[-60:].strip("-") or "asset"
    return f"{slug}-{hashlib.sha256(uid.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def printable(text: str, keep: str = "") -> str:
    """Return foreign text without what moves a terminal's cursor or is no text at all, such as lone surrogates."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else "\ufffd" for c in text)


def derive_seed(*parts: str | int) -> int:
    """Return a 63-bit seed that is a pure function of its parts: no process, clock or order enters."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """One thing that can become a sample.

    Attributes:
        uid: unique within the source.
        source: name of the source that listed it, such as "objaverse".
        uri: an absolute path, an http(s) URL, or `procedural:<seed>`.
        format: lower-case file ending without the dot ("glb"), or "procedural".
        license: SPDX identifier, or "unknown".
        attribution: the credit line that the licence asks for.
        sha256: digest of the main file where it is known before the fetch.
        num_bytes: size of the main file where it is known before the fetch.
    """

    uid: str
    source: str
    uri: str
    format: str
    license: str = "unknown"
    attribution: str = ""
    sha256: str | None = None
    num_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.uid or len(self.uid) > 500:
            raise ValueError(f"asset uid has {len(self.uid)} characters; 1 to 500 are allowed: {self.uid[:80]!r}")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"asset {self.uid}: sha256 {self.sha256!r} is not 64 lower-case hex digits")

    @property
    def key(self) -> str:
        """Name of the sample in a shard."""
        return sample_key(self.uid)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Camera:
    """A pinhole camera.

    Attributes:
        world_from_camera: [4, 4] rigid motion, OpenCV axes.
        intrinsics: [3, 3] in pixels, origin at the top-left corner of the image.
        width: image width in pixels.
        height: image height in pixels.
    """

    world_from_camera: Float64
    intrinsics: Float64
    width: int
    height: int

    def __post_init__(self) -> None:
        pose, k = self.world_from_camera, self.intrinsics
        if pose.shape != (4, 4) or k.shape != (3, 3):
            raise ValueError(f"camera arrays have shapes {pose.shape} and {k.shape}; [4, 4] and [3, 3] are required")
        if not (np.isfinite(pose).all() and np.isfinite(k).all()):
            raise ValueError("camera pose or intrinsics are not finite")
        rotation = pose[:3, :3]
        if abs(rotation @ rotation.T - np.eye(3)).max() > 1e-6 or np.linalg.det(rotation) < 0:
            raise ValueError(f"world_from_camera is not a rigid motion: {pose.tolist()}")
        if self.width < 1 or self.height < 1 or k[0, 0] <= 0 or k[1, 1] <= 0:
            raise ValueError(
                f"camera of {self.width} x {self.height} px with focal {k[0, 0]}, {k[1, 1]} px is not valid"
            )

    def project(self, points: Float64) -> Float64:
        """Project world points [N, 3] to pixels [N, 2]; points behind the camera give NaN."""
        camera = (np.asarray(points, np.float64) - self.world_from_camera[:3, 3]) @ self.world_from_camera[:3, :3]
        depth = np.where(camera[:, 2:] > 0, camera[:, 2:], np.nan)
        pixels: Float64 = ((camera / depth) @ self.intrinsics.T)[:, :2]
        return pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """One encoded image of a view. `scale` is set for depth: stored value = round(z * scale)."""

    codec: Codec
    data: bytes
    scale: float | None = None

    @property
    def crc32(self) -> int:
        """CRC-32 of the encoded bytes."""
        return zlib.crc32(self.data)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """One picture of an object: a camera and its planes by name."""

    index: int
    camera: Camera
    planes: Mapping[PlaneName, Plane]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Normalization:
    """The similarity from source to world: world = scale * rotation @ source + translation.

    Attributes:
        scale: factor from source to world units.
        rotation: [3, 3].
        translation: [3] in world units.
    """

    scale: float
    rotation: Float64
    translation: Float64

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0 and np.isfinite(self.translation).all()):
            raise ValueError(f"normalization with scale {self.scale}, translation {self.translation} is not finite")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """An object seen from several cameras, ready for a shard.

    `quality` and `lights` are JSON values that are pure functions of (spec, asset) and go into the shard.
    `provenance` (worker, device, seconds, attempts) differs from run to run and goes into the receipt only.
    """

    asset: Asset
    spec_fingerprint: str
    seed: int
    normalization: Normalization
    views: tuple[View, ...]
    quality: Mapping[str, Any] = field(default_factory=dict)
    lights: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of the sample in a shard."""
        return self.asset.key


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an asset gave no sample: as real a result as a Sample."""

    uid: str
    kind: FailureKind
    message: str
    attempts: int = 1
    log_tail: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable(" ".join(self.message.split()))[:MAX_MESSAGE_CHARS])
        object.__setattr__(self, "log_tail", printable(self.log_tail[-MAX_LOG_TAIL_CHARS:], keep="\n\t"))

    @property
    def retryable(self) -> bool:
        """Whether trying the same bytes again can end otherwise."""
        return self.kind.retryable

    @classmethod
    def from_error(cls, uid: str, error: AssetError, *, attempts: int = 1) -> Failure:
        """Return the Failure of an asset whose making raised `error`."""
        return cls(uid=uid, kind=error.kind, message=error.message, log_tail=error.log_tail, attempts=attempts)
