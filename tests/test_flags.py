"""Command lines: recipes that follow the labelled share."""

import pytest

import cmpl
import tg_distill
from common import data


@pytest.fixture(scope="module")
def ucf101(tmp_path_factory):
    """UCF-101's layout with 3 classes of 100 training and 2 test videos, which nobody decodes."""
    root = tmp_path_factory.mktemp("data") / "ucf101"
    (root / "ucfTrainTestlist").mkdir(parents=True)
    (root / "ucfTrainTestlist" / "classInd.txt").write_text("1 Archery\n2 Biking\n3 Diving\n")
    lists = {"train": "", "test": ""}
    for k, name in enumerate(("Archery", "Biking", "Diving"), 1):
        (root / "UCF-101" / name).mkdir(parents=True)
        for i in range(102):
            file = f"{name}/v_{name}_g{i // 4 + 1:02d}_c{i % 4 + 1:02d}.avi"
            (root / "UCF-101" / file).touch()
            lists["train" if i < 100 else "test"] += f"{file} {k}\n" if i < 100 else f"{file}\n"
    for part, text in lists.items():
        (root / "ucfTrainTestlist" / f"{part}list01.txt").write_text(text)
    return root


@pytest.fixture(scope="module")
def k400(tmp_path_factory):
    """Class folders of Kinetics-400, two of them, with 300 training videos each."""
    root = tmp_path_factory.mktemp("data") / "k400"
    for name in ("abseiling", "zumba"):
        for part, n in (("train", 300), ("val", 1)):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                (root / part / name / f"{name}_{part}{i}.mp4").touch()
    return root


def listed(root, folder, n):
    """A list of authors' kind: the first n of all training videos, not the same number of each class."""
    lines = (root / "ucfTrainTestlist" / "trainlist01.txt").read_text().splitlines()[:n]
    rows = [line.split() for line in lines]
    (folder / "list.txt").write_text("".join(f"{name} {int(label) - 1}\n" for name, label in rows))
    return f"--labelled_list {folder}/list.txt"


@pytest.mark.parametrize("ask, share, lam", [
    ("", "1.0%", 5.0), ("--ratio 0.01", "1.0%", 5.0), ("--per_class 1", "1.0%", 5.0), ("list 3", "1.0%", 5.0),
    ("--ratio 0.03", "3.0%", 5.0), ("--per_class 3", "3.0%", 5.0), ("list 9", "3.0%", 5.0),
    ("--ratio 0.04", "4.0%", 2.0), ("--per_class 4", "4.0%", 2.0), ("list 12", "4.0%", 2.0),
    ("--ratio 0.1", "10.0%", 2.0), ("--per_class 10", "10.0%", 2.0), ("list 29", "9.7%", 2.0),
    ("--ratio 0.5", "50.0%", 2.0), ("--per_class 500", "100.0%", 2.0),
    ("--per_class 10 --lam 7", "10.0%", 7.0),
])  # fmt: skip
def test_a_recipe_follows_the_share_that_results(ucf101, tmp_path, capsys, ask, share, lam):
    ask = listed(ucf101, tmp_path, int(ask[5:])) if ask.startswith("list") else ask
    args = cmpl.parse_args(["--data", "ucf101", "--root", str(ucf101), *ask.split()])
    assert (args.lam, args.weight_decay) == (lam, 1e-3)
    said = capsys.readouterr().out
    recipe = "1%" if share in ("1.0%", "3.0%") else "10%"
    assert said == f"{share} of the training videos have a label: recipe of ucf101 for {recipe}\n"


@pytest.mark.parametrize("ask, epochs", [
    ("--ratio 0.01", 45), ("--per_class 3", 45), ("--per_class 9", 45),
    ("--per_class 10", 90), ("--per_class 30", 90), ("--ratio 0.1", 90),  # 60 of each class, as in all papers
])  # fmt: skip
def test_a_share_counts_the_videos_on_disk(k400, ask, epochs):
    args = tg_distill.parse_args(["--data", "k400", "--root", str(k400), *ask.split()])
    assert (args.epochs, args.warmup, args.batch) == (epochs, epochs / 6 + 2.5 if epochs == 45 else 15, 8)


@pytest.mark.parametrize("ask, lam", [
    ("--ratio 0.01", 5.0), ("--ratio 0.1", 2.0), ("--per_class 6", 5.0), ("--per_class 60", 2.0),
])  # fmt: skip
def test_without_the_data_the_papers_counts_say_the_share(ask, lam):
    assert cmpl.parse_args(["--data", "k400", "--root", "/nowhere", *ask.split()]).lam == lam


@pytest.mark.usefixtures("leave")
@pytest.mark.parametrize("ask, word", [
    ("--per_class 0", "--per_class"), ("--ratio 0", "--ratio"), ("--ratio 0.1 --per_class 3", "one of"),
])  # fmt: skip
def test_labels_that_cannot_be(ucf101, ask, word):
    with pytest.raises(SystemExit, match=word):
        cmpl.parse_args(["--data", "ucf101", "--root", str(ucf101), *ask.split()])


def test_labels_that_are_asked_for_replace_those_of_a_recipe():
    args = cmpl.parse_args(["--data", "toy", "--ratio", "0.5"])
    assert (args.ratio, args.per_class) == (0.5, None)
    assert cmpl.parse_args(["--data", "toy", "--per_class", "7"]).per_class == 7


def test_the_data_set_is_read_once(ucf101, monkeypatch):
    """By the parser, for the run; a later call reads the folder again."""
    n_read, reader = [0], data.READERS["ucf101"]

    def counted(*args):
        n_read[0] += 1
        return reader(*args)

    counted.__doc__ = reader.__doc__
    monkeypatch.setitem(data.READERS, "ucf101", counted)
    data.KEPT.clear()
    args = cmpl.parse_args(["--data", "ucf101", "--root", str(ucf101)])
    for expected in (1, 2):
        assert len(data.load_data(args.data, args.root, args.split).train) == 300 and n_read == [expected]
