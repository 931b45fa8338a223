"""What each kind of failure means, and what somebody who wants the object can do: for `make why`.

A table of text beside `pipeline.types.FailureKind`, which is the closed set; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.types import FailureKind as K

_RULE = "relax the rule that the message names in [admission], then `make dataset`: nothing else is made again"
_FILE = "get a sound file from the source; a file with other bytes is made by the next `make dataset`"
_RETRY = "`make dataset` tries it again by itself, `make retry KIND=...` at once"
_CAPTURE = "mend the capture, or leave it out; `make check-captures` draws what is wrong"

MEANINGS: Mapping[K, tuple[str, str]] = {
    K.NOT_FOUND: ("the source says that there is no such file", "leave it out, or correct the listing's address"),
    K.ACCESS_DENIED: ("the source refuses the file", "give the workers the right to read it; then `make retry`"),
    K.NETWORK: ("the file did not arrive: refused or lost connections, time-outs, errors of the server",
                f"look at the network and at [fetch]; {_RETRY}"),
    K.CHECKSUM_MISMATCH: ("what arrived is not what the source's digest or size promises", _FILE),
    K.EMPTY_FILE: ("the file has no byte", _FILE),
    K.TRUNCATED: ("the file ends before its own header says", _FILE),
    K.NOT_AN_ASSET: ("it is something else: an error page, an LFS pointer, a compressed stream", _FILE),
    K.CORRUPT_FILE: ("the container or its JSON contradicts itself", _FILE),
    K.UNSUPPORTED_FORMAT: ("this Blender has no reader for the format, or for a compression inside it",
                           "convert the file, or install what the message names"),
    K.MISSING_RESOURCE: ("a file that the asset names is not beside it", "put the side files where the asset looks"),
    K.MISSING_TEXTURE: ("a texture that a material shows is not there or does not decode",
                        "put the picture where the asset looks; the message names it"),
    K.IMPORT_ERROR: ("Blender's importer gave up", "read the log tail; convert the file with another program"),
    K.PARTIAL_IMPORT: ("fewer triangles arrived in Blender than the file holds",
                       "read the log tail; admission.min_triangle_share says how many are enough"),
    K.EMPTY_SCENE: ("there is no mesh in what was imported", "leave it out; lines and points alone are no object"),
    K.DEGENERATE_GEOMETRY: ("the object has no extent, or positions that are not finite", _FILE),
    K.TOO_LARGE: ("more bytes or triangles than [admission] lets in", _RULE),
    K.LICENCE_EXCLUDED: ("the licence policy does not let it in",
                         "widen admission.licenses if you may; that is another plan"),
    K.BLANK_IMAGE: ("the pictures show next to nothing", _RULE),
    K.CROPPED: ("too much of the object lies outside its pictures", _RULE),
    K.OVER_EXPOSED: ("too much of the object is burnt out", _RULE),
    K.THIN: ("its silhouette is too thin", _RULE),
    K.SINGLE_COLOUR: ("it has one base colour", _RULE),
    K.UNTEXTURED: ("it has no texture and no vertex colours", _RULE),
    K.TRANSPARENT: ("it has glass or alpha-blended surfaces", _RULE),
    K.BAD_VIEW_COUNT: ("the child gave another number of views than was asked for", "report it: a fault of ours"),
    K.DUPLICATE: ("another object has the same file or looks the same; the message names it",
                  "nothing; admission.duplicate_distance says how near is the same"),
    K.WITHDRAWN: ("somebody withdrew it by hand", "nothing: tombstones hold for all later versions"),
    K.RENDER_TIMEOUT: ("Blender took longer than limits.deadline_s, or was silent for limits.silence_s",
                       f"raise the limit if the object is worth it; {_RETRY}"),
    K.RENDER_CRASH: ("Blender died, or answered nonsense", f"read the log tail; {_RETRY}"),
    K.OUT_OF_MEMORY: ("the child held more than limits.memory_bytes, or got no more",
                      f"raise limits.memory_bytes where the node has it; {_RETRY}"),
    K.QUARANTINED: ("its worker process died limits.max_attempts times while it had the object",
                    "read the log tail; `make retry KIND=quarantined` once the cause is mended"),
    K.NO_MODEL: ("the capture has no COLMAP model", _CAPTURE),
    K.CORRUPT_MODEL: ("the capture's model does not read or contradicts itself", _CAPTURE),
    K.NO_MASK: ("the capture has no masks", "set capture.mask_command, or bring masks"),
    K.BAD_MASK: ("a mask is empty, everything, in pieces, or jumps from frame to frame", _CAPTURE),
    K.MASK_DISAGREES: ("masks and model show different things", _RULE),
    K.BAD_CAMERA: ("absurd intrinsics, or frames of another size than their camera's", _CAPTURE),
    K.TOO_FEW_FRAMES: ("too few frames have a pose, a mask and a file", _RULE),
    K.CUT_OFF: ("the object is cut by the edge of too many photographs", _RULE),
    K.NARROW_SWEEP: ("the cameras go round too little of the object", _RULE),
    K.POOR_MODEL: ("too few frames have a pose, or points lie too far from where they were seen", _RULE),
    K.EXCLUDED: ("it is on a list of yours of what to leave out", "take it off source's list; that is another plan"),
    K.INGEST_TIMEOUT: ("the child took longer over the capture than [limits] allow", f"raise the limit; {_RETRY}"),
    K.INGEST_CRASH: ("the child that reads captures died, or answered nonsense", f"read the log tail; {_RETRY}"),
    K.INTERNAL: ("a fault of this program; the log tail is its trace", f"report it; {_RETRY}"),
}  # fmt: skip
