"""PyTorch's files from before 1.6: pickles one after the other, then the storages; whole, or refused."""

import pickle
import struct

import pickle_files as made
import pytest
import torch
from pickle_files import check, dictionary, text
from witness import refuse

from mergekit_sd.errors import MalformedFile, WrongFormat


def written(path, content):
    path.write_bytes(content)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.ckpt"


def old(data, keys=("0",), storages=((1, bytes(4)),), system=None):
    """A file of the old format; each storage with the count before it."""
    listed = pickle.dumps(list(keys), 2)
    tail = b"".join(struct.pack("<q", count) + content for count, content in storages)
    return made.legacy(made.MAGIC, made.PROTOCOL, system or made.SYSTEM, data, listed) + tail


def old_storage(key, numel, view=b"N"):
    return made.storage(key, numel)[:-2] + view + b"tQ"


def one(key, numel):
    """The first element of a storage."""
    return made.tensor(old_storage(key, numel), 0, (1,), (1,))


OLD = dictionary(a=one("0", 1))
WHOLE = [struct.pack("<f", number) for number in range(6)]


def test_old_storages_that_are_parts_of_others(path):
    """Files of torch 0.1 and 0.2: a storage, and from which element on how many of it."""
    part = old_storage("0", 6, b"(" + text("view") + b"K\x02K\x03t")
    data = dictionary(part=made.tensor(part, 1, (2,), (1,)), all=made.tensor(old_storage("0", 6), 0, (6,), (1,)))
    path.write_bytes(old(data, storages=[(6, b"".join(WHOLE))]))
    check(path, {"part": torch.tensor([3.0, 4.0]), "all": torch.arange(6.0)})
    for number, shape in ((1, (3,)), (3, (1,))):
        data = dictionary(part=made.tensor(part, number, shape, (1,)))
        assert refuse(written(path, old(data, storages=[(6, b"".join(WHOLE))])), MalformedFile).key == "part"
    beyond = old_storage("0", 6, b"(" + text("view") + b"K\x02K\x05t")
    data = dictionary(part=made.tensor(beyond, 0, (1,), (1,)))
    assert "otherwise" in refuse(written(path, old(data, storages=[(6, b"".join(WHOLE))])), MalformedFile).message


def test_old_modules_with_their_source(path):
    source = b"(" + text("module") + made.name("my.nets", "Net") + text("nets.py") + text("import os") + b"tQ"
    data = dictionary(state_dict=b"}(" + text("a") + made.tensor(old_storage("0", 1), 0, (1,), (1,)) + b"u", net=source)
    model = check(written(path, old(data)), {"a": torch.zeros(1)})
    assert "my.nets.Net" in model.notes[-1]


BROKEN = {
    "no such storage": (old(OLD, keys=["1"]), "list of the storages"),
    "one storage twice": (old(OLD, keys=["0", "0"], storages=[(1, bytes(4))] * 2), "list of the storages"),
    "a storage too many": (old(OLD, keys=["0", "1"], storages=[(1, bytes(4))] * 2), "list of the storages"),
    "a list that is none": (made.legacy(*made.HEAD, OLD, pickle.dumps({"0": 1}, 2)), "list"),
    "keys that are none": (old(OLD, keys=[()]), "list of the storages"),
    "another count": (old(OLD, storages=[(2, bytes(4))]), "has 2 there"),
    "a negative count": (old(OLD, storages=[(-1, bytes(4))]), "has 18,446,744,073,709,551,615 there"),
    "cut short": (old(OLD)[:-1], "cut short"),
    "bytes behind": (old(OLD) + b"x", "follow 1 bytes"),
    "two sizes of one storage": (old(dictionary(a=one("0", 1), b=one("0", 2))), "otherwise than torch does"),
}  # fmt: skip


@pytest.mark.parametrize("way", BROKEN)
def test_broken_old_files(path, way):
    content, words = BROKEN[way]
    assert words in refuse(written(path, content), MalformedFile).message


def test_old_files_of_other_kinds(path):
    system = pickle.dumps({"little_endian": False}, 2)
    assert "reversed" in refuse(written(path, old(OLD, system=system)), WrongFormat).message
    assert "reversed" in refuse(written(path, old(OLD, system=pickle.dumps(1, 2))), WrongFormat).message
    for magic, protocol in ((pickle.dumps(5, 2), made.PROTOCOL), (made.MAGIC, pickle.dumps(1002, 2))):
        assert "not one of PyTorch" in refuse(written(path, made.legacy(magic, protocol)), WrongFormat).message
