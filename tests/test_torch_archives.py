"""The containers of PyTorch's files: packed again in every way they load, damaged in any way they are refused."""

import contextlib
import io
import random
import struct
import threading
import tracemalloc
import zipfile
import zlib

import models
import pickle_files as made
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pickle_files import ONE, check, dictionary, save
from witness import refuse

from mergekit_sd.errors import InputChanged, MalformedFile, MergekitError, WrongFormat
from mergekit_sd.formats import views
from mergekit_sd.formats.open import open_model, read_bytes
from mergekit_sd.formats.reading import InputFile

TENSORS = {"a": torch.randn(300, 20), "b": torch.arange(1000), "c": torch.zeros(5)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.ckpt"


def written(path, content):
    path.write_bytes(content)
    return path


def zipped(path):
    return save(path, TENSORS).read_bytes()


# --- zip: packed again ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_again_in_any_order(path, method, reverse):
    content = made.packed_again(zipped(path), method, reverse=reverse)
    model = check(written(path, content), TENSORS)
    assert len(model.views) == (3 if method else 0)


@pytest.mark.parametrize("folder", ["", "archive/", "my model/", "a/b/", "data/", "ü/"])
def test_any_folder(path, folder):
    content = made.zipped(dictionary(a=ONE), {"0": b"\0\0\x80\x3f"}, folder=folder)
    check(written(path, content), {"a": torch.ones(1)})


def test_with_sizes_and_offsets_in_their_long_form(path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in (("archive/data.pkl", dictionary(a=ONE)), ("archive/data/0", b"\0\0\x80\x3f")):
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(content)
    content = bytearray(stream.getvalue())
    for entry in (content.rfind(b"PK\1\2"), content.find(b"PK\1\2")):  # nothing is that large in a test
        packed, nbytes = struct.unpack_from("<2I", content, entry + 20)
        name_length, extra_length = struct.unpack_from("<2H", content, entry + 28)
        assert extra_length == 0
        (header,) = struct.unpack_from("<I", content, entry + 42)
        struct.pack_into("<2I", content, entry + 20, 0xFFFFFFFF, 0xFFFFFFFF)
        struct.pack_into("<H", content, entry + 30, 28)
        struct.pack_into("<I", content, entry + 42, 0xFFFFFFFF)
        at = entry + 46 + name_length
        content[at:at] = struct.pack("<2H3Q", 1, 24, nbytes, packed, header)
    end = content.rfind(b"PK\5\6")
    struct.pack_into("<I", content, end + 12, struct.unpack_from("<I", content, end + 12)[0] + 56)
    check(written(path, bytes(content)), {"a": torch.ones(1)})


def test_with_a_comment(path):
    content = bytearray(zipped(path))
    content[-2:] = struct.pack("<H", 10)
    check(written(path, bytes(content) + b"PK\5\6 mine "), TENSORS)


def test_an_archive_of_something_else(path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("readme.txt", "x")
    assert "unpack it" in refuse(written(path, stream.getvalue()), WrongFormat).hint


# --- zip: damaged, or made to deceive -------------------------------------------------------------


def changed(content, at, new):
    assert at >= 0
    return content[:at] + new + content[at + len(new) :]


def entry_of(content, name):
    """Where the directory's entry of a member begins."""
    return content.rfind(name) - 46


def test_two_pickles_and_two_of_one_name(path):
    content = made.zipped(dictionary(a=ONE), {"0": bytes(4)}, more={"archive/data.pkk": dictionary(b=ONE)})
    twice = content.replace(b"data.pkk", b"data.pkl")
    assert '"archive/data.pkl" twice' in refuse(written(path, twice), MalformedFile).message
    other = made.zipped(dictionary(a=ONE), {"0": bytes(4)}, more={"other/data.pkl": dictionary(b=ONE)})
    assert "2 pickles" in refuse(written(path, other), MalformedFile).message


@pytest.mark.parametrize("flag", [0x1, 0x40, 0x2000])
@pytest.mark.parametrize("where", ["directory", "member"])
def test_the_encrypted_flag(path, flag, where):
    content = zipped(path)
    at = entry_of(content, b"model/data.pkl") + 8 if where == "directory" else 6
    assert refuse(written(path, changed(content, at, struct.pack("<H", flag))), MalformedFile)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_wrong_checksum_of_the_pickle(path, method):
    content = made.packed_again(zipped(path), method)
    at = entry_of(content, b"model/data.pkl") + 16
    assert "damaged" in refuse(written(path, changed(content, at, b"\1\2\3\4")), MalformedFile).message


def test_a_wrong_checksum_of_a_compressed_tensor(path):
    content = made.packed_again(zipped(path))
    at = entry_of(content, b"model/data/1") + 16
    model = open_model(written(path, changed(content, at, b"\1\2\3\4")))
    assert read_bytes(model, model.tensors["a"]) == models.bits(TENSORS["a"])
    with pytest.raises(MalformedFile, match="other data than announced") as caught:
        read_bytes(model, model.tensors["b"])
    assert (caught.value.file, bool(caught.value.hint)) == (str(path), True)


@pytest.mark.parametrize("difference", [-1000, -1, 0, 1, 1000])
@pytest.mark.parametrize("numel", [10, 5_000_000])
@pytest.mark.parametrize("kind", ["zeros", "noise"])
def test_inflating(difference, numel, kind):
    data = bytes(numel) if kind == "zeros" else random.Random(1).randbytes(min(numel, 200_000))
    packed = zlib.compress(data)[2:-4]
    nbytes = max(len(data) + difference, 0)
    view = views.Inflated(0, nbytes, 100, len(packed), zlib.crc32(data))

    def read(buffer, at):
        buffer[:] = packed[at - 100 : at - 100 + len(buffer)]

    if nbytes == len(data):
        assert view.make(read) == data
    else:
        with pytest.raises(zlib.error, match="more data than" if difference < 0 else "other data than"):
            view.make(read)


def test_a_size_that_no_compression_reaches(path):
    nbytes = 1 << 31
    data = dictionary(a=made.tensor(made.storage("0", nbytes // 4), 0, (1,), (1,)))
    content = made.packed_again(made.zipped(data, {"0": bytes(4)}))
    content = changed(content, entry_of(content, b"archive/data/0") + 24, struct.pack("<I", nbytes))
    assert "said to shrink" in refuse(written(path, content), MalformedFile).message


def test_a_tensor_too_large_to_be_made(path, monkeypatch):
    monkeypatch.setattr("mergekit_sd.formats.pickles.placing.MAX_MADE", 10_000)
    error = refuse(save(path, TENSORS | {"t": torch.randn(50, 60).t()}), WrongFormat)
    assert (error.key, "have to be held" in error.message) == ("t", True)
    assert refuse(save(path, TENSORS, "deflated"), WrongFormat).key == "a"


def test_other_compression(path):
    content = made.packed_again(zipped(path), zipfile.ZIP_LZMA)
    assert "method 14" in refuse(written(path, content), MalformedFile).message


def test_bytes_in_the_other_order(path):
    content = zipped(path).replace(b"little", b"bigger")
    crc = struct.pack("<I", zipfile.crc32(b"bigger"))
    content = changed(content, entry_of(content, b"model/byteorder") + 16, crc)
    assert "reversed" in refuse(written(path, content), WrongFormat).message


# Fields of a member's entry in the directory, and of the directory's two ends.
METHOD, PACKED, NBYTES, PLACE = 10, 20, 24, 42
END, END64, LOCATOR, ENTRY = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2"
ONE_OF = b"model/data/1"


def entry_changed(content, new, *fields):
    """Fields of the entry of one storage."""
    for field in fields:
        content = changed(content, entry_of(content, ONE_OF) + field, new)
    return content


def other_place(content):
    at = entry_of(content, b"model/data/0") + PLACE
    return entry_changed(content, content[at : at + 4], PLACE)


def split(content, mark, between):
    before, found, after = content.partition(mark)
    return before + between + found + after


def more_entries(content):
    content = changed(content, content.rfind(END64) + 24, struct.pack("<2Q", 99, 99))
    return changed(content, content.rfind(END) + 8, struct.pack("<2H", 99, 99))


TRICKS = {
    "another name where the member lies": lambda c: c.replace(b"data.pkl", b"data.pkk", 1),
    "another member's place": other_place,
    "no member there": lambda c: entry_changed(c, b"\5\0\0\0", PLACE),
    "a place behind the directory": lambda c: entry_changed(c, b"\xf0\xff\xff\x7f", PLACE),
    "another method": lambda c: entry_changed(c, b"\x08\0", METHOD),
    "two sizes": lambda c: entry_changed(c, struct.pack("<I", 7999), PACKED),
    "too large for the archive": lambda c: entry_changed(c, b"\0\0\0\x7f", PACKED, NBYTES),
    "the long form of a size that is missing": lambda c: entry_changed(c, b"\xff" * 4, NBYTES),
    "a name that reaches beyond": lambda c: changed(c, c.find(ONE_OF) - 4, b"\xff\xff"),
    "bytes before it": lambda c: c[:4] + b"more" + c[4:],
    "bytes before its directory": lambda c: split(c, ENTRY, b"more"),
    "bytes behind it": lambda c: c + b"more",
    "another archive behind it": lambda c: c + made.zipped(dictionary(a=ONE), {"0": bytes(4)}),
    "part of several": lambda c: changed(c, c.rfind(END) + 4, b"\1\0\1\0"),
    "more entries than there are": more_entries,
    "two ends that differ": lambda c: changed(c, c.rfind(END) + 8, b"\1\0\1\0"),
    "a long end that is none": lambda c: changed(c, c.rfind(END64), b"XX"),
    "a long end elsewhere": lambda c: changed(c, c.rfind(LOCATOR) + 8, b"\xff" * 8),
    "a damaged directory": lambda c: changed(c, c.rfind(ENTRY), b"XX"),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_archives_that_others_could_read_otherwise(path, trick):
    content = zipped(path)
    deceived = TRICKS[trick](content)
    assert deceived != content
    refuse(written(path, deceived), MalformedFile)


ONE_ZIP = made.zipped(dictionary(a=ONE), {"0": bytes(4)})  # without the long form of its directory's end
SHORT_TRICKS = {
    "bytes before it": lambda c: c[:4] + b"more" + c[4:],
    "bytes before its directory": lambda c: split(c, ENTRY, b"more"),
    "bytes behind its directory": lambda c: split(c, END, b"more"),
    "bytes behind it": lambda c: c + b"more",
    "another archive before it": lambda c: c + c,
    "another disk": lambda c: changed(c, c.rfind(END) + 4, b"\1\0"),
    "another disk of the directory": lambda c: changed(c, c.rfind(END) + 6, b"\1\0"),
    "more entries elsewhere": lambda c: changed(c, c.rfind(END) + 10, b"\x63\0"),
    "more entries": lambda c: changed(c, c.rfind(END) + 8, b"\x63\0\x63\0"),
    "fewer entries": lambda c: changed(c, c.rfind(END) + 8, b"\1\0\1\0"),
    "a long end that is missing": lambda c: changed(c, c.rfind(END) + 12, b"\xff" * 8),
}


@pytest.mark.parametrize("trick", SHORT_TRICKS)
def test_short_archives_that_others_could_read_otherwise(path, trick):
    refuse(written(path, SHORT_TRICKS[trick](ONE_ZIP)), MalformedFile)


def test_a_member_that_reaches_beyond_the_archive(path):
    data = dictionary(a=made.tensor(made.storage("0", 1000), 0, (1000,), (1,)))
    content = made.zipped(data, {"0": bytes(4)})
    at = entry_of(content, b"archive/data/0") + PACKED
    error = refuse(written(path, changed(content, at, struct.pack("<2I", 4000, 4000))), MalformedFile)
    assert "beyond the archive's end" in error.message


def test_no_directory_of_any_size_is_read(path):
    with path.open("wb") as stream:
        stream.write(b"PK\3\4")
        stream.seek(100 << 20)  # a hole: nothing is written
        stream.write(struct.pack("<4s4H2IH", END, 0, 0, 1, 1, (100 << 20) - 4, 4, 0))
    tracemalloc.start()
    assert "cannot hold its 1 entries" in refuse(path, MalformedFile).message
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_no_directory_is_too_large_to_be_looked_at(path):
    content = zipped(path)
    end = content.rfind(b"PK\6\6")
    huge = changed(content, end + 40, struct.pack("<2Q", 1 << 62, (1 << 62) + 1))
    written(path, huge)
    tracemalloc.start()
    refuse(path, MalformedFile)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("container", ["zip", "legacy", "deflated"])
def test_cut_short_anywhere(path, container):
    content = save(path, TENSORS, container).read_bytes()
    for length in (*range(4, 200), *range(200, len(content), 499), *range(len(content) - 200, len(content))):
        path.write_bytes(content[:length])
        with pytest.raises(MergekitError) as caught:
            open_model(path)
        assert type(caught.value) in (MalformedFile, WrongFormat)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(place=st.floats(0, 1), value=st.binary(min_size=1, max_size=8), container=st.sampled_from(["zip", "deflated"]))
def test_changed_bytes_load_or_are_refused(path, place, value, container):
    content = save(path, {"a": torch.ones(3), "b": torch.arange(6).reshape(2, 3).t()}, container).read_bytes()
    path.write_bytes(changed(content, int(place * (len(content) - 8)), value))
    with contextlib.suppress(MergekitError):
        model = open_model(path)
        for tensor in model.tensors.values():
            assert len(read_bytes(model, tensor)) == tensor.nbytes


# --- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, views.KEPT])
def test_views_are_read_by_many_threads(path, kept, monkeypatch):
    monkeypatch.setattr(views, "KEPT", kept)
    tensors = {str(n): torch.randn(40 + n, 50).t() for n in range(6)}
    model = open_model(save(path, tensors, "deflated"))
    expected = {name: models.bits(tensor) for name, tensor in tensors.items()}
    wrong = []

    def read(seed):
        for name in sorted(tensors, key=lambda name: hash((name, seed))):
            info = model.tensors[name]
            for start in range(0, info.nbytes, 1000):
                piece = memoryview(bytearray(min(1000, info.nbytes - start)))
                file.read_into(piece, info.offset + start)
                if piece != expected[name][start : start + 1000]:
                    wrong.append((name, start))

    file = InputFile.of(model)
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    assert not wrong


def test_views_are_forgotten(path, monkeypatch):
    monkeypatch.setattr(views, "KEPT", 1 << 20)
    tensors = {str(n): torch.zeros(100_000) for n in range(20)}
    model = open_model(save(path, tensors, "deflated"))
    file = InputFile.of(model)
    piece = memoryview(bytearray(100))
    tracemalloc.start()
    for info in model.tensors.values():
        file.read_into(piece, info.offset)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    file.close()


def test_a_checkpoint_that_changes(path):
    model = open_model(save(path, TENSORS, "deflated"))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputChanged):
        read_bytes(model, model.tensors["a"])
