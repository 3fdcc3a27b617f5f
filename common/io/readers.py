"""Readers of the data sets people have on disk: a function for each, which gives (classes, train, test).

Each reader has the layout and the formats it reads in its docstring. All follow the same rules: a video is
a file with a video's suffix, or a folder that holds the numbered pictures of one series and nothing else;
what a list names is looked up in scans of the folders, with another suffix, class spelling, Unicode form or
prefix if need be; what is not there, or no video, is left out and reported, above half of a list it is an
error, as is everything that puts a label in doubt.
"""

import csv
import io
import json
import os
import re
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError, printable
from common.io import toy
from common.io.decode import FLOW, FPS, PICTURES

SUFFIXES = tuple(  # of what PyAV reads
    ".avi .mp4 .webm .mkv .mov .3g2 .3gp .264 .265 .amv .asf .divx .dv .f4v .flv .gif .h264 .h265 .hevc .ivf "
    ".m1v .m2t .m2ts .m2v .m4v .mjpeg .mjpg .mk3d .mod .mpe .mpeg .mpg .mpv .mts .mxf .nut .obu .ogm .ogv "
    ".qt .rm .rmvb .tod .tp .trp .ts .vob .vro .wmv .wtv .xvid .y4m".split()
)
LISTS = (".txt", ".csv", ".json")
HIDDEN = ("thumbs.db", "desktop.ini", "lost+found")  # beside names that begin with a dot


# ---- names and files -------------------------------------------------------------------------------
class Part(NamedTuple):
    """The training or test videos of a data set, named relative to root; other fields as in Videos."""

    root: str
    names: list
    labels: list
    groups: list | None = None
    spans: list | None = None


MISSING, AMBIGUOUS = -1, -2


class NotThere(UserError):
    """A file or folder is missing; load adds what was expected."""


def _some(names):
    return ", ".join(map(printable, names[:5])) + (", ..." if len(names) > 5 else "")


def _numbers(labels):
    return " ".join(map(str, labels)) or "none"


def stem_of(name):
    """A path without a video's suffix; any other dot belongs to the name."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot + suffix.lower() in SUFFIXES else name


def _nfc(name):
    """A name in the Unicode form in which names are compared: an accented letter is one character."""
    return unicodedata.normalize("NFC", name)


def forms(name):
    """The spellings under which a file may be found: as given, composed, or decomposed as on a Mac."""
    return dict.fromkeys([name, _nfc(name), unicodedata.normalize("NFD", name)])


def _parts(name):
    name = _nfc(name)
    return [part for part in stem_of(name).replace("\\", "/").split("/") if part not in ("", ".")] or [name]


def _parent(name):
    return ["", *_parts(name)][-2]


@lru_cache(maxsize=4096)
def _squash(name):
    """What all spellings of a class name have in common: letters and digits, in lower case."""
    return re.sub(r"[\W_]+", "", _nfc(name).casefold())


def _keys(classes):
    """Squashed class name -> label, without names that cannot be told apart."""
    counts = Counter(map(_squash, classes))
    return {_squash(name): k for k, name in enumerate(classes) if counts[_squash(name)] == 1}


def _match(wanted, found):
    """For each wanted name its position in found, MISSING or AMBIGUOUS.

    Tried in turn: the same path; without suffix; class folder in any spelling and stem; stem alone. A
    key that two wanted names share finds nothing: "a/1.avi" must not be served by "b/1.avi".
    """
    ways = (
        lambda name: name,
        lambda name: "/".join(_parts(name)),
        lambda name: (_squash(_parent(name)), _parts(name)[-1]),
        lambda name: _parts(name)[-1],
    )
    at = np.full(len(wanted), MISSING)
    for way in ways:
        todo = np.flatnonzero(at == MISSING)
        if not len(todo):
            break
        table, asked = {}, Counter(map(way, set(wanted)))
        for i, key in enumerate(map(way, found)):
            table[key] = AMBIGUOUS if key in table else i
        for i in todo:
            key = way(wanted[i])
            at[i] = table.get(key, MISSING) if asked[key] == 1 else MISSING
    return at


def _scan(root, notes=None, deep=6):
    """The names, relative to root, of all videos below it: files, and folders of numbered pictures.

    Sorted; without hidden ones; links are followed, at most `deep` folders down. What else is there and may
    be meant as a video is counted in `notes`.
    """
    found, todo, pictures, others, deeper = [], [("", 0)], Counter(), Counter(), []
    while todo:
        folder, depth = todo.pop()
        if folder and _is_pictures(os.path.join(root, folder)):
            found.append(folder)
            continue
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name, lower = f"{folder}/{entry.name}" if folder else entry.name, entry.name.lower()
                if _is_hidden(lower):
                    continue
                if lower.endswith(SUFFIXES) and entry.is_file():
                    found.append(name)
                elif entry.is_dir() and depth < deep:
                    todo.append((name, depth + 1))
                elif entry.is_dir():
                    deeper.append(name)
                elif lower.endswith(PICTURES):
                    pictures[folder or "."] += 1
                elif not lower.endswith((*SUFFIXES, *LISTS)):
                    others[os.path.splitext(lower)[1] or entry.name] += 1
    if notes is not None:
        kinds = [f"{count} {kind}" for kind, count in sorted(others.items())]
        for count, what in (
            (pictures.total(), f"pictures in {_some(sorted(pictures))}; a video is a folder of one series of "
             "numbered pictures with nothing else in it"),
            (others.total(), f"files that are not videos: {_some(kinds)}"),
            (len(deeper), f"folders more than {deep} levels down: {_some(sorted(deeper))}"),
        ):  # fmt: skip
            if count:
                notes.append(f"left out of {root}: {count} {what}")
    return sorted(found, key=lambda name: (_nfc(name), name))


def _is_hidden(lower):
    return lower.startswith(".") or lower in HIDDEN


def _is_pictures(folder):
    """Whether a folder holds numbered pictures of one series, and else only hidden files and optical flow."""
    in_series, has_flow = None, False
    with os.scandir(folder) as entries:
        for name in (entry.name.lower() for entry in entries):
            if in_series and in_series(name) or _is_hidden(name):
                continue
            stem, suffix = os.path.splitext(name)
            if suffix not in PICTURES or not re.search(r"\d", stem):
                return False
            if FLOW.match(name):
                has_flow = True
            elif in_series:
                return False
            else:
                pattern = re.sub(r"\d+", lambda _: r"\d+", re.escape(stem))
                in_series = re.compile(rf"{pattern}(?:{'|'.join(PICTURES)})").fullmatch
    return has_flow or in_series is not None


@lru_cache(maxsize=1024)
def _folder_videos(folder):
    return frozenset(_scan(folder, deep=1)) if os.path.isdir(folder) else frozenset()


def _elsewhere(base, name):
    """A listed path that leads out of base ("/data/a.mp4", "../a.mp4"), if there is a video; else None."""
    if os.path.isabs(name) or ".." in name.split("/"):
        for form in forms(name):
            folder, file = os.path.split(os.path.join(base, form))
            if file in _folder_videos(folder):
                return form
    return None


def _find_videos(root, notes, *folders):
    """(base, names of videos relative to base) of the first of the folders in root that has any."""
    left_out = []
    for folder in (*folders, ""):
        base, left_out = str(Path(root, folder)), []
        if os.path.isdir(base) and (found := _scan(base, left_out)):
            notes += left_out
            return base, found
    kinds = f"{', '.join(SUFFIXES[:4])}, ... or folders of numbered pictures"
    raise NotThere("; ".join([f"no videos ({kinds}) in {root}", *left_out]))


def _find_file(root, *names):
    """The first of the files that is in root, or in the folders lists usually are in."""
    for folder in ("", "annotations", "labels", "ucfTrainTestlist", "splits"):
        for path in (Path(root, folder, name) for name in names):
            if path.is_file():
                return str(path)
    raise NotThere(f"no {' or '.join(names)} in {root} or {root}/annotations")


def _open_text(path, newline=None):
    """A text file in UTF-8, with or without BOM; names in it may hold bytes that are not UTF-8."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if b"\0" in data:
        raise UserError(f"{path} is not UTF-8: it is UTF-16, or no text; save it as UTF-8")
    return io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline)


def _read_text(path):
    """(line number, line) of the lines of a text file that are not blank, without BOM and CR LF."""
    return [(n, line.strip()) for n, line in enumerate(_open_text(path), 1) if line.strip()]


def _read_csv(path, *columns):
    """(line number, dict) of the rows of a CSV file that has a header with these columns."""
    reader = csv.DictReader(_open_text(path, newline=""))
    for row in reader:
        if any(row.get(column) is None for column in columns):
            raise UserError(f"{path}:{reader.line_num}: the columns {', '.join(columns)} are expected")
        yield reader.line_num, row


def _read_json(path):
    return json.load(_open_text(path))


# ---- rows of lists ---------------------------------------------------------------------------------


class Row(NamedTuple):
    """A video as a list has it. labels: integers from 0, or class names, or () if there are none."""

    name: str
    labels: tuple
    source: str
    line: int | None = None
    span: tuple | None = None

    @property
    def place(self):
        return self.source if self.line is None else f"{self.source}:{self.line}"


# What ends a line of a list: integers, or "1,2", after commas, tabs or blanks, but not after a mixture.
NUMBERS = re.compile(r"(( *, *X)+|( *\t\s*X)+|( +X)+)[\s,]*$".replace("X", r'(-?\d+|"[-\d, ]*")'))
SEGMENT = re.compile(r"[\s,]*\d+[\s,]+0*[1-9]\d*[\s,]+-?\d+[\s,]*")  # start, frames, label


def _read_list(path, notes):
    """Rows of a list file. Separators are blanks, tabs or commas; labels are integers from 0.

        path label        path label label ...       several labels: a multi-label data set
        folder label      folder frames label ...    a folder of pictures
        folder start frames label                    in every line: pictures start, start + 1, ... of those
        path                                         the class folder is the label

    Paths may hold blanks and everything else ("#" begins no comment). start counts from 0, in the order of
    the pictures, as the offset of MMAction2's with_offset=True does.
    """
    lines = []
    for n, line in _read_text(path):
        end = NUMBERS.search(line)
        name = line[: end.start() if end else None].strip('", \t')
        if re.match(r"[a-z][a-z0-9+.-]+://", name):
            raise UserError(f"{path}:{n}: {printable(name)} is an address, but a list names files on disk")
        lines.append((n, name, stem_of(name) == name, end[0] if end else ""))
    if not lines:
        raise UserError(f"{path} is empty; lines 'path label' are expected")
    if n > len(lines):
        notes.append(f"{n - len(lines)} blank lines of {path} are skipped")
    of_segments = all(is_folder and SEGMENT.fullmatch(end) for _, _, is_folder, end in lines)
    if of_segments:
        notes.append(f"the lines of {path} are read as folder, start, frames, label")
    rows = []
    for n, name, is_folder, end in lines:
        labels, span = tuple(map(int, re.findall(r"-?\d+", end))), None
        if of_segments:  # half a picture early, so that no rounding matters
            start, frames, *labels = labels
            span = (start - 0.5) / FPS, (start + frames - 0.5) / FPS
        elif is_folder and len(labels) > 1:
            labels = labels[1:]
        rows.append(Row(name, tuple(labels), os.fspath(path), n, span))
    return rows


def _read_classes(path):
    """Class names, one a line, with or without numbers in front ("1 ApplyEyeMakeup")."""
    names = [_nfc(line) for _, line in _read_text(path)]
    split = [re.fullmatch(r"(\d+)[\s:,]+(.+)", name) for name in names]
    if all(split) and [int(m[1]) - int(split[0][1]) for m in split] == list(range(len(names))):
        names = [m[2] for m in split]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: {Counter(names).most_common(1)[0][0]} is there twice")
    return names


def _like_frames(rows):
    """Whether the labels of the rows look like numbers of frames: many, most far from 0, many only once."""
    counts = Counter(y for row in rows for y in row.labels if isinstance(y, int))
    numbers, once = sorted(counts), sum(n == 1 for n in counts.values())
    rank = max(1, len(counts) // 10)  # a few may be labels
    return len(counts) >= 5 and numbers[rank] >= rank + 10 and once >= max(4, len(counts) / 10)


def _hint(rows):
    """What may be wrong with the labels of the rows, to end a sentence with."""
    if _like_frames(rows):
        return " (the labels look like numbers of frames: many different ones, far from 0)"
    labels = [y for row in rows for y in row.labels if isinstance(y, int)]
    return " (the labels look 1-based: subtract 1)" if labels and min(labels) == 1 else ""


def _number(rows, classes, several):
    """The rows with labels as integers, complete and in range; raises UserError at the first that is not."""
    keys, numbered, some_given = _keys(classes), [], any(row.labels for row in rows)
    for row in rows:
        given = row.labels
        if not given and not several:  # then no line has a label, and the class folders tell
            given = (_parent(row.name),)
            if some_given or _squash(given[0]) not in keys:
                raise UserError(f"{row.place}: {printable(row.name)!r} is not followed by an integer label")
        labels = tuple(y if isinstance(y, int) else keys.get(_squash(y), -1) for y in given)
        for said, y in zip(given, labels, strict=True):
            if not 0 <= y < len(classes):
                right = f"0 to {len(classes) - 1}{_hint(rows)}" if y == said else _some(classes)
                raise UserError(f"{row.place}: label {printable(str(said))} is not one of {right}")
        numbered.append(row._replace(labels=labels))
    return numbered


def _on_disk(base, found, rows, notes):
    """Yield (name relative to base, row) of the rows whose video is there; the others make a note."""
    lost, names = [], [row.name for row in rows]
    for prefix in forms(os.path.join(os.path.abspath(base), "")):
        names = [name.removeprefix(prefix) for name in names]
    for row, at in zip(rows, _match(names, found), strict=True):
        if at == AMBIGUOUS:
            raise UserError(
                f"{row.place}: several videos in {base} are called {printable(row.name)}; "
                f"give the path from {base} on"
            )
        name = found[at] if at != MISSING else _elsewhere(base, row.name)
        if name is None:
            lost.append(row.name)
        else:
            yield name, row
    if lost:
        counts = f"{len(lost)} of {len(rows)} videos of {rows[0].source}"
        notes.append(f"{counts} are not in {base}: {_some(lost)}")
    if 2 * len(lost) > len(rows):
        raise UserError(f"{notes[-1]}; give the folder that has them with --root, or list what is there")


def _check_folder(name, row, classes, keys):
    """Raise UserError if the video lies in, or is listed under, the folder of another class."""
    for folder in (_parent(name), _parent(row.name)):
        k = keys.get(_squash(folder), row.labels[0])
        if k != row.labels[0]:
            said = classes[row.labels[0]]
            raise UserError(
                f"{row.place}: label {row.labels[0]} ({said}), but the folder of "
                f"{printable(name)} is class {k} ({classes[k]})"
            )


def _pair(base, found, train, test, classes, notes, multilabel=False):
    """(classes, train, test), from the rows of both parts and the names found in base.

    What is on disk is kept, each video once; raises UserError where a label is in doubt and where a
    training video is also a test video.
    """
    multilabel |= any(len(row.labels) > 1 for row in (*train, *test))
    keys, parts, tested = _keys(classes), [], {}
    for rows in (test, train):
        if not rows:
            raise NotThere(f"no videos are listed for the {'training' if parts else 'test'} part")
        kept, twice = {}, []
        for name, row in _on_disk(base, found, _number(rows, classes, multilabel), notes):
            if not multilabel:
                _check_folder(name, row, classes, keys)
            other = tested.get((name, row.span)) or kept.setdefault((name, row.span), row)
            if other is row:
                continue
            if (name, row.span) in tested or other.labels != row.labels:
                raise UserError(
                    f"{row.place}: {printable(name)} is also at {other.place}, with label "
                    f"{_numbers(other.labels)}; keep one of them"
                )
            twice.append(row.name)
        if twice:
            notes.append(f"{len(twice)} repeated videos of {rows[0].source} are dropped: {_some(twice)}")
        tested = kept
        labels = np.zeros((len(kept), len(classes)), dtype=np.uint8)
        for i, row in enumerate(kept.values()):
            labels[i, list(row.labels)] = 1
        labels = labels if multilabel else [row.labels[0] for row in kept.values()]
        spans = [span for _, span in kept] if rows[0].span else None
        parts.append(Part(base, [name for name, _ in kept], labels, None, spans))
    return classes, parts[1], parts[0]


# ---- readers: (root, split, variant, notes) -> classes, train, test --------------------------------


def _folder(root, split, variant, notes):
    """A folder of one's own: list files, or class folders. classes.txt gives the classes' order.

    train.txt and test.txt (or val.txt; lines 'path label') with classes.txt, or train/<class>/ and
    test/<class>/ (or val/<class>/)
    """
    base, found = _find_videos(root, notes)
    train = _part(root, ("train",), found, split, notes)
    test = _part(root, ("test", "val", "validation"), found, split, notes)
    return _pair(base, found, train, test, _own_classes(root, train + test), notes)


def _unlabelled(root, split, variant, notes):
    """A folder of videos without labels. A label in a list is kept, for the log.

    unlabelled.txt or train.txt (lines 'path' or 'path label'), or videos in unlabelled/ or train/, or
    anywhere in the folder
    """
    base, found = _find_videos(root, notes)
    labels = dict.fromkeys([(name, None) for name in found], ())
    for part in ("unlabelled", "train"):
        folders = tuple(f"{folder}/" for folder in _part_folders(part))
        if path := _part_list(root, part, split):
            rows = _on_disk(base, found, _read_list(path, notes), notes)
            labels = {(name, row.span): row.labels for name, row in rows}
            break
        if inside := [name for name in found if name.startswith(folders)]:
            labels = dict.fromkeys([(name, None) for name in inside], ())
            break
    names, spans = zip(*labels, strict=True)
    y = [ys[0] if len(ys) == 1 else -1 for ys in labels.values()]
    return (), Part(base, names, y, None, spans if spans[0] else None), Part(base, [], [])


def _toy(root, split, variant, notes):
    """The embedded set, made where it is not there yet; a folder with list files.

    train.txt and test.txt (lines 'path label') with classes.txt
    """
    toy.make(root, variant)
    return _folder(root, split, variant, notes)


def _own_classes(root, rows):
    """The lines of classes.txt; without it the class folders' names in order, else 0, 1, ..."""
    for name in ("classes.txt", "classInd.txt", "label_map.txt"):
        if os.path.isfile(os.path.join(root, name)):
            return _read_classes(os.path.join(root, name))
    labels = {y: row for row in reversed(rows) for y in row.labels} or {_parent(row.name) for row in rows}
    numbers = sorted(y for y in labels if isinstance(y, int))
    mend = f"or write the names of all classes to {os.path.join(root, 'classes.txt')}"
    for seen, y in enumerate(numbers):
        if y - seen > len(rows):
            raise UserError(
                f"{labels[y].place}: label {y}, but {len(rows)} lines have only {seen} different "
                f"labels below it{_hint(rows)}: correct it, {mend}"
            )
    if _like_frames(rows):
        raise UserError(
            f"{rows[0].source}: labels {numbers[0]} to {numbers[-1]}{_hint(rows)}: correct them "
            f"(lines are 'path label' or 'folder frames label'), {mend}"
        )
    if numbers[:1] == [1]:
        raise UserError(f"{rows[0].source}: the labels begin at 1, but must begin at 0: subtract 1, {mend}")
    return [str(y) for y in range(numbers[-1] + 1)] if numbers else sorted(labels)


def _part(root, names, found, split, notes, read=_read_list):
    """Rows of the part that has one of the `names`: those of its list file, else its class folders."""
    for name in names:
        if path := _part_list(root, name, split):
            return read(path, notes)
    for folder in (folder for name in names for folder in _part_folders(name)):
        source, rows = os.path.join(root, folder), []
        for name in (name for name in found if name.startswith(folder + "/")):
            label = _nfc(name[len(folder) + 1 :]).split("/")[:-1][:1]
            if not label:
                raise NotThere(
                    f"{source} has videos in no class folder, such as {printable(name)}, and no list"
                )
            rows.append(Row(name, tuple(label), source))
        if rows:
            return rows
    raise NotThere(f"{root} has neither a list nor class folders of the {names[0]} part")


def _part_folders(name):
    return name, f"videos_{name}", f"videos/{name}", f"rawframes_{name}", f"rawframes/{name}"


def _part_list(root, name, split):
    """The list file of a part: train.txt, train.csv, or as mmaction2 and others call it; else None."""
    usual = rf"(.*[_-])?{name}([_-]?list)?([_-]split[_-]?{split})?([_-](videos|rawframes))?\.(txt|csv)"
    folders = (Path(root, folder) for folder in ("", "annotations", "splits", "lists"))
    files = [folder / file for folder in folders if folder.is_dir() for file in sorted(os.listdir(folder))]
    exact = [file for file in files if file.name in (f"{name}.txt", f"{name}.csv")]
    alike = [file for file in files if re.fullmatch(usual, file.name.lower())]
    alike = [file for file in alike if "videos" in file.name] or alike
    if not exact and len(alike) > 1:
        raise UserError(f"several lists of the {name} part: {_some([str(file) for file in alike])}; keep one")
    return str((exact + alike)[0]) if exact + alike else None


def _k400(root, split, variant, notes):
    """Kinetics-400 as CVDF, mmaction2, torchvision, PySlowFast and the crawler leave it; test is val.

    train/<class>/*.mp4 and val/<class>/*.mp4 (or videos_train/, videos_val/), or train/*.mp4, val/*.mp4
    with annotations/train.csv and val.csv, or lists such as kinetics400_train_list_videos.txt

    CSV: label,youtube_id,time_start,time_end,...; files <id>_<start>_<end>.mp4 with six digits, or
    <id>.mp4; of rows for the same clip the first counts. The classes are in the order of their names
    with blanks and brackets, however folders are called: without brackets 308 and 309 change places.
    """
    from torchvision.models.video import R3D_18_Weights  # its list of the classes has that order

    base, found = _find_videos(root, notes)
    for name in ("train", "val"):  # where there are videos and the frames of them: the videos
        folders = [f + "/" for f in _part_folders(name) if any(v.startswith(f + "/") for v in found)]
        found = [v for v in found if not v.startswith(tuple(folders[1:]))]
    better = {os.path.basename(v) for v in found if v.startswith("replacement/")}  # for corrupt ones
    found = [v for v in found if v.startswith("replacement/") or os.path.basename(v) not in better]
    stems = {_parts(v)[-1] for v in found}

    def read(path, notes):
        if "youtube_id" not in str(_read_text(path)[:1]):
            return _read_list(path, notes)
        rows = {}
        for n, row in _read_csv(path, "label", "youtube_id", "time_start", "time_end"):
            times = [int(float(row[column])) for column in ("time_start", "time_end")]
            name = "{}_{:06d}_{:06d}".format(row["youtube_id"], *times)
            name = row["youtube_id"] if name not in stems and row["youtube_id"] in stems else name
            rows.setdefault(name, Row(name, (row["label"],), path, n))
        return list(rows.values())

    train = _part(root, ("train",), found, split, notes, read)
    test = _part(root, ("val", "validate", "validation"), found, split, notes, read)
    return _pair(base, found, train, test, R3D_18_Weights.KINETICS400_V1.meta["categories"], notes)


def _ucf101(root, split, variant, notes):
    """UCF-101 with the official lists, or mmaction2's. Groups are the 25 scenes of each class.

    UCF-101/<class>/v_<class>_g<group>_c<clip>.avi (or videos/), ucfTrainTestlist/ (or annotations/) with
    classInd.txt and trainlist01.txt, testlist01.txt, ...

    Lines: '<class>/<file>.avi 35' in trainlists, numbered from 1; no label in testlists. The classes
    are in the order of classInd.txt, which is not the alphabet's: Hammering is before HammerThrow.
    """
    classes, parts = _read_classes(_find_file(root, "classInd.txt")), []
    base, found = _find_videos(root, notes, "UCF-101", "UCF101", "videos", "rawframes")
    for official, other in (("train", "train"), ("test", "val")):
        others = [f"ucf101_{other}_split_{split}_{form}.txt" for form in ("videos", "rawframes")]
        rows = _read_list(path := _find_file(root, f"{official}list0{split}.txt", *others), notes)
        first = 1 if os.path.basename(path).startswith(f"{official}list") else 0
        parts.append([row._replace(labels=tuple(y - first for y in row.labels)) for row in rows])
    _, *parts = _pair(base, found, *parts, classes, notes)
    for i, videos in enumerate(parts):
        scenes = [re.search(r"_g(\d+)_c\d+$", stem_of(videos.names[j])) for j in range(len(videos.names))]
        groups = [100 * k + int(m[1] if m else 0) for k, m in zip(videos.labels, scenes, strict=True)]
        parts[i] = videos._replace(groups=groups)
    return classes, *parts


def _hmdb51(root, split, variant, notes):
    """HMDB-51. hmdb51:all trains on the unused videos too, as VideoSSL's lists do (5236, not 3570).

    hmdb51_org/<class>/<name>.avi (or videos/), testTrainMulti_7030_splits/<class>_test_split1.txt (or
    annotations/)

    Lines: '<name>.avi 1', 1 for train, 2 for test, 0 for unused.
    """
    base, found = _find_videos(root, notes, "hmdb51_org", "hmdb51", "videos", "rawframes")
    end, classes = f"_test_split{split}.txt", []
    for folder in (Path(root, name) for name in ("testTrainMulti_7030_splits", "annotations", "splits", "")):
        if folder.is_dir() and not classes:
            lists = [file for file in os.listdir(folder) if file.endswith(end)]
            classes = sorted(file.removesuffix(end) for file in lists)  # "climb_stairs_test" < "climb_test"!
            lists = [folder / (name + end) for name in classes]
    if not classes:
        raise NotThere(f"no <class>{end} in {root}/testTrainMulti_7030_splits")
    if len(classes) != 51:
        notes.append(f"{root} has lists of {len(classes)} classes, not of 51")
    parts = {"1": [], "2": [], "0": []}
    for k, path in enumerate(lists):
        for n, line in _read_text(path):
            name, flag = line[:-1].strip(), line[-1]
            if flag not in parts or line[-2:-1].strip():
                raise UserError(f"{path}:{n}: {printable(line)!r} does not end in 0, 1 or 2")
            flag = "1" if flag == "0" and variant == "all" else flag
            parts[flag].append(Row(f"{classes[k]}/{name}", (k,), str(path), n))
    return _pair(base, found, parts["1"], parts["2"], classes, notes)


def _ssv2(root, split, variant, notes):
    """Something-Something-v2 under its old and its new file names; test is validation.

    20bn-something-something-v2/<id>.webm (or .mp4, or folders of frames), labels/labels.json,
    train.json and validation.json (or something-something-v2-labels.json, ...)

    {"Holding something next to something": "0", ...} and [{"id": "78687", "template": "Holding
    [something] next to [something]", ...}, ...]
    """
    base, found = _find_videos(root, notes, "20bn-something-something-v2", "videos", "rawframes", "frames")
    paths = [
        _find_file(root, f"something-something-v2-{part}.json", f"{part}.json")
        for part in ("labels", "train", "validation")
    ]
    table, parts = _read_json(paths[0]), []
    for path in paths[1:]:
        parts.append([])
        for item in _read_json(path):
            template = item["template"].replace("[", "").replace("]", "")
            if template not in table:
                raise UserError(f"{path}: video {item['id']}: {template!r} is not in {paths[0]}")
            parts[-1].append(Row(str(item["id"]), (int(table[template]),), path))
    return _pair(base, found, *parts, sorted(table, key=lambda name: int(table[name])), notes)


def _charades(root, split, variant, notes):
    """Charades: a video has several labels, or none.

    Charades_v1_480/<id>.mp4 (or Charades_v1/, Charades_v1_rgb/<id>/), Charades_v1_train.csv,
    Charades_v1_test.csv and Charades_v1_classes.txt

    Column actions: 'c092 11.90 21.20;c147 0.00 12.60'.
    """
    base, found = _find_videos(root, notes, "Charades_v1_480", "Charades_v1", "videos", "Charades_v1_rgb")
    lines = _read_text(_find_file(root, "Charades_v1_classes.txt"))
    classes, parts = [line.partition(" ")[2] for _, line in lines], []
    for part in ("train", "test"):
        path = _find_file(root, f"Charades_v1_{part}.csv")
        parts.append([])
        for n, row in _read_csv(path, "id", "actions"):
            labels = re.findall(r"(?:^|;)\s*c(\d+)", row["actions"])
            if len(labels) != len([action for action in row["actions"].split(";") if action.strip()]):
                raise UserError(f"{path}:{n}: {row['actions']!r} is not like 'c092 11.90 21.20;...'")
            parts[-1].append(Row(row["id"], tuple(sorted(set(map(int, labels)))), path, n))
    return _pair(base, found, *parts, classes, notes, multilabel=True)


def _activitynet(root, split, variant, notes):
    """ActivityNet 1.3 by trimmed segments; activitynet:whole has whole videos with their first label.

    videos/v_<id>.mp4 (or <id>.mp4, .mkv, .webm), activity_net.v1-3.min.json

    {"database": {<id>: {"duration": 137.8, "subset": "training", "annotations": [{"segment": [39.2, 47.6],
    "label": "Making a sandwich"}, ...]}, ...}}. Classes in alphabetical order; test is validation; segments
    end where the video does; those shorter than a frame, and second labels of a segment, are dropped.
    """
    path = _find_file(root, "activity_net.v1-3.min.json", "activity_net.v1-3.json")
    base, found = _find_videos(root, notes, "videos", "v1-3", "train_val", "rawframes")
    names, parts, empty = {_parts(name)[-1][-11:]: name for name in found}, {}, 0
    for key, video in _read_json(path)["database"].items():
        rows, name = parts.setdefault(video["subset"], {}), names.get(key, f"v_{key}")
        for action in video["annotations"][: 1 if variant == "whole" else None]:
            start, end = action["segment"]
            span = max(float(start), 0.0), min(float(end), float(video["duration"]))
            if span[1] - span[0] < 0.04 and variant != "whole":
                empty += 1
                continue
            span = None if variant == "whole" else span
            rows.setdefault((name, span), Row(name, (action["label"],), path, span=span))
    if empty:
        notes.append(f"{empty} empty segments of {path} are dropped")
    train, test = (list(parts[subset].values()) for subset in ("training", "validation"))
    classes = sorted({row.labels[0] for row in (*train, *test)})
    return _pair(base, found, train, test, classes, notes)


READERS = dict(k400=_k400, ucf101=_ucf101, hmdb51=_hmdb51, ssv2=_ssv2, charades=_charades, toy=_toy)
READERS |= {"activitynet": _activitynet, "activitynet:whole": _activitynet, "hmdb51:all": _hmdb51}
READERS |= {f"toy:{variant}": _toy for variant in ("a", "b", "c", "busy", "multi")}
