"""Which videos, which labels: a data set, its labelled subset, and lists of both."""

import csv
import dataclasses
import hashlib
import math
import os
import warnings

import numpy as np

from common.errors import UserError, printable
from common.io.decode import FPS
from common.io.readers import (
    AMBIGUOUS,
    MISSING,
    READERS,
    NotThere,
    join_names,
    match_names,
    nfc,
    read_folder,
    read_list,
    read_unlabelled_folder,
    stem_of,
)
from common.run import agreed

PER_CLASS = {("k400", 0.01): 6, ("k400", 0.1): 60, ("ucf101", 0.01): 1, ("ucf101", 0.1): 10}


# ---- videos and data -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Videos:
    """A list of videos in a few arrays, which a worker gets at once; made by Videos.make.

    labels: (N,) int64, -1 for none, or (N, K) uint8 with a one for each class of the video; groups: (N,)
    int32 or None, clips of a group show one scene; spans: (N, 2) float64 seconds (start, end) or None; flow:
    the folder of their extracted optical flow, or None.
    """

    root: str
    blob: bytes
    offsets: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None
    spans: np.ndarray | None = None
    flow: str | None = None

    @classmethod
    def make(cls, root, names, labels, groups=None, spans=None, flow=None):
        """From names relative to root, and the other fields in any array form."""
        names = [os.fsencode(name) for name in names]
        offsets = np.cumsum([0, *map(len, names)], dtype=np.int64)
        labels = np.asarray(labels, dtype=np.uint8 if np.ndim(labels) == 2 else np.int64)
        groups = None if groups is None else np.asarray(groups, dtype=np.int32)
        spans = None if spans is None else np.asarray(spans, dtype=np.float64).reshape(-1, 2)
        if any(x is not None and len(x) != len(names) for x in (labels, groups, spans)):
            raise ValueError("names, labels, groups and spans differ in length")
        return cls(os.fspath(root), b"".join(names), offsets, labels, groups, spans, flow)

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """Path relative to root: "Biking/v_Biking_g01_c04.avi"."""
        i = range(len(self))[i]
        return os.fsdecode(self.blob[self.offsets[i] : self.offsets[i + 1]])

    def path(self, i):
        return os.path.join(self.root, self.name(i))

    def span(self, i):
        """(start, end) in seconds if only that part of the file counts, else None."""
        return None if self.spans is None else (float(self.spans[i, 0]), float(self.spans[i, 1]))

    def classes(self, i):
        """The labels of a video, a list: one, or any number where videos have several; [-1] if unlabelled."""
        return np.flatnonzero(self.labels[i]).tolist() if self.labels.ndim == 2 else [int(self.labels[i])]

    def lines(self, indices=None):
        """What tells the videos `indices`, or all, from others: lines "name label", with the span if any."""
        which = range(len(self)) if indices is None else indices
        spans = [""] * len(self) if self.spans is None else [f" {a} {b}" for a, b in self.spans.tolist()]
        labels = self.labels.tolist()
        return [f"{nfc(self.name(i))} {labels[i]}{spans[i]}" for i in which]

    def subset(self, indices):
        """The videos `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        fields = [None if x is None else x[indices] for x in (self.labels, self.groups, self.spans)]
        return Videos.make(self.root, [self.name(i) for i in indices], *fields, self.flow)

    def joined(self, others):
        """These videos and then `others` of the same root; without groups."""
        if not len(others):
            return self
        names = [videos.name(i) for videos in (self, others) for i in range(len(videos))]
        spans = [np.tile((0, np.inf), (len(x), 1)) if x.spans is None else x.spans for x in (self, others)]
        spans = None if self.spans is None is others.spans else np.concatenate(spans)
        labels = np.concatenate([self.labels, others.labels])
        return Videos.make(self.root, names, labels, None, spans, self.flow)


NO_VIDEOS = Videos.make("", [], [])


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """A data set.

    flip: may a clip be mirrored without changing its label; notes: sentences to print; val: videos to tune
    on, often none; unlabelled: training videos without a label, often none. Their labels are -1 (or no class
    where videos have several), and no accuracy can be measured on them.
    """

    name: str
    split: int
    classes: tuple[str, ...]
    train: Videos
    test: Videos
    multilabel: bool
    flip: bool
    notes: tuple[str, ...]
    val: Videos = NO_VIDEOS
    unlabelled: Videos = NO_VIDEOS

    @property
    def pool(self):
        """All training videos: those of `train` and then the unlabelled ones."""
        return self.train.joined(self.unlabelled)

    def parts(self):
        """{field: its Videos}, of those parts that have any."""
        parts = {part: getattr(self, part) for part in ("train", "test", "val", "unlabelled")}
        return {part: videos for part, videos in parts.items() if len(videos)}

    def lists(self):
        """What must be the same on all ranks, {what: list of lines}."""
        parts = dict(training=self.train, test=self.test, validation=self.val, unlabelled=self.unlabelled)
        return {f"{part} videos": parts[part].lines() for part in parts} | {"classes": list(self.classes)}

    def paths(self):
        """Sorted paths of all files."""
        return sorted({videos.path(i) for videos in self.parts().values() for i in range(len(videos))})

    def with_flow(self, folder):
        """The same, with the optical flow of its videos in `folder`."""
        parts = {part: dataclasses.replace(videos, flow=folder) for part, videos in self.parts().items()}
        return dataclasses.replace(self, **parts)


KEPT = {}  # arguments of the last `load_data(..., keep=True)` -> its Data


def load_data(name, root=None, split=1, labels=True, keep=False):
    """Read the data set `name`: one of READERS, or a folder with list files or class folders.

    root: where it is, data/<name> if None. labels=False: a folder needs no labels; then `train` are its
    videos, of label -1 where none is known, and `test` and `classes` are empty.
    keep: the next call with these
    arguments returns the same Data and does not read the folder again. Raises UserError if the data set is
    not there or not as expected.
    """
    name, key = os.fspath(name), (name, root, split, labels)
    if key in KEPT and not keep:
        return KEPT.pop(key)
    is_folder = name not in READERS
    if is_folder and not os.path.isdir(name):
        raise UserError(f"there is no data set or folder {name}; the data sets are {', '.join(READERS)}")
    reader = READERS.get(name, read_folder if labels else read_unlabelled_folder)
    kind, _, variant = ("folder", "", "") if is_folder else name.partition(":")
    root, n_splits = os.fspath(root or default_root(name)), 3 if kind in ("ucf101", "hmdb51") else 1
    if split not in range(1, n_splits + 1):
        raise UserError(f"--split {split}: {name} has {'1, 2 and 3' if n_splits == 3 else 'only split 1'}")
    layout = " ".join((reader.__doc__ or "\n\n").split("\n\n")[1].split())  # also under python -OO
    notes = []
    try:
        if kind != "toy" and not os.path.isdir(root):
            raise NotThere(f"there is no folder {root} (another place is given with --root)")
        classes, parts = reader(root, split, variant, notes)
        videos = {part: Videos.make(*fields) for part, fields in parts.items()}
    except NotThere as error:
        raise UserError(f"{error}; {name} is expected as {layout}") from None
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:  # JSON or CSV of another form
        raise UserError(f"the annotations in {root} are not those of {name}: {error!r}") from error
    folder = os.path.basename(os.path.abspath(name))
    if is_folder and folder not in READERS:  # one that is called like a data set keeps its path as name
        name = folder
    multilabel, flip = videos["train"].labels.ndim == 2, kind not in ("toy", "ssv2")
    videos = {"test": NO_VIDEOS} | videos
    data = Data(name, split, tuple(classes), multilabel=multilabel, flip=flip, notes=tuple(notes), **videos)
    if keep:
        KEPT.clear()
        KEPT[key] = data
    return data


def load_everything(name, root, split):
    """(root, Data) with every video of a data set, of hmdb51 those of no split; its notes are printed."""
    name = "hmdb51:all" if name == "hmdb51" else name
    root = root or default_root(name)
    data = load_data(name, root, split)
    for note in data.notes if os.environ.get("RANK", "0") == "0" else ():
        print(printable(note), flush=True)
    return root, data


def default_root(name):
    """Where a data set is if nobody says otherwise: data/<name>, or the folder itself."""
    kind, _, variant = name.partition(":")
    folder = os.path.join("data", f"toy_{variant}" if kind == "toy" and variant else kind)
    return folder if name in READERS else name


# ---- labelled subsets ------------------------------------------------------------------------------


def labelled_subset(data, ratio=None, per_class=None, seed=0, listfile=None):
    """Which training videos keep their labels: sorted int64 indices into data.train, by one of three.

    ratio in (0, 1]: the same number of each class, as in PER_CLASS where papers agree on one, else
    ceil(ratio x mean class size); 1 means all. per_class: that number of each class. A class that has
    fewer gives all, with a warning. The draw follows from (data set, split, ratio or per_class, seed) and
    the names without suffix; all folders of one's own count as one data set, whatever they are called. With
    several labels per video, ratio of all videos is drawn, unbalanced.
    listfile: the videos of a list (see read_list), found by name with or without suffix, folder or
    prefix. It is the data's labels that count; a list with others is refused, or, up to a tenth of
    its lines, warned of, as is a list with other names.
    """
    if [ratio, per_class, listfile].count(None) != 2:
        raise UserError("give exactly one of --ratio, --per_class and --labelled_list")
    if listfile is not None:
        return _subset_of_list(data, listfile)
    videos, n = data.train, len(data.train)
    if ratio is not None and not 0 < ratio <= 1:
        raise UserError(f"--ratio {ratio} is not in (0, 1]: 0.01 is one per cent, 1 is all videos")
    if per_class is not None and per_class < 1:
        raise UserError(f"--per_class {per_class} is less than 1")
    if per_class is not None and data.multilabel:
        raise UserError(f"--per_class: the videos of {data.name} have several labels, use --ratio")
    if ratio == 1:
        return np.arange(n)
    name = data.name if data.name in READERS else "folder"
    key = f"{name}|{data.split}|{per_class if ratio is None else ratio}|{seed}"
    rng = np.random.default_rng(list(hashlib.sha256(key.encode()).digest()))
    if ratio is not None:
        mean = n if data.multilabel else n / len(data.classes)
        count = math.ceil(ratio * mean - 1e-9)  # 0.1 x 30 is 3, whatever the last bit says
        per_class = PER_CLASS.get((name, ratio), count)
    order = sorted(range(n), key=lambda i: (nfc(stem_of(videos.name(i))), videos.span(i)))
    order = np.array(order, dtype=np.int64)
    if data.multilabel:
        return np.sort(rng.permutation(order)[:per_class])
    members = [order[videos.labels[order] == k] for k in range(len(data.classes))]
    small = [f"{data.classes[k]} ({len(x)})" for k, x in enumerate(members) if len(x) < per_class]
    if small:
        sentence = f"{len(small)} classes have fewer than {per_class} videos: {join_names(small)}"
        warnings.warn(sentence, stacklevel=2)
    return np.sort(np.concatenate([rng.permutation(indices)[:per_class] for indices in members]))


def semi_supervised(data, ratio, per_class, seed, listfile, unlabelled="rest", say=print):
    """(labelled, unlabelled) Videos: the labelled subset, and the "rest" of data.pool, or "all" of it.

    The rest is all of it, too, where every video has a label. Unlabelled videos whose label is known keep it,
    for measuring pseudo-labels; of the others it is -1. The counts and data.notes are printed by `say`.
    """
    labelled = agreed(labelled_subset, data, ratio, per_class, seed, listfile)
    pool = data.pool
    rest = np.setdiff1d(np.arange(len(pool)), labelled)
    indices = rest if unlabelled == "rest" and len(rest) else np.arange(len(pool))
    also = " (the labelled ones too)" * (len(indices) > len(rest))
    say(
        f"{data.name}: {len(data.classes)} classes, {len(labelled)} labelled videos, "
        f"{len(indices)} unlabelled videos{also}, {len(data.test)} test videos"
    )
    for note in data.notes:
        say(note)
    return data.train.subset(labelled), pool.subset(indices)


def hold_out(videos, share, seed):
    """(N,) bool: which videos are for validation, about this share, of whole groups.

    So one scene is never on both sides. Videos without groups are each their own. One group at least is left
    to learn from.
    """
    groups = np.arange(len(videos)) if videos.groups is None else videos.groups
    is_held_out = np.zeros(len(videos), dtype=bool)
    for group in np.random.default_rng(seed).permutation(np.unique(groups))[1:]:
        if is_held_out.sum() >= share * len(videos):
            break
        is_held_out |= groups == group
    return is_held_out


def _subset_of_list(data, listfile):
    """Indices of the training videos that a list file names; see labelled_subset."""
    videos, rows, segments_of = data.train, read_list(listfile, []), {}
    for i in range(len(videos)):  # several segments of a file share its name
        segments_of.setdefault(videos.name(i), []).append(i)
    names, chosen, differing, missing = list(segments_of), [], [], []
    for row, match in zip(rows, match_names([row.name for row in rows], names), strict=True):
        if match == AMBIGUOUS:
            name = printable(row.name)
            raise UserError(f"{row.place}: several videos are called {name}; give the folder, too")
        segments = segments_of[names[match]] if match != MISSING else []
        segments = [i for i in segments if row.span in (None, videos.span(i))]
        allowed = [-1], list(row.labels), sorted(row.labels)
        agreeing = [i for i in segments if not row.labels or videos.classes(i) in allowed]
        chosen += agreeing or segments
        if not segments:
            missing.append(row.name)
        elif not agreeing:
            differing.append((row, [label for i in segments for label in videos.classes(i)]))
    if differing:  # VideoSSL's lists for HMDB-51 take kick for kick_ball in some lines, and the like
        row, labels = differing[0]
        sentence = (
            f"{row.place}: label {' '.join(map(str, row.labels))}, but in {data.name} this video has "
            f"{' '.join(map(str, labels)) or 'none'}; {len(differing)} of {len(rows)} lines differ"
        )
        if 10 * len(differing) > len(rows):
            raise UserError(f"{sentence} (labels count from 0)")
        warnings.warn(f"{sentence}, the labels of {data.name} count", stacklevel=3)
    part = f"{data.name}, split {data.split}"
    if not chosen:
        raise UserError(
            f"{listfile}: none of its {len(rows)} videos is a training video of {part}; "
            f"those are called like {printable(videos.name(0))}"
        )
    if missing:
        counts = f"{len(missing)} of {len(rows)} videos of {listfile}"
        warnings.warn(f"{counts} are not training videos of {part}: {join_names(missing)}", stacklevel=3)
    return np.unique(np.array(chosen, dtype=np.int64))


def digest_of_videos(videos, indices=None):
    """sha256 (hex) of the names, spans and labels of the videos `indices`, or of all, in order."""
    sha = hashlib.sha256()
    for i in range(len(videos)) if indices is None else indices:
        line = f"{nfc(videos.name(i))}\t{videos.span(i)}\t{videos.labels[i].tolist()}\n"
        sha.update(line.encode("utf-8", "surrogateescape"))
    return sha.hexdigest()


def as_list(videos):
    """The text of a list file that labelled_subset reads again, see read_list.

    Of spans it has those that such a list can have: of folders, from one picture to another.
    """
    numbers = [videos.classes(i) for i in range(len(videos))]
    if videos.spans is not None and videos.labels.ndim == 1:
        ends = videos.spans * FPS + 0.5
        is_folder = [stem_of(videos.name(i)) == videos.name(i) for i in range(len(videos))]
        if all(is_folder) and np.abs(ends - np.rint(ends)).max(initial=0) < 1e-6:
            starts, ends = np.rint(ends).astype(np.int64).T
            numbers = np.stack([starts, ends - starts, videos.labels], 1)
    return "".join(f"{videos.name(i)} {' '.join(map(str, labels))}\n" for i, labels in enumerate(numbers))
