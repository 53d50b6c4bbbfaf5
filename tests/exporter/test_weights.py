"""Weight files that are cut, damaged, wrong or elsewhere, and weights that are drawn instead of read."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engines.errors import UserError
from exporter.weights import RandomWeights, SafetensorsWeights, read_header

NAME = "diffusion_pytorch_model.safetensors"
INDEX = f"{NAME}.index.json"
TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.bias": torch.tensor([1.0, -2.0], dtype=torch.float16),
    "b": torch.tensor(0.5, dtype=torch.bfloat16),
}
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def assert_names(caught: pytest.ExceptionInfo[UserError], path: Path) -> None:
    assert str(path) in caught.value.what
    assert caught.value.fix


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """Writes a safetensors file from parts: a header as bytes or as JSON, and whatever length it shall claim."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def write_shards(folder: Path, weight_map: object, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    return folder


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / NAME
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_a_whole_file_is_read_as_it_was_written(whole):
    assert {name: tuple(entry["shape"]) for name, entry in read_header(whole).items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }
    weights = SafetensorsWeights(whole.parent)
    assert weights.names() == set(TENSORS)
    for name, tensor in TENSORS.items():
        found = weights.read(name, tuple(tensor.shape))
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_a_file_cut_at_any_byte_is_refused(whole):
    content = whole.read_bytes()
    for length in range(len(content)):
        whole.write_bytes(content[:length])
        with pytest.raises(UserError, match="copy it again") as caught:
            read_header(whole)
        assert_names(caught, whole)


@pytest.mark.parametrize("extra", [b"\0", b"more bytes than its header promises"])
def test_trailing_bytes_are_refused(whole, extra):
    whole.write_bytes(whole.read_bytes() + extra)
    with pytest.raises(UserError, match="promises") as caught:
        read_header(whole)
    assert_names(caught, whole)


@pytest.mark.parametrize(
    ("header", "length"),
    [
        pytest.param(b"", None, id="empty"),
        pytest.param(b"{", None, id="open brace"),
        pytest.param(b"not json", None, id="words"),
        pytest.param(b'{"a": }', None, id="no value"),
        pytest.param(b"\xff\xfe{}", None, id="no text"),
        pytest.param(b"[]", None, id="list"),
        pytest.param(b"3", None, id="number"),
        pytest.param(b"null", None, id="null"),
        pytest.param(b"[" * 50_000, None, id="deeply nested"),
        pytest.param(b"{}", 3, id="one byte too long"),
        pytest.param(b"{}", 2**63, id="absurdly long"),
        pytest.param(b"{}", 2**64 - 1, id="as long as can be"),
    ],
)
def test_a_header_that_is_no_json_object_is_refused(tmp_path, header, length):
    path = write_raw(tmp_path / NAME, header, length=length)
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert_names(caught, path)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(3, id="number"),
        pytest.param("F32", id="word"),
        pytest.param(None, id="null"),
        pytest.param({}, id="empty"),
        pytest.param({**ONE, "dtype": "F33"}, id="unknown dtype"),
        pytest.param({**ONE, "dtype": []}, id="dtype list"),
        pytest.param({**ONE, "shape": "x"}, id="shape word"),
        pytest.param({**ONE, "shape": ["1"]}, id="shape of words"),
        pytest.param({**ONE, "shape": 1}, id="shape number"),
        pytest.param({**ONE, "shape": [2]}, id="shape too large"),
        pytest.param({**ONE, "shape": [-1]}, id="shape negative"),
        pytest.param({**ONE, "shape": [-1, -1]}, id="shape negative twice"),
        pytest.param({**ONE, "shape": [1.0]}, id="shape fraction"),
        pytest.param({**ONE, "data_offsets": [0]}, id="one offset"),
        pytest.param({**ONE, "data_offsets": [0, 4, 8]}, id="three offsets"),
        pytest.param({**ONE, "data_offsets": [0, 3]}, id="too short"),
        pytest.param({**ONE, "data_offsets": [0, 8]}, id="too long"),
        pytest.param({**ONE, "data_offsets": [4, 0]}, id="backwards"),
        pytest.param({**ONE, "data_offsets": [-4, 0]}, id="before the data"),
        pytest.param({**ONE, "data_offsets": [4, 8]}, id="behind the data"),
        pytest.param({**ONE, "data_offsets": [10**15, 10**15 + 4]}, id="far behind the data"),
        pytest.param({**ONE, "data_offsets": ["0", "4"]}, id="offsets as words"),
        pytest.param({**ONE, "data_offsets": [None, 4]}, id="offset null"),
        pytest.param({**ONE, "data_offsets": 4}, id="offsets number"),
    ],
)
def test_a_wrong_entry_is_refused(tmp_path, entry):
    path = write_raw(tmp_path / NAME, {"a": entry}, bytes(4))
    with pytest.raises(UserError, match="copy it again") as caught:
        read_header(path)
    assert_names(caught, path)


@pytest.mark.parametrize(
    ("second", "size"),
    [pytest.param([0, 4], 4, id="overlap"), pytest.param([2, 6], 6, id="part"), pytest.param([8, 12], 12, id="hole")],
)
def test_tensors_that_overlap_or_leave_holes_are_refused(tmp_path, second, size):
    path = write_raw(tmp_path / NAME, {"a": ONE, "b": {**ONE, "data_offsets": second}}, bytes(size))
    with pytest.raises(UserError) as caught:
        SafetensorsWeights(tmp_path).read("a", (1,))
    assert_names(caught, path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_a_weight_that_is_no_number_is_refused_and_counted(tmp_path, bad, dtype):
    save_file({"fine": torch.ones(2), "bad": torch.tensor([1.0, bad, 2.0, bad]).to(dtype)}, tmp_path / NAME)
    weights = SafetensorsWeights(tmp_path)
    assert torch.equal(weights.read("fine", (2,)), torch.ones(2))
    with pytest.raises(UserError, match=r"'bad' holds 2 values .* of 4") as caught:
        weights.read("bad", (4,))
    assert_names(caught, tmp_path / NAME)


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), ()])
def test_a_wrong_shape_is_refused_with_both_shapes(whole, shape):
    with pytest.raises(UserError, match="config") as caught:
        SafetensorsWeights(whole.parent).read("a.weight", shape)
    assert_names(caught, whole)
    assert "[2, 3]" in caught.value.what
    assert str(list(shape)) in caught.value.what


def test_shards_are_read_through_their_index(tmp_path):
    folder = write_shards(
        tmp_path,
        {"x": "one.safetensors", "y": "two.safetensors"},
        {"one.safetensors": {"x": torch.ones(2)}, "two.safetensors": {"y": torch.zeros(3)}},
    )
    weights = SafetensorsWeights(folder)
    assert weights.names() == {"x", "y"}
    assert torch.equal(weights.read("y", (3,)), torch.zeros(3))


def test_a_missing_shard_is_named(tmp_path):
    weight_map = {"x": "one.safetensors", "y": "two.safetensors"}
    folder = write_shards(tmp_path, weight_map, {"one.safetensors": {"x": torch.ones(2)}})
    with pytest.raises(UserError, match=r"lacks two\.safetensors") as caught:
        SafetensorsWeights(folder)
    assert_names(caught, folder)
    assert "shards" in caught.value.fix


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    folder = write_shards(
        tmp_path, {"x": "one.safetensors", "y": "one.safetensors"}, {"one.safetensors": {"x": torch.ones(2)}}
    )
    with pytest.raises(UserError, match=r"one\.safetensors: lacks tensor 'y'") as caught:
        SafetensorsWeights(folder)
    assert_names(caught, folder)


def test_a_cut_shard_is_named(tmp_path):
    folder = write_shards(tmp_path, {"x": "one.safetensors"}, {"one.safetensors": {"x": torch.ones(2)}})
    shard = folder / "one.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError) as caught:
        SafetensorsWeights(folder)
    assert_names(caught, shard)


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/../../x.safetensors", "{root}/x.safetensors"])
def test_an_index_may_not_name_files_outside_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    write_shards(folder, {"x": name.format(root=tmp_path)}, {})
    with pytest.raises(UserError, match="leaves the folder") as caught:
        SafetensorsWeights(folder)
    assert_names(caught, folder)


@pytest.mark.parametrize(
    "weight_map",
    [
        pytest.param(None, id="null"),
        pytest.param([], id="list"),
        pytest.param({"x": 3}, id="number"),
        pytest.param({"x": ["one.safetensors"]}, id="list of files"),
        pytest.param({"x": "one.safetensors", "y": None}, id="file and null"),
    ],
)
def test_a_malformed_index_is_named(tmp_path, weight_map):
    folder = write_shards(tmp_path, weight_map, {"one.safetensors": {"x": torch.ones(2)}})
    with pytest.raises(UserError) as caught:
        SafetensorsWeights(folder)
    assert_names(caught, folder)


def test_an_index_that_is_no_json_is_named(tmp_path):
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(UserError, match="not valid JSON") as caught:
        SafetensorsWeights(tmp_path)
    assert_names(caught, tmp_path / INDEX)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt", "model.pth"])
def test_a_pickle_is_named_and_never_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UserError, match="has no weights") as caught:
        SafetensorsWeights(tmp_path)
    assert_names(caught, tmp_path)
    assert f"{name} is a pickle" in caught.value.fix
    assert "safe_serialization=True" in caught.value.fix


def test_a_folder_without_weights_is_named_with_ways_out(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no weights") as caught:
        SafetensorsWeights(tmp_path)
    assert_names(caught, tmp_path)
    assert f"random:{tmp_path}" in caught.value.fix


def test_weights_of_a_download_cache_are_read_through_its_links(tmp_path):
    """A hub's cache holds a model as links into a folder of blobs beside it."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"x": torch.ones(2)}, blobs / "0123abcd")
    (snapshot / NAME).symlink_to(Path("../../blobs/0123abcd"))
    assert torch.equal(SafetensorsWeights(snapshot).read("x", (2,)), torch.ones(2))


def test_the_digest_follows_the_bytes_and_the_names_not_the_folder(tmp_path, whole):
    first = SafetensorsWeights(whole.parent).digest
    other = tmp_path / "other"
    other.mkdir()
    (other / NAME).write_bytes(whole.read_bytes())
    assert SafetensorsWeights(other).digest == first
    save_file({**TENSORS, "b": torch.tensor(0.25, dtype=torch.bfloat16)}, other / NAME)
    assert SafetensorsWeights(other).digest != first


SHAPES = {"a.weight": (64, 48), "a.bias": (64,), "norm.weight": (256,), "conv.weight": (16, 3, 4, 4)}


def drawn(seed: int = 0, order: list[str] | None = None) -> dict[str, torch.Tensor]:
    weights = RandomWeights({}, SHAPES, seed)
    return {name: weights.read(name, SHAPES[name]) for name in order or SHAPES}


def test_random_weights_are_equal_for_equal_seed_and_name_whatever_the_order():
    forward, backward = drawn(), drawn(order=list(reversed(SHAPES)))
    torch.rand(7)  # the global generator has no part in it
    again = drawn()
    assert all(torch.equal(forward[n], backward[n]) and torch.equal(forward[n], again[n]) for n in SHAPES)


def test_random_weights_differ_by_seed_and_by_name():
    weights = RandomWeights({}, {"x": (8,), "y": (8,)}, 0)
    assert not torch.equal(weights.read("x", (8,)), weights.read("y", (8,)))
    assert not torch.equal(drawn(0)["a.weight"], drawn(1)["a.weight"])


def test_random_weights_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    drawn()
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_have_the_scale_of_their_kind():
    found = drawn()
    # standard errors: 1/√(2n) of a deviation, deviation/√n of a mean; five of them each
    for name, fan_in in (("a.weight", 48), ("conv.weight", 48)):
        n = found[name].numel()
        assert found[name].std().item() * math.sqrt(fan_in) == pytest.approx(1, abs=5 / math.sqrt(2 * n))
    assert found["norm.weight"].mean().item() == pytest.approx(1, abs=5 * 0.02 / math.sqrt(256))
    assert found["a.bias"].mean().item() == pytest.approx(0, abs=5 * 0.02 / math.sqrt(64))


def test_the_digest_of_random_weights_follows_config_and_seed():
    digests = {RandomWeights(config, SHAPES, seed).digest for config in ({}, {"layers": 2}) for seed in (0, 1)}
    assert len(digests) == 4
    assert RandomWeights({"a": 1, "b": 2}, SHAPES, 0).digest == RandomWeights({"b": 2, "a": 1}, {}, 0).digest
    assert RandomWeights({}, SHAPES, 0).names() == set(SHAPES)
