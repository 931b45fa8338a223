"""MVImgNet 1.0 and 2.0: real object videos, read where they lie: in the zips as downloaded, or in the extracted tree.

    mvi_00.zip ... mvi_42.zip      <class>/<instance>/{images,masks,sparse/0}/..., objects spread over the zips at
                                   random, one object's files sometimes over several
    <class>/<instance>/...         the same, extracted; zips and trees may lie side by side
    source.masks                   a tree, or zips, of their own: <class>/<instance>/NNN.jpg.png (1.0); by default a
                                   folder beside the classes whose name holds "mask", extracted

Listing reads the central directory of each zip once, in blocks: 3.4 microseconds of one core an entry, so half a minute
for the 7 million files of 43 zips, with two numbers a capture and zip in memory, 1 KB. Those numbers, where in the
directory the capture's entries stand, go into the asset's uri and so into the frozen plan:

    mvimgnet:0/3a004e55?path=mvi_07.zip:1203456-4096&check=5f0c...

so that a worker, which has the spec and the asset, asks for 4 KB of a directory and for the capture's own bytes, and
no worker ever reads a whole directory. `check` is a sum of hashes of the entries (name, size, CRC): a zip that was
replaced since is found out before a byte of it is used. A tree has no digest before it is read; what was read is
digested in either case (`pipeline.members`).

A cut zip ends the listing: which objects it holds cannot be known, so a plan without them would be no plan of this
corpus. Anything wrong with one capture's entries costs that capture, with a kind.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from pipeline.capture import CaptureFiles
from pipeline.folders import Folder, open_folder
from pipeline.layout import arrange
from pipeline.members import FileMember, Member, MemberReader, OpenCapture, ZipMember
from pipeline.spec import MvimgnetSource
from pipeline.types import Asset, AssetError, FailureKind, UserError
from pipeline.zips import ZipEntry, find_directory, parse_entries, scan_directory

logger = logging.getLogger(__name__)

LICENSE = "MVImgNet-ToU"
ATTRIBUTION = "MVImgNet, GAP-Lab, The Chinese University of Hong Kong, Shenzhen"
MAX_RUNS = 8
"""Most runs in one zip that are told apart: real captures have one. What is more scattered is covered by its last run,
and found among others by name."""

_CAPTURE = re.compile(rb"(?:^|/)(0|[1-9][0-9]{0,3})/([0-9a-f]{8})/(?=[^/])")
_CLASS, _INSTANCE = re.compile(r"0|[1-9][0-9]{0,3}"), re.compile(r"[0-9a-f]{8}")
_EXCLUDED = re.compile(r"((?:0|[1-9][0-9]{0,3})/[0-9a-f]{8})(?:-([0-9]{1,3}))?")
_URI = re.compile(r"mvimgnet:([0-9]{1,4}/[0-9a-f]{8})\?(.*)", re.DOTALL)
_RUN = re.compile(r"([0-9]{1,18})-([0-9]{1,12})")
_LISTERS = 16
_MAX_DEPTH = 3
_WHOLE = "all"
_INNER_MASKS = "path-masks"


@dataclass(slots=True)
class _Found:
    """What the listing knows of one capture: (root, zip, start, end) runs, prefixes of trees, sums over its entries."""

    runs: list[tuple[str, str, int, int]] = field(default_factory=list)
    trees: list[tuple[str, str]] = field(default_factory=list)
    check: int = 0
    num_bytes: int = 0


class MvimgnetAssets:
    """Captures `<class>/<instance>` as Assets; `open_capture` gives the files of one."""

    def __init__(self, source: MvimgnetSource, *, max_capture_bytes: int) -> None:
        self._source = source
        self._max_bytes = max_capture_bytes
        self._folders: dict[str, Folder] = {}
        self._limits: dict[tuple[str, str], int] = {}

    def list_assets(self) -> list[Asset]:
        """Return the captures sorted by class number and instance, excluded ones among them.

        Raises:
            UserError: nothing is there, a zip is damaged, or a list is malformed.
        """
        excluded = _read_excluded(self._source.exclude_file)
        found: dict[str, _Found] = {}
        try:
            for root in self._roots():
                self._list_root(root, found)
        except AssetError as error:
            raise UserError(
                f"source.path: {error.message}; mend it, or move it away and say so to your readers"
            ) from None
        wanted = set(self._source.classes)
        names = [name for name, one in found.items() if any(root == "path" for root, *_ in (*one.runs, *one.trees))]
        if wanted:
            names = [name for name in names if int(name.partition("/")[0]) in wanted]
        if not names:
            which = f" of the classes {sorted(wanted)}" if wanted else ""
            raise UserError(
                f"source.path {self._source.path!r} holds no capture{which}; mvi_NN.zip files, or folders "
                "<class>/<instance>/images, are looked for"
            )
        names.sort(key=lambda name: (int(name.partition("/")[0]), name))
        strange = sorted(excluded.keys() - set(names))
        if strange:
            logger.info(
                "source.exclude_file: %d of its %d captures are not in the source, such as %s",
                len(strange), len(excluded), strange[0],
            )  # fmt: skip
        return [_asset(name, found[name], excluded.get(name)) for name in names[: self._source.max_captures]]

    def open_capture(self, asset: Asset) -> OpenCapture:
        """Return the files of a capture, none of them read yet.

        Raises:
            AssetError: EXCLUDED, NOT_FOUND, TOO_LARGE, CHECKSUM_MISMATCH where a zip changed since it was listed,
                CORRUPT_FILE or UNSUPPORTED_FORMAT for entries that are not to be read, ACCESS_DENIED or NETWORK.
        """
        match = _URI.fullmatch(asset.uri)
        if match is None:
            raise AssetError(FailureKind.INTERNAL, f"uri {asset.uri[:100]!r} is none of the source mvimgnet")
        name, fields = match[1], parse_qsl(match[2], keep_blank_values=True, errors="surrogateescape")
        settings = dict(fields)
        left_out = settings.get("exclude")
        if left_out == _WHOLE:
            raise AssetError(FailureKind.EXCLUDED, f"{name} is on the list {self._source.exclude_file}")
        members: dict[str, Member] = {}
        check = 0
        for root, value in fields:
            if root in ("path", "masks", _INNER_MASKS):
                check += self._open_part(root, value, name, members)
        if "check" in settings and f"{check % 2**64:016x}" != settings["check"]:
            raise AssetError(
                FailureKind.CHECKSUM_MISMATCH,
                f"{name}: its zips changed since the plan was made; plan under another name",
            )
        return open_members(asset.uid, members, self._max_bytes, without=left_out)

    def _roots(self) -> list[str]:
        return ["path"] if self._source.masks is None else ["path", "masks"]

    def _folder(self, root: str) -> Folder:
        if root not in self._folders:
            url = self._source.masks if root == "masks" else self._source.path
            assert url is not None
            self._folders[root] = open_folder(url, f"source.{root}")
        return self._folders[root]

    def _list_root(self, root: str, found: dict[str, _Found]) -> None:
        folder = self._folder(root)
        folders, files = folder.entries("")
        for name, _ in files:
            if name.lower().endswith(".zip"):
                _list_zip(root, folder, name, found)
        for name in _instances(folder, folders):
            *wrapper, class_label, instance = name.split("/")
            label = root if root == "masks" or "mask" not in "".join(wrapper).lower() else _INNER_MASKS
            if label != _INNER_MASKS or self._source.masks is None:
                found.setdefault(f"{class_label}/{instance}", _Found()).trees.append((label, f"{name}/"))

    def _open_part(self, root: str, value: str, name: str, members: dict[str, Member]) -> int:
        """Add the members of one part of a capture; return the sum of its entries' hashes."""
        folder = self._folder(root)
        if value.endswith("/"):
            for file in walk_files(folder, value):
                inside = file.name.removeprefix(value)
                _add(members, root, inside, file)
            return 0
        zip_name, _, runs = value.rpartition(":")
        limit = self._limit(root, zip_name)
        check = 0
        for start, length in [(int(one[1]), int(one[2])) for one in _RUN.finditer(runs)]:
            (data,) = folder.read_ranges(zip_name, [limit + start], [length])
            for entry in parse_entries(data, zip_name, base=start):
                place = _CAPTURE.search(entry.name)
                if (
                    entry.is_folder
                    or place is None
                    or entry.name.startswith(b"__MACOSX/")
                    or b"/".join(place.groups()) != name.encode()
                ):
                    continue
                rest = entry.name[place.end() :]
                check += _hash(rest, entry)
                entry.check()
                member = ZipMember(folder=folder, zip_name=zip_name, entry=entry, limit=limit)
                _add(members, root, rest.decode("utf-8", "surrogateescape"), member)
        return check

    def _limit(self, root: str, zip_name: str) -> int:
        """Return where a zip's directory starts: 64 KB of its end, read once a process."""
        if (root, zip_name) not in self._limits:
            self._limits[root, zip_name] = find_directory(self._folder(root), zip_name).offset
        return self._limits[root, zip_name]


def open_members(uid: str, members: dict[str, Member], max_bytes: int, without: str | None = None) -> OpenCapture:
    """Join the members of a capture by name; `mask:` in front marks those of a tree of masks.

    Args:
        without: numbers of the models to leave out, "0,2".

    Raises:
        AssetError: NOT_FOUND where there are none; TOO_LARGE; EXCLUDED where no model is left.
    """
    if not members:
        raise AssetError(FailureKind.NOT_FOUND, f"{uid}: none of its files is there any more")
    own = [name for name in members if not name.startswith("mask:")]
    masks = [(name.removeprefix("mask:"), name) for name in members if name.startswith("mask:")]
    layout = arrange(own, masks)
    models = dict(layout.models)
    for number in (without or "").split(","):
        models.pop(number, None)
    if layout.models and not models:
        raise AssetError(FailureKind.EXCLUDED, f"{uid}: its models {without} are on the list of source.exclude_file")
    kept = {
        *layout.frames.values(),
        *layout.masks.values(),
        *(file for one in models.values() for file in one.values()),
    }
    reader = MemberReader(uid, {name: one for name, one in members.items() if name in kept}, max_bytes)
    files = CaptureFiles(uid=uid, frames=layout.frames, masks=layout.masks, models=models, read=reader.read)
    return OpenCapture(files, reader)


def _list_zip(root: str, folder: Folder, zip_name: str, found: dict[str, _Found]) -> None:
    """Note where in a zip's directory the entries of each capture stand."""
    directory = find_directory(folder, zip_name)
    prefix, one = b"\0", _Found()
    for entry in scan_directory(folder, zip_name, directory):
        if not entry.name.startswith(prefix):
            place = _CAPTURE.search(entry.name)
            if place is None or entry.name.startswith(b"__MACOSX/"):
                prefix = b"\0"
                continue
            prefix = entry.name[: place.end()]
            one = found.setdefault(b"/".join(place.groups()).decode(), _Found())
        if entry.is_folder:
            continue
        start, end = entry.position, entry.position + entry.span
        here = one.runs[-1:] and one.runs[-1][:2] == (root, zip_name)
        full = len(one.runs) >= MAX_RUNS and one.runs[-MAX_RUNS][:2] == (root, zip_name)
        if here and (one.runs[-1][3] == start or full):
            one.runs[-1] = (root, zip_name, one.runs[-1][2], end)
        else:
            one.runs.append((root, zip_name, start, end))
        one.check += _hash(entry.name[len(prefix) :], entry)
        one.num_bytes += entry.num_bytes


def _hash(inside: bytes, entry: ZipEntry) -> int:
    text = b"%s\0%d\0%d" % (inside, entry.num_bytes, entry.crc32)
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")


def _instances(folder: Folder, top: list[str]) -> Iterator[str]:
    """Yield `[<wrapper>/]<class>/<instance>` of a tree: class folders stand at its top, or one level below."""
    classes = [name for name in top if _CLASS.fullmatch(name)]
    for wrapper in [name for name in top if not _CLASS.fullmatch(name) and not name.startswith((".", "__"))]:
        classes += [f"{wrapper}/{name}" for name in folder.entries(f"{wrapper}/")[0] if _CLASS.fullmatch(name)]
    with ThreadPoolExecutor(_LISTERS if folder.is_remote else 1) as pool:
        for name, (folders, _) in zip(classes, pool.map(lambda name: folder.entries(f"{name}/"), classes)):
            yield from (f"{name}/{one}" for one in folders if _INSTANCE.fullmatch(one))


def walk_files(folder: Folder, prefix: str, depth: int = _MAX_DEPTH) -> Iterator[FileMember]:
    """Yield the files below a prefix, a few levels deep; names that start with a dot are left out."""
    folders, files = folder.entries(prefix)
    for name, num_bytes in files:
        if not name.startswith("."):
            yield FileMember(folder=folder, name=f"{prefix}{name}", num_bytes=num_bytes)
    for name in [one for one in folders if not one.startswith(".")] if depth > 0 else ():
        yield from walk_files(folder, f"{prefix}{name}/", depth - 1)


def _add(members: dict[str, Member], root: str, inside: str, member: Member) -> None:
    """Add a member under its name; a name that comes twice with other content is refused."""
    name = inside if root == "path" else f"mask:{inside}"
    known = members.get(name)
    if known is None:
        members[name] = member
        return
    if isinstance(known, ZipMember) and isinstance(member, ZipMember) and known.zip_name != member.zip_name:
        first, second = known.entry, member.entry
        if (first.crc32, first.num_bytes) == (second.crc32, second.num_bytes):
            return
    if isinstance(known, ZipMember) != isinstance(member, ZipMember):
        zipped, file = (known, member) if isinstance(known, ZipMember) else (member, known)
        if isinstance(zipped, ZipMember) and isinstance(file, FileMember) and zipped.entry.num_bytes == file.num_bytes:
            members[name] = zipped  # the zips lie beside the tree that came out of them; a zip's content is checked
            return
    raise AssetError(
        FailureKind.CORRUPT_FILE, f"{inside[:100]!a} is there twice, with other content or in one zip; refused"
    )


def _asset(name: str, one: _Found, excluded: str | None) -> Asset:
    parts: dict[tuple[str, str], list[str]] = {}
    for root, zip_name, start, end in one.runs:
        parts.setdefault((root, zip_name), []).append(f"{start}-{end - start}")
    fields = [(root, f"{zip_name}:{','.join(runs)}") for (root, zip_name), runs in parts.items()]
    fields += one.trees
    if one.runs:
        fields.append(("check", f"{one.check % 2**64:016x}"))
    if excluded is not None:
        fields.append(("exclude", excluded))
    return Asset(
        uid=f"mvimgnet-{name.replace('/', '-')}",
        source="mvimgnet",
        uri=f"mvimgnet:{name}?{urlencode(fields, safe='/:,', errors='surrogateescape')}",
        format="capture",
        license=LICENSE,
        attribution=ATTRIBUTION,
        num_bytes=one.num_bytes if not one.trees else None,
    )


def _read_excluded(path: str | None) -> dict[str, str]:
    """Return "all", or the numbers of models "0,2", by capture, from the user's list."""
    out: dict[str, str] = {}
    for number, line in read_lines(path):
        match = _EXCLUDED.fullmatch(line)
        if match is None:
            raise UserError(
                f"source.exclude_file {path}, line {number}: {line[:60]!r} is not <class>/<instance> or "
                "<class>/<instance>-<model>"
            )
        if match[2] is None or out.get(match[1]) == _WHOLE:
            out[match[1]] = _WHOLE
        else:
            out[match[1]] = ",".join(sorted({*out.get(match[1], match[2]).split(","), str(int(match[2]))}))
    return out


def read_lines(path: str | None) -> list[tuple[int, str]]:
    """Return the lines of a list with their numbers, without blanks and comments; none for None.

    Raises:
        UserError: if it cannot be read.
    """
    if path is None:
        return []
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"source.exclude_file {path}: cannot be read: {error.strerror}") from None
    lines = list[tuple[int, str]]()
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise UserError(f"source.exclude_file {path}, line {number}: {line[:60]!r} is no UTF-8 text") from None
        if text and not text.startswith("#"):
            lines.append((number, text))
    return lines
