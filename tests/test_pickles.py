"""Tensors of PyTorch's files: those that torch.load gives, to the bit, and none that claims more than there is."""

import itertools
import sys
import types

import models
import numpy as np
import pickle_files as made
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pickle_files import CONTAINERS, check, save
from witness import refuse

from mergekit_sd.errors import MalformedFile, WrongFormat
from mergekit_sd.formats.open import open_model, read_bytes

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64),
]


def random_bits(dtype, *shape):
    numel = int(np.prod(shape)) * torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (max(numel, 8),), dtype=torch.uint8)[:numel]
    return raw.view(dtype).reshape(shape)


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_dtype(tmp_path, container):
    tensors = {str(dtype): random_bits(dtype, 3, 5) for dtype in DTYPES}
    path = save(tmp_path / "m.ckpt", tensors, container)
    if container == "zip":  # torch itself cannot read all of them in the old format
        assert all(models.same(tensors[name], t) for name, t in torch.load(path, weights_only=True).items())
    model = check(path, tensors)
    assert model.format == "pickle"
    assert bool(model.views) == (container == "deflated")
    assert any("compressed" in note for note in model.notes) == (container == "deflated")
    assert any("old kind" in note for note in model.notes) == (container == "legacy")


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("zipped", [True, False])
def test_every_protocol(tmp_path, protocol, zipped):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": random_bits(torch.uint16, 2)}
    path = tmp_path / "m.pt"
    torch.save(tensors, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    check(path, tensors)


@pytest.mark.parametrize("container", CONTAINERS)
def test_views_of_storages(tmp_path, container):
    base, cube = torch.randn(6, 8), random_bits(torch.float16, 4, 3, 5)
    tensors = {
        "whole": base,
        "transposed": base.t(),
        "rows": base[2:4],
        "columns": base[:, 1:3],
        "one": base[3, 5],
        "every second": base.reshape(-1)[::2],
        "permuted": cube.permute(2, 0, 1),
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "overlapping": torch.as_strided(base, (4, 4), (1, 3), 7),
        "expanded within": base[:1].expand(6, 8),
        "ones": torch.randn(1, 5, 1).transpose(0, 2),
        "tied": base,
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros(0, 4),
        "empty of something": base[3:3],
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    model = check(save(tmp_path / "m.ckpt", {"state_dict": tensors}, container), tensors)
    offsets = {name: info.offset for name, info in model.tensors.items()}
    assert offsets["whole"] == offsets["tied"] == offsets["rows"] - 2 * 8 * 4
    if container != "deflated":
        assert max(offsets["ones"], offsets["rows"]) < model.state.size  # as they lie there
    spans = [(view.start, view.start + view.nbytes) for view in model.views]
    for info in model.tensors.values():
        end = info.offset + info.nbytes
        assert end <= model.state.size or any(low <= info.offset and end <= high for low, high in spans)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(sorted(spans)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from(DTYPES),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
    container=st.sampled_from(CONTAINERS),
)
def test_any_view(tmp_path, shape, dtype, order, step, container):
    tensor = random_bits(dtype, *shape)
    axes = list(range(len(shape)))
    order.shuffle(axes)
    view = tensor.permute(axes)
    for axis in axes:
        view = view[(slice(None),) * axis + (slice(order.randint(0, 2), None, step),)]
    check(
        save(tmp_path / "m.ckpt", {"t": tensor, "v": view, "w": view.clone()}, container),
        {"t": tensor, "v": view, "w": view},
    )


def test_tensors_with_attributes_and_of_other_classes(tmp_path):
    class Labelled(torch.Tensor):
        pass

    sys.modules["labels"] = types.ModuleType("labels")
    sys.modules["labels"].Labelled, Labelled.__module__, Labelled.__qualname__ = Labelled, "labels", "Labelled"
    plain, marked = torch.randn(3), torch.randn(2, 2)
    plain.note = {"rank": 4}
    try:
        path = save(
            tmp_path / "m.pt", {"a": plain, "b": marked.as_subclass(Labelled), "c": torch.nn.Buffer(torch.ones(2))}
        )
    finally:
        del sys.modules["labels"]
    model = check(path, {"a": plain, "b": marked, "c": torch.ones(2)})
    assert any("labels.Labelled" in note for note in model.notes)


def claims(**tensors):
    """A file of 4 floats whose tensors claim whatever they like."""
    return made.zipped(made.dictionary(**tensors), {"0": bytes(range(16))})


FOUR = made.storage("0", 4)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (32768, 32768), (0, 0)),  # 4 GB of one number
        (0, (5,), (1,)),
        (0, (5,), (0,)),
        (1, (4,), (1,)),
        (4, (1,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (2,), (4,)),
        (2**62, (1,), (1,)),
        (0, (2,), (2**62,)),
        (0, (2**40, 2**40), (0, 0)),
        (0, (0, 2**62, 2**62), (0, 0, 0)),
    ],
)
def test_a_tensor_that_claims_more_than_its_storage_holds(tmp_path, offset, shape, strides):
    path = tmp_path / "m.ckpt"
    path.write_bytes(claims(good=made.tensor(FOUR, 0, (4,), (1,)), bad=made.tensor(FOUR, offset, shape, strides)))
    error = refuse(path, MalformedFile)
    assert error.key == "bad"
    assert "its storage" in error.message or "any file" in error.message


def test_a_stride_of_nothing_within_the_storage(tmp_path):
    path = tmp_path / "m.ckpt"
    path.write_bytes(claims(a=made.tensor(FOUR, 3, (4,), (0,)), b=made.tensor(FOUR, 0, (2, 2), (0, 2))))
    model = open_model(path)
    assert read_bytes(model, model.tensors["a"]) == bytes(range(12, 16)) * 4
    assert read_bytes(model, model.tensors["b"]) == (bytes(range(4)) + bytes(range(8, 12))) * 2


WRONG = [made.storage("1", 4), made.storage("0", 3), made.storage("0", 5), made.storage("0", 4, "DoubleStorage")]


@pytest.mark.parametrize("storage", WRONG, ids=range(4))
def test_a_storage_that_is_missing_or_of_another_size(tmp_path, storage):
    path = tmp_path / "m.ckpt"
    path.write_bytes(claims(good=made.tensor(FOUR, 0, (4,), (1,)), bad=made.tensor(storage, 0, (1,), (1,))))
    assert refuse(path, MalformedFile).key == "bad"


@pytest.mark.parametrize("container", ["zip", "deflated"])
def test_a_storage_that_ends_within_an_element(tmp_path, container):
    floats = torch.arange(14, dtype=torch.uint8)[:12].view(torch.float32)
    check(save(tmp_path / "m.ckpt", {"a": floats}, container), {"a": floats})


STRANGE = {
    "complex64": (torch.zeros(2, dtype=torch.complex64), "complex64"),
    "sparse": (torch.eye(3).to_sparse(), "sparse"),
    "meta": (torch.zeros(2, device="meta"), "meta"),
    "negated": (torch.randn(2, dtype=torch.complex64).conj().imag, "negated"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.filterwarnings("ignore")  # of torch, about their future
def test_tensors_that_are_not_read(tmp_path, kind):
    strange, words = STRANGE[kind]
    error = refuse(save(tmp_path / "m.pt", {"state_dict": {"w": torch.ones(1), "x": strange}}), WrongFormat)
    assert (error.key, words in error.message) == ("x", True)
    outside = save(tmp_path / "n.pt", {"state_dict": {"w": torch.ones(1)}, "extra": strange})
    assert any(note.startswith("extra: 1 tensor,") for note in check(outside, {"w": torch.ones(1)}).notes)


def test_a_quantised_tensor_is_not_read(tmp_path):
    path = tmp_path / "m.ckpt"
    quantised = made.call(made.name("torch._utils", "_rebuild_qtensor"), made.storage("0", 4, "QInt8Storage"), b"N")
    path.write_bytes(claims(x=quantised))
    error = refuse(path, WrongFormat)
    assert (error.key, "quantised" in error.message) == ("x", True)
    path.write_bytes(made.zipped(made.dictionary(x=made.tensor(made.storage("0", 4, "QInt8Storage"), 0, (4,), (1,)))))
    assert "qint8" in refuse(path, WrongFormat).message
