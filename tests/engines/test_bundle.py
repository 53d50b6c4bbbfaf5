"""Bundles: opened only as they were written, as a folder or a zip; nothing of a damaged one is used."""

from __future__ import annotations

import json
import random
import zipfile

import bundles
import pytest

from engines import artifacts
from engines.bundle import FORMAT_VERSION, open_bundle
from engines.errors import UserError
from engines.zipped import MARK, pack


@pytest.fixture
def folder(tmp_path):
    return bundles.tiny_bundle(tmp_path / "tiny", files={"README.md": b"a card"})


@pytest.fixture
def packed(folder):
    pack(folder, folder.with_suffix(".zip"))
    return folder.with_suffix(".zip")


def resign(folder, change):
    """Changes a manifest and gives it the digest that fits, as someone who means harm would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    artifacts.seal(folder / "manifest.json", manifest)


def test_a_whole_bundle_opens_as_a_folder_and_as_a_zip(folder, packed):
    for path in (folder, packed):
        found = open_bundle(path)
        assert found.info["model"]["name"] == "tiny"
        assert found.engine("ort").file("model.onnx").read_bytes() == (folder / "engines/ort/model.onnx").read_bytes()
        assert found.engine("ort").info["graph"]["dtype"] == "fp32"
        assert found.graph("fp32").digest == "a" * 64
        assert found.file("README.md").read_bytes() == b"a card"


def test_a_bundle_holds_no_time_and_is_the_same_wherever_it_is_written(tmp_path, folder):
    again = bundles.tiny_bundle(tmp_path / "again", files={"README.md": b"a card"})
    for one, other in zip(sorted(folder.rglob("*")), sorted(again.rglob("*")), strict=True):
        assert one.relative_to(folder) == other.relative_to(again)
        assert not one.is_file() or one.read_bytes() == other.read_bytes()
    pack(folder, tmp_path / "one.zip")
    pack(again, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_what_a_zip_was_unpacked_into_goes_with_the_bundle(packed):
    found = open_bundle(packed)
    place = found.path
    assert place.is_dir()
    found.close()
    assert not place.exists()


def test_one_flipped_byte_at_random_places_of_any_file_is_refused(folder):
    generator = random.Random(0)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for number in range(200):
        file = files[number % len(files)]
        content = bytearray(file.read_bytes())
        place, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
        content[place] ^= bit
        file.write_bytes(content)
        with pytest.raises(UserError):
            open_bundle(folder)
        content[place] ^= bit
        file.write_bytes(content)
    assert open_bundle(folder).info["format_version"] == FORMAT_VERSION


def test_one_flipped_byte_at_random_places_of_a_zip_is_refused(packed):
    generator = random.Random(0)
    content = bytearray(packed.read_bytes())
    for _ in range(200):
        place, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
        content[place] ^= bit
        packed.write_bytes(content)
        with pytest.raises(UserError):
            open_bundle(packed)
        content[place] ^= bit
    packed.write_bytes(content)
    assert open_bundle(packed).info["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_a_zip_that_was_cut_off_is_refused(packed, kept):
    content = packed.read_bytes()
    packed.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=r"tiny\.zip"):
        open_bundle(packed)


def test_a_file_that_the_manifest_does_not_list_is_refused(folder):
    (folder / "engines/extra.so").write_bytes(b"\x7fELF")
    with pytest.raises(UserError, match=r"engines/extra\.so.*does not list"):
        open_bundle(folder)


def test_a_link_is_refused_even_to_the_right_bytes(folder, tmp_path):
    model = folder / "engines/ort/model.onnx"
    model.rename(tmp_path / "elsewhere.onnx")
    model.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(UserError, match="leaves the folder"):
        open_bundle(folder)


def test_a_newer_format_says_so(folder):
    resign(folder, lambda manifest: manifest["info"].update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(UserError, match=f"format version {FORMAT_VERSION + 1}") as caught:
        open_bundle(folder)
    assert caught.value.fix == "update export-engine"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda info: info.pop("sampler"), "lacks 'sampler'"),
        (lambda info: info["engines"]["ort"].update(dtype="fp16"), "fp16 graph, which is not there"),
        (lambda info: info["engines"]["ort"].update(file="engine.plan"), r"has no engine\.plan"),
        (lambda info: info["engines"]["ort"].update(folder=".."), r"has no model\.onnx"),
        (lambda info: info["engines"]["ort"].update(step_input="index"), "differ in step_input"),
        (lambda info: info["axes"]["batch"].update(min="1"), "axes.batch.min is a str"),
        (lambda info: info["sampler"].update(timesteps=[1.0]), "not as many as its steps"),
        (lambda info: info["graphs"]["fp32"]["info"].pop("layers"), "lacks 'layers'"),
        (lambda info: info.update(inputs={}), "inputs is no list"),
        (lambda info: info["inputs"][2].update(shape=[2]), "its first axis is not 'batch'"),
        (lambda info: info["inputs"][2].update(shape=["batch", "tokens"]), "unknown axis"),
        (lambda info: info["inputs"][2].update(largest=-1), "largest value that is no whole number, 0 or more"),
        (lambda info: info["inputs"][0].update(largest=3), "largest value that is no whole number, 0 or more"),
        (lambda info: info["output"].update(dtype="fp64"), "'sample' is of an unknown type"),
        (lambda info: info["inputs"][1].update(shape=["batch", 2]), "'timestep' is not one number for each row"),
        (lambda info: info["model"].update(parameters=10**30), "parameters is too large"),
        (lambda info: info["sampler"].update(timesteps=[], steps=0, portable=None), "not as many as its steps"),
        (lambda info: info["golden"].update(steps=[]), "no golden steps"),
        (
            lambda info: info["golden"].update(picture={"runner": "", "count": 1, "limits_db": {"fp32": 1}, "peak": 0}),
            "peak is not above 0",
        ),
    ],
)
def test_a_malformed_manifest_is_refused_though_its_digest_fits(folder, change, told):
    resign(folder, lambda manifest: change(manifest["info"]))
    with pytest.raises(UserError, match=told):
        open_bundle(folder)


def zipped(path, entries, comment=True):
    """Writes a zip of our kind with the entries as given: (name or ZipInfo, content)."""
    from engines.zipped import DIGEST_CHARACTERS, digest_of_zip

    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content)
        if comment:
            archive.comment = MARK + b"0" * DIGEST_CHARACTERS
    if comment:
        digest = digest_of_zip(path).encode()
        path.write_bytes(path.read_bytes()[:-DIGEST_CHARACTERS] + digest)
    return path


def link():
    entry = zipfile.ZipInfo("engines/link")
    entry.external_attr = 0o120777 << 16
    return entry


def packed_entry():
    entry = zipfile.ZipInfo("zeros")
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        pytest.param([("a", b"")], r"holds no manifest\.json", id="no manifest"),
        pytest.param([("manifest.json", b"{}"), ("../out", b"x")], "leaves the folder", id="dots"),
        pytest.param([("manifest.json", b"{}"), ("/tmp/out", b"x")], "leaves the folder", id="absolute"),
        pytest.param([("manifest.json", b"{}"), (link(), b"/etc/passwd")], "a link", id="link"),
        pytest.param([("manifest.json", b"{}"), ("folder/", b"")], "a folder", id="folder"),
        pytest.param([("manifest.json", b"{}"), (zipfile.ZipInfo(""), b"x")], "has no name", id="no name"),
        pytest.param([("manifest.json", b"{}"), (packed_entry(), bytes(1 << 20))], "packed", id="bomb"),
        pytest.param([("manifest.json", b"{}"), ("file", b""), ("file/inside", b"")], "file", id="file as a folder"),
        pytest.param([("manifest.json", b"{}")], "lacks", id="manifest of nothing"),
    ],
)
def test_a_zip_of_anything_else_is_refused_though_its_digest_fits(tmp_path, entries, told):
    with pytest.raises(UserError, match=told):
        open_bundle(zipped(tmp_path / "bad.zip", entries))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_a_name_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="twice"):
        open_bundle(zipped(tmp_path / "bad.zip", [("manifest.json", b"{}"), ("manifest.json", b"{}")]))


def test_a_zip_of_another_program_is_no_bundle(tmp_path):
    with pytest.raises(UserError, match="no bundle of ours"):
        open_bundle(zipped(tmp_path / "other.zip", [("manifest.json", b"{}")], comment=False))


def test_what_is_neither_folder_nor_zip_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    for path in (tmp_path / "text", tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError) as caught:
            open_bundle(path)
        assert caught.value.fix
