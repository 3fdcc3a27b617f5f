"""Small data sets on disk and sentences of errors, for the tests of readers, data and tools."""

import os

import numpy as np
import pytest

from common.data import load_data
from common.errors import UserError


def tree(root, *names):
    """Empty files; a name that ends in "/" is a folder of three pictures."""
    for name in names:
        files = [f"{name}img_{i:05d}.jpg" for i in (1, 2, 3)] if name.endswith("/") else [name]
        for file in files:
            path = os.path.join(root, file)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            open(path, "wb").close()
    return root


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    return path


def lists(root, train, test=("walk/t.mp4 1",), classes=("run", "walk"), **others):
    """train.txt, test.txt, classes.txt and others, of these lines; the root."""
    for name, lines in dict(train=train, test=test, classes=classes, **others).items():
        if lines is not None:
            text(root / f"{name}.txt", *lines)
    return root


def pairs(videos):
    """{name: label, or tuple of labels}"""
    labels = videos.labels
    tuples = labels.tolist() if labels.ndim == 1 else [tuple(np.flatnonzero(y).tolist()) for y in labels]
    return dict(zip(map(videos.name, range(len(videos))), tuples, strict=True))


def counts(data, indices):
    """How many of the training videos `indices` are of each class."""
    return np.bincount(data.train.labels[indices], minlength=len(data.classes)).tolist()


def fails(*parts, call=load_data, **options):
    """The sentence of the UserError that the call must raise; it must have all the parts."""
    with pytest.raises(UserError) as error:
        call(**options)
    sentence = str(error.value)
    assert "\n" not in sentence
    for part in parts:
        assert str(part) in sentence, sentence
    return sentence
