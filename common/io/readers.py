"""Readers of the data sets people have on disk: a function for each, which gives (classes, {part: Part}).

Each reader has the layout and the formats it reads in its docstring. The rules are the same for all: a video
is a file with a video's suffix, or a folder that holds one series of numbered pictures and nothing else. The
names in a list are looked up among the videos on disk, which may have another suffix, class spelling,
Unicode form or prefix. A listed video that is not on disk is left out with a note. It is an error if more
than half of a list is missing, and if a label is in doubt.
"""

import csv
import io
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
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
NAMES = {"val": ("val", "validation", "validate"), "unlabelled": ("unlabelled", "unlabeled")}  # of parts
DEPTH = 6  # folders below the data set's that are searched, which ends circles of links
MISSING, AMBIGUOUS = -1, -2


class NotThere(UserError):
    """A file or folder is missing; load_data adds the layout that was expected."""


class Part(NamedTuple):
    """The training, test, validation or unlabelled videos: the arguments of Videos.make."""

    root: str
    names: list
    labels: list
    groups: list | None = None
    spans: list | None = None


class Disk(NamedTuple):
    """The videos below a folder, named relative to it."""

    root: str
    names: list


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


# ---- names -----------------------------------------------------------------------------------------


def join_names(names):
    """The first five names, to be printed."""
    return ", ".join(map(printable, names[:5])) + (", ..." if len(names) > 5 else "")


def stem_of(name):
    """A path without a video's suffix; any other dot belongs to the name."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot + suffix.lower() in SUFFIXES else name


def nfc(name):
    """A name in the Unicode form in which names are compared: an accented letter is one character."""
    return unicodedata.normalize("NFC", name)


def forms(name):
    """The spellings under which a file may be found: as given, composed, or decomposed as on a Mac."""
    return dict.fromkeys([name, nfc(name), unicodedata.normalize("NFD", name)])


def path_parts(name):
    """Folders and stem of a path, composed, after one "": "x/Jump/a.avi" gives ["", "x", "Jump", "a"]."""
    parts = [part for part in re.split(r"[\\/]", stem_of(nfc(name))) if part not in ("", ".")]
    return ["", *(parts or [name])]


@lru_cache(maxsize=4096)
def _class_key(name):
    """What all spellings of a class name have in common: letters and digits, in lower case."""
    return re.sub(r"[\W_]+", "", nfc(name).casefold())


def match_names(names, videos):
    """For each name the index of its video, (N,) int: MISSING if there is none, AMBIGUOUS if several.

    Compared in turn: the path; the path without suffix; class folder in any spelling and stem; the stem.
    Names that share a key have no video by it: "b/1.avi" is not the video of "a/1.avi".
    """
    keys = (
        lambda name: name,
        lambda name: "/".join(path_parts(name)),
        lambda name: (_class_key(path_parts(name)[-2]), path_parts(name)[-1]),
        lambda name: path_parts(name)[-1],
    )
    indices = np.full(len(names), MISSING)
    for key_of in keys:
        index_of, counts = {}, Counter(map(key_of, set(names)))
        for i, key in enumerate(map(key_of, videos)):
            index_of[key] = AMBIGUOUS if key in index_of else i
        for i in np.flatnonzero(indices == MISSING):
            key = key_of(names[i])
            indices[i] = index_of.get(key, MISSING) if counts[key] == 1 else MISSING
        if MISSING not in indices:
            break
    return indices


# ---- files -----------------------------------------------------------------------------------------


def scan_videos(root, notes=None):
    """Sorted names, relative to root, of the videos below it; `notes` gets what else is there.

    Hidden files are skipped, links are followed.
    """
    videos, folders, left_out = [], [""], Counter()
    while folders:
        folder = folders.pop()
        if folder and _is_series(os.path.join(root, folder)):
            videos.append(folder)
            continue
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name, lower = os.path.join(folder, entry.name), entry.name.lower()
                if _is_hidden(lower):
                    continue
                if lower.endswith(SUFFIXES) and entry.is_file():
                    videos.append(name)
                elif entry.is_dir() and name.count("/") < DEPTH:
                    folders.append(name)
                elif entry.is_dir():
                    left_out[f"folders more than {DEPTH} levels down in {folder}"] += 1
                elif lower.endswith(PICTURES):
                    left_out[f"pictures in {folder or '.'}, which is not one numbered series alone"] += 1
                elif not lower.endswith((*SUFFIXES, *LISTS)):
                    left_out[os.path.splitext(lower)[1] or entry.name] += 1
    if left_out and notes is not None:
        counts = [f"{count} {kind}" for kind, count in sorted(left_out.items())]
        notes.append(f"files in {root} that are not videos are left out: {join_names(counts)}")
    return sorted(videos, key=lambda name: (nfc(name), name))


def _is_hidden(lower):
    return lower.startswith(".") or lower in HIDDEN


def _is_series(folder):
    """Whether a folder holds numbered pictures of one series, and else only hidden files and optical flow."""
    patterns = set()
    with os.scandir(folder) as entries:
        for name in (entry.name.lower() for entry in entries if not _is_hidden(entry.name.lower())):
            stem, suffix = os.path.splitext(name)
            pattern = re.sub(r"\d+", "#", stem)
            if suffix not in PICTURES or pattern == stem:
                return False
            patterns.add("flow" if FLOW.match(name) else pattern)
            if len(patterns - {"flow"}) > 1:
                return False
    return bool(patterns)


def _find_videos(root, notes, *folders):
    """The Disk of the first of the folders in root that has videos, else of root itself."""
    for folder in (*folders, ""):
        base, left_out = str(Path(root, folder)), []
        if os.path.isdir(base) and (names := scan_videos(base, left_out)):
            notes += left_out
            return Disk(base, names)
    kinds = f"{', '.join(SUFFIXES[:4])}, ... or folders of numbered pictures"
    raise NotThere("; ".join([f"no videos ({kinds}) in {root}", *left_out]))


def _find_file(root, *names):
    """The first of the files that is in root, or in the folders lists usually are in."""
    for folder in ("", "annotations", "labels", "ucfTrainTestlist"):
        for path in (Path(root, folder, name) for name in names):
            if path.is_file():
                return str(path)
    raise NotThere(f"no {' or '.join(names)} in {root} or {root}/annotations")


def _open_text(path):
    """A text file in UTF-8, with or without BOM; names in it may hold bytes that are not UTF-8."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if b"\0" in content:
        raise UserError(f"{path} is not UTF-8: it is UTF-16, or no text; save it as UTF-8")
    return io.StringIO(content.decode("utf-8-sig", "surrogateescape"), newline=None)


def _read_text(path):
    """(line number, line) of the lines of a text file that are not blank, without BOM and CR LF."""
    return [(n, line.strip()) for n, line in enumerate(_open_text(path), 1) if line.strip()]


def _read_csv(path, *columns):
    """(line number, dict) of the rows of a CSV file that has a header with these columns."""
    reader = csv.DictReader(_open_text(path))
    for row in reader:
        if any(row.get(column) is None for column in columns):
            raise UserError(f"{path}:{reader.line_num}: the columns {', '.join(columns)} are expected")
        yield reader.line_num, row


# ---- lists -----------------------------------------------------------------------------------------

# The integers that end a line, after commas, tabs or blanks, but not after a mixture of them.
NUMBERS = re.compile(r"(( *, *-?\d+)+|( *\t\s*-?\d+)+|( +-?\d+)+)[\s,]*$")


def read_list(path, notes):
    """Rows of a list file. Separators are blanks, tabs or commas; labels are integers from 0.

        path label        path label label ...       several labels: a multi-label data set
        folder label      folder frames label ...    a folder of pictures
        folder start frames label                    in every line: pictures start, start + 1, ... of those
        path                                         a file without label, or the class folder is the label

    Paths may hold blanks and everything else ("#" begins no comment). start counts from 0, in the order of
    the pictures, as the offset of MMAction2's with_offset=True does.
    """
    path, rows = os.fspath(path), []
    for n, line in _read_text(path):
        match = NUMBERS.search(line)
        name = line[: match.start() if match else None].strip('", \t')
        rows.append(Row(name, tuple(map(int, re.findall(r"-?\d+", match[0]))) if match else (), path, n))
    if not rows:
        raise UserError(f"{path} is empty; lines 'path label' are expected")
    is_folder = [stem_of(row.name) == row.name for row in rows]
    if all(is_folder) and all(len(row.labels) == 3 and row.labels[1] > 0 <= row.labels[0] for row in rows):
        notes.append(f"the lines of {path} are read as folder, start, frames, label")
        for i, row in enumerate(rows):  # half a picture early, so that no rounding matters
            start, frames, label = row.labels
            span = (start - 0.5) / FPS, (start + frames - 0.5) / FPS
            rows[i] = row._replace(labels=(label,), span=span)
        return rows
    has_labels = any(row.labels for row in rows)
    for i in np.flatnonzero(is_folder):
        if has_labels and not rows[i].labels:
            name = printable(rows[i].name)
            raise UserError(f"{rows[i].place}: {name!r} is not followed by an integer label")
        rows[i] = rows[i]._replace(labels=rows[i].labels[1:] or rows[i].labels)
    return rows


def _read_classes(path):
    """Class names, one a line, with or without numbers in front ("1 ApplyEyeMakeup")."""
    names = [nfc(line) for _, line in _read_text(path)]
    numbered = [re.fullmatch(r"(\d+)[\s:,]+(.+)", name) for name in names]
    if all(numbered) and [int(m[1]) - int(numbered[0][1]) for m in numbered] == list(range(len(names))):
        names = [m[2] for m in numbered]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: {Counter(names).most_common(1)[0][0]} is there twice")
    return names


def _own_classes(root, rows):
    """The lines of classes.txt; without it the class folders' names in order, or "0", "1", ... of lists."""
    if os.path.isfile(path := os.path.join(root, "classes.txt")):
        return _read_classes(path)
    rows_of = {label: row for row in reversed(rows) for label in row.labels}
    numbers = {label for label in rows_of if isinstance(label, int)}
    if not numbers:
        return sorted(rows_of or {path_parts(row.name)[-2] for row in rows})
    unused, largest = min(set(range(len(numbers) + 1)) - numbers), max(numbers)
    if unused < largest:
        raise UserError(
            f"{rows_of[largest].place}: label {largest}, but no line has label {unused}; labels count from 0 "
            f"and end a line (path label, folder frames label): correct them, or write all classes to {path}"
        )
    return list(map(str, range(unused)))


def _rows_of(disk, part, split, notes, read=read_list):
    """Rows of a part: of its list, else of its folder, with class folders as labels if there are any; or [].

    The list is train.txt, train.csv, or called as by mmaction2 and others.
    """
    names = NAMES.get(part, (part,))
    usual = rf"({'|'.join(names)})([_-]?list)?([_-]split[_-]?{split})?([_-](videos|rawframes))?\.(txt|csv)"
    folders = [folder for folder in (Path(disk.root), Path(disk.root, "annotations")) if folder.is_dir()]
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    lists = [file for file in files if re.fullmatch(rf"(.*[_-])?{usual}", file.name.lower())]
    exact = [file for file in lists if file.stem in names][:1]
    lists = exact or [file for file in lists if "videos" in file.name] or lists
    if len(lists) > 1:
        raise UserError(f"several lists of the {part} part: {join_names(list(map(str, lists)))}; keep one")
    if lists:
        return read(str(lists[0]), notes)
    rows, layouts = [], ("{}", "videos_{}", "videos/{}", "rawframes_{}", "rawframes/{}")
    for folder in (layout.format(name) for layout in layouts for name in names):
        for name in disk.names if not rows else ():
            if name.startswith(f"{folder}/"):
                class_name = nfc(name[len(folder) + 1 :]).split("/")[:-1][:1]
                rows.append(Row(name, tuple(class_name), os.path.join(disk.root, folder)))
    return rows


# ---- from rows to parts ----------------------------------------------------------------------------


def _on_disk(disk, rows, notes):
    """[(name relative to disk.root, row)] of the rows whose video is there; a note has the others."""
    names, located, missing = [row.name for row in rows], [], []
    for prefix in forms(os.path.join(os.path.abspath(disk.root), "")):
        names = [name.removeprefix(prefix) for name in names]
    for row, i in zip(rows, match_names(names, disk.names), strict=True):
        leads_out = i == MISSING and (os.path.isabs(row.name) or ".." in row.name.split("/"))
        spellings = forms(row.name) if leads_out else ()
        elsewhere = [name for name in spellings if os.path.exists(os.path.join(disk.root, name))]
        if i == AMBIGUOUS:
            called = f"several videos in {disk.root} are called {printable(row.name)}"
            raise UserError(f"{row.place}: {called}; give the path from {disk.root} on")
        if i != MISSING or elsewhere:
            located.append((disk.names[i] if i != MISSING else elsewhere[0], row))
        else:
            missing.append(row.name)
    if missing:
        counts = f"{len(missing)} of {len(rows)} videos of {rows[0].source}"
        notes.append(f"{counts} are not in {disk.root}: {join_names(missing)}")
    if 2 * len(missing) > len(rows):
        raise UserError(f"{notes[-1]}; give the folder that has them with --root, or list what is there")
    return located


def _number_labels(row, name, classes, label_of, multilabel):
    """The labels of a row as integers; of one without, the class of its folder.

    Raises UserError for a label that is no class, and for one that is not that of the folder of the video,
    which is called `name`, or of the folder it is listed under.
    """
    folders = [path_parts(path)[-2] for path in (row.name, name)]
    labels = row.labels or (() if multilabel else (folders[0],))
    numbers = tuple(y if isinstance(y, int) else label_of.get(_class_key(y), -1) for y in labels)
    for label, number in zip(labels, numbers, strict=True):
        if not 0 <= number < len(classes):
            last = len(classes) - 1
            right = f"0 to {last}: labels count from 0" if label == number else join_names(classes)
            wrong = f"label {label}"
            if not row.labels:
                wrong = f"{row.name!r} is not followed by an integer label, and its folder {label!r}"
            raise UserError(f"{row.place}: {printable(wrong)} is not one of {right}")
    for label in () if multilabel else (label_of.get(_class_key(folder), numbers[0]) for folder in folders):
        if label != numbers[0]:
            raise UserError(
                f"{row.place}: label {numbers[0]} ({classes[numbers[0]]}), but the folder of "
                f"{printable(name)} is class {label} ({classes[label]})"
            )
    return numbers


def _build(disk, rows_of, classes, notes, multilabel=False):
    """(classes, {part: Part}), from {part: rows} and the videos on disk, each of which is kept once.

    Unlabelled videos have label -1, or no class in a multi-label data set; those of other parts are dropped.
    Raises UserError where a label is in doubt, and where a test or validation video is in another part too.
    """
    multilabel |= any(len(row.labels) > 1 for rows in rows_of.values() for row in rows)
    counts, parts, first_rows = Counter(map(_class_key, classes)), {}, {}
    label_of = {_class_key(name): k for k, name in enumerate(classes) if counts[_class_key(name)] == 1}
    for part in ("test", "val", "train", "unlabelled"):
        labels_of, repeated, rows = {}, [], rows_of.get(part, [])
        if not rows and part in ("test", "train") and part in rows_of:
            raise NotThere(f"no videos are listed for the {part} part")
        if bare := [row for row in rows if not (row.labels or row.line or part == "unlabelled")]:
            name = printable(bare[0].name)
            raise NotThere(f"{bare[0].source} has videos in no class folder, such as {name}, and no list")
        for name, row in _on_disk(disk, rows, notes):
            if part != "unlabelled":
                row = row._replace(labels=_number_labels(row, name, classes, label_of, multilabel))
            first_part, first = first_rows.setdefault((name, row.span), (part, row))
            if first is row:
                labels_of[name, row.span] = row.labels
                continue
            if part != "unlabelled" and (first_part, first.labels) != (part, row.labels):
                labels = " ".join(map(str, first.labels)) or "none"
                place = f"{printable(name)} is also at {first.place}, with label {labels}"
                raise UserError(f"{row.place}: {place}; keep one of them")
            repeated.append(row.name)
        if repeated:
            repetition = f"{len(repeated)} repeated videos of {rows[0].source}"
            notes.append(f"{repetition} are dropped: {join_names(repeated)}")
        labels = [labels[0] if labels else -1 for labels in labels_of.values()]
        if multilabel:
            labels = [[k in labels for k in range(len(classes))] for labels in labels_of.values()]
            labels = np.array(labels, dtype=np.uint8).reshape(-1, len(classes))
        spans = [span for _, span in labels_of] if rows and rows[0].span else None
        parts[part] = Part(disk.root, [name for name, _ in labels_of], labels, None, spans)
    return classes, parts


# ---- readers: (root, split, variant, notes) -> classes, {part: Part} -------------------------------


def read_folder(root, split, variant, notes):
    """A folder of one's own: list files, or class folders. classes.txt gives the classes' order.

    train.txt and test.txt (or val.txt; lines 'path label') with classes.txt, or train/<class>/ and
    test/<class>/ (or val/<class>/); unlabelled.txt or unlabelled/ for more training videos

    Beside a test part, the val part is for validation. Lines of train.txt without a label are unlabelled
    videos if others have one.
    """
    disk = _find_videos(root, notes)
    train, test, val, unlabelled = (
        _rows_of(disk, part, split, notes) for part in ("train", "test", "val", "unlabelled")
    )
    for part, rows in (("train", train), ("test", test or val)):
        if not rows:
            raise NotThere(f"{root} has neither a list nor class folders of the {part} part")
    if any(row.labels and row.line for row in train):
        unlabelled = [row for row in train if not row.labels] + unlabelled
        train = [row for row in train if row.labels]
    classes = _own_classes(root, train + test + val)
    rows_of = dict(train=train, test=test or val, val=val if test else [])
    rows_of["unlabelled"] = [row._replace(labels=()) for row in unlabelled]
    return _build(disk, rows_of, classes, notes)


def read_unlabelled_folder(root, split, variant, notes):
    """A folder of videos without labels, as the training part. A label in a list is kept, for the log.

    unlabelled.txt or train.txt (lines 'path' or 'path label'), or videos in unlabelled/ or train/, or
    anywhere in the folder
    """
    disk = _find_videos(root, notes)
    rows = _rows_of(disk, "unlabelled", split, notes) or _rows_of(disk, "train", split, notes)
    rows = rows or [Row(name, (), root) for name in disk.names]
    rows = [row if row.line and len(row.labels) == 1 else row._replace(labels=()) for row in rows]
    _, parts = _build(disk, {"unlabelled": rows}, (), notes)
    return (), {"train": parts["unlabelled"]}


def read_toy(root, split, variant, notes):
    """The embedded set, made where it is not there yet; a folder with list files.

    train.txt, val.txt and test.txt (lines 'path label') with classes.txt
    """
    toy.make(root, variant)
    return read_folder(root, split, variant, notes)


def read_k400(root, split, variant, notes):
    """Kinetics-400 as CVDF, mmaction2, torchvision, PySlowFast and the crawler leave it; test is val.

    train/<class>/*.mp4 and val/<class>/*.mp4 (or videos_train/, videos_val/), or train/*.mp4, val/*.mp4
    with annotations/train.csv and val.csv, or lists such as kinetics400_train_list_videos.txt

    CSV: label,youtube_id,time_start,time_end,...; files <id>_<start>_<end>.mp4 with six digits, or
    <id>.mp4; of rows for the same clip the first counts. The classes are in the order of their names
    with blanks and brackets, however folders are called: without brackets 308 and 309 change places.
    """
    # Slow to import, and needed by this data set alone: the classes in that order.
    from torchvision.models.video import R3D_18_Weights

    base, names = _find_videos(root, notes)
    if any(name.startswith("videos") for name in names):  # beside the frames of the same videos
        names = [name for name in names if not name.startswith("rawframes")]
    replaced = {os.path.basename(name) for name in names if name.startswith("replacement/")}  # corrupt files
    names = [v for v in names if v.startswith("replacement/") or os.path.basename(v) not in replaced]
    disk, stems = Disk(base, names), {path_parts(name)[-1] for name in names}

    def read(path, notes):
        if "youtube_id" not in str(_read_text(path)[:1]):
            return read_list(path, notes)
        rows = {}
        for n, row in _read_csv(path, "label", "youtube_id", "time_start", "time_end"):
            times = [int(float(row[column])) for column in ("time_start", "time_end")]
            name = "{}_{:06d}_{:06d}".format(row["youtube_id"], *times)
            name = row["youtube_id"] if name not in stems and row["youtube_id"] in stems else name
            rows.setdefault(name, Row(name, (row["label"],), path, n))
        return list(rows.values())

    rows_of = {
        part: _rows_of(disk, name, split, notes, read) for part, name in (("train", "train"), ("test", "val"))
    }
    return _build(disk, rows_of, R3D_18_Weights.KINETICS400_V1.meta["categories"], notes)


def read_ucf101(root, split, variant, notes):
    """UCF-101 with the official lists, or mmaction2's. Groups are the 25 scenes of each class.

    UCF-101/<class>/v_<class>_g<group>_c<clip>.avi (or videos/), ucfTrainTestlist/ (or annotations/) with
    classInd.txt and trainlist01.txt, testlist01.txt, ...

    Lines: '<class>/<file>.avi 35' in trainlists, numbered from 1; no label in testlists. The classes
    are in the order of classInd.txt, which is not the alphabet's: Hammering is before HammerThrow.
    """
    classes, rows_of = _read_classes(_find_file(root, "classInd.txt")), {}
    disk = _find_videos(root, notes, "UCF-101", "UCF101", "videos", "rawframes")
    for part, mmaction in (("train", "train"), ("test", "val")):
        names = [f"ucf101_{mmaction}_split_{split}_{form}.txt" for form in ("videos", "rawframes")]
        rows = read_list(path := _find_file(root, f"{part}list0{split}.txt", *names), notes)
        first = 1 if os.path.basename(path).startswith(f"{part}list") else 0
        rows_of[part] = [row._replace(labels=tuple(y - first for y in row.labels)) for row in rows]
    _, parts = _build(disk, rows_of, classes, notes)
    for part, videos in parts.items():
        scenes = [re.search(r"_g(\d+)_c\d+$", stem_of(name)) for name in videos.names]
        groups = [100 * k + int(m[1] if m else 0) for k, m in zip(videos.labels, scenes, strict=True)]
        parts[part] = videos._replace(groups=groups)
    return classes, parts


def read_hmdb51(root, split, variant, notes):
    """HMDB-51. hmdb51:all trains on the unused videos too, as VideoSSL's lists do (5236, not 3570).

    hmdb51_org/<class>/<name>.avi (or videos/), testTrainMulti_7030_splits/<class>_test_split1.txt (or
    annotations/)

    Lines: '<name>.avi 1', 1 for train, 2 for test, 0 for unused.
    """
    disk = _find_videos(root, notes, "hmdb51_org", "hmdb51", "videos", "rawframes")
    end, lists = f"_test_split{split}.txt", []
    for folder in ("testTrainMulti_7030_splits", "annotations", ""):
        lists = lists or list(Path(root, folder).glob(f"*{end}"))
    lists.sort(key=lambda path: path.name.removesuffix(end))  # "climb_stairs_test" < "climb_test"!
    classes = [path.name.removesuffix(end) for path in lists]
    if not classes:
        raise NotThere(f"no <class>{end} in {root}/testTrainMulti_7030_splits")
    if len(classes) != 51:
        notes.append(f"{root} has lists of {len(classes)} classes, not of 51")
    part_of = {"1": "train", "2": "test", "0": "train" if variant == "all" else "unused"}
    rows_of = {"train": [], "test": [], "unused": []}
    for k, path in enumerate(lists):
        for n, line in _read_text(path):
            name, flag = line[:-1].rstrip(), line.split()[-1]
            if flag not in part_of:
                raise UserError(f"{path}:{n}: {printable(line)!r} does not end in 0, 1 or 2")
            rows_of[part_of[flag]].append(Row(f"{classes[k]}/{name}", (k,), str(path), n))
    return _build(disk, rows_of, classes, notes)


def read_ssv2(root, split, variant, notes):
    """Something-Something-v2 under its old and its new file names; test is validation.

    20bn-something-something-v2/<id>.webm (or .mp4, or folders of frames), labels/labels.json,
    train.json and validation.json (or something-something-v2-labels.json, ...)

    {"Holding something next to something": "0", ...} and [{"id": "78687", "template": "Holding
    [something] next to [something]", ...}, ...]
    """
    disk = _find_videos(root, notes, "20bn-something-something-v2", "videos", "rawframes", "frames")
    labels_path, *paths = (
        _find_file(root, f"something-something-v2-{name}.json", f"{name}.json")
        for name in ("labels", "train", "validation")
    )
    label_of, rows_of = json.load(_open_text(labels_path)), {"train": [], "test": []}
    for path, rows in zip(paths, rows_of.values(), strict=True):
        for video in json.load(_open_text(path)):
            template = video["template"].replace("[", "").replace("]", "")
            if template not in label_of:
                raise UserError(f"{path}: video {video['id']}: {template!r} is not in {labels_path}")
            rows.append(Row(str(video["id"]), (int(label_of[template]),), path))
    return _build(disk, rows_of, sorted(label_of, key=lambda name: int(label_of[name])), notes)


def read_charades(root, split, variant, notes):
    """Charades: a video has several labels, or none.

    Charades_v1_480/<id>.mp4 (or Charades_v1/, Charades_v1_rgb/<id>/), Charades_v1_train.csv,
    Charades_v1_test.csv and Charades_v1_classes.txt

    Column actions: 'c092 11.90 21.20;c147 0.00 12.60'.
    """
    disk = _find_videos(root, notes, "Charades_v1_480", "Charades_v1", "videos", "Charades_v1_rgb")
    lines = _read_text(_find_file(root, "Charades_v1_classes.txt"))
    classes, rows_of = [line.partition(" ")[2] for _, line in lines], {"train": [], "test": []}
    for part, rows in rows_of.items():
        path = _find_file(root, f"Charades_v1_{part}.csv")
        for n, row in _read_csv(path, "id", "actions"):
            labels = re.findall(r"(?:^|;)\s*c(\d+)", row["actions"])
            if len(labels) != len([action for action in row["actions"].split(";") if action.strip()]):
                raise UserError(f"{path}:{n}: {row['actions']!r} is not like 'c092 11.90 21.20;...'")
            rows.append(Row(row["id"], tuple(sorted(set(map(int, labels)))), path, n))
    return _build(disk, rows_of, classes, notes, multilabel=True)


def read_activitynet(root, split, variant, notes):
    """ActivityNet 1.3 by trimmed segments; activitynet:whole has whole videos with their first label.

    videos/v_<id>.mp4 (or <id>.mp4, .mkv, .webm), activity_net.v1-3.min.json

    {"database": {<id>: {"duration": 137.8, "subset": "training", "annotations": [{"segment": [39.2, 47.6],
    "label": "Making a sandwich"}, ...]}, ...}}. Classes in alphabetical order; test is validation; segments
    end where the video does; those shorter than a frame, and second labels of a segment, are dropped.
    """
    path = _find_file(root, "activity_net.v1-3.min.json", "activity_net.v1-3.json")
    disk = _find_videos(root, notes, "videos", "v1-3", "train_val", "rawframes")
    name_of, n_empty = {path_parts(name)[-1][-11:]: name for name in disk.names}, 0
    rows_of = defaultdict(dict)
    for key, video in json.load(_open_text(path))["database"].items():
        name = name_of.get(key, f"v_{key}")
        for action in video["annotations"][: 1 if variant == "whole" else None]:
            start, end = action["segment"]
            span = max(float(start), 0.0), min(float(end), float(video["duration"]))
            if span[1] - span[0] < 0.04 and variant != "whole":
                n_empty += 1
                continue
            span = None if variant == "whole" else span
            row = Row(name, (action["label"],), path, span=span)
            rows_of[video["subset"]].setdefault((name, span), row)
    if n_empty:
        notes.append(f"{n_empty} empty segments of {path} are dropped")
    rows_of = {"train": list(rows_of["training"].values()), "test": list(rows_of["validation"].values())}
    classes = sorted({row.labels[0] for rows in rows_of.values() for row in rows})
    return _build(disk, rows_of, classes, notes)


READERS = dict(k400=read_k400, ucf101=read_ucf101, hmdb51=read_hmdb51, ssv2=read_ssv2, charades=read_charades)
READERS |= {"activitynet": read_activitynet, "activitynet:whole": read_activitynet, "hmdb51:all": read_hmdb51}
READERS |= dict.fromkeys(["toy", *(f"toy:{variant}" for variant in toy.VARIANTS if variant)], read_toy)
