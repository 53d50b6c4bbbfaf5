"""Artifacts: whole or not at all, opened only as they were written, and written over nothing that is not ours."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engines import artifacts
from engines.artifacts import Json, Request, current, digest_file, digest_json, drafting, kind_of, open_artifact
from engines.errors import UserError

REQUEST = Request("graph", {"quantized": "a" * 64}, {"dtype": "fp16"}, {"torch": "2.13"})
OTHER = Request("graph", {"quantized": "a" * 64}, {"dtype": "fp32"}, {"torch": "2.13"})
FILES = {"model.onnx": b"a graph", "sub/plan.json": b"{}", "empty": b""}


def make(path: Path, request: Request = REQUEST, files: dict[str, bytes] = FILES, **info: object) -> Path:
    with drafting(path, request, resumable=True) as draft:
        for name, content in files.items():
            (draft.path / name).parent.mkdir(exist_ok=True)
            (draft.path / name).write_bytes(content)
        draft.info = dict(info)
    return path


def resign(path: Path, change: Callable[[Json], object]) -> None:
    """Changes a manifest and gives it the digest that fits, as someone who means harm would."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    artifacts.seal(path / "manifest.json", manifest)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def fail(path: Path, error: BaseException, request: Request = REQUEST, *, resumable: bool = True) -> None:
    """Starts an artifact, writes one file of it and raises."""
    with drafting(path, request, resumable=resumable) as draft:
        (draft.path / "shard-0").write_bytes(b"done before the end")
        raise error


def interrupt(path: Path, request: Request = REQUEST) -> None:
    """Leaves a draft behind, as Ctrl-C does, with one file in it."""
    with pytest.raises(KeyboardInterrupt):
        fail(path, KeyboardInterrupt(), request)


@pytest.fixture
def made(tmp_path):
    return make(tmp_path / "graph", layers=2)


def test_a_whole_artifact_opens(made):
    artifact = open_artifact(made, "graph")
    assert artifact.path == made
    assert artifact.info == {"layers": 2}
    assert set(artifact.files()) == set(FILES)
    assert artifact.files("sub/") == ["sub/plan.json"]
    assert {name: artifact.file(name).read_bytes() for name in artifact.files()} == FILES
    assert artifact.bytes == sum(map(len, FILES.values()))
    assert kind_of(made) == "graph"


def test_the_manifest_holds_the_request_and_the_files_digests(made):
    manifest = open_artifact(made, "graph").manifest
    assert {key: manifest[key] for key in ("kind", "made_from", "settings", "versions")} == REQUEST.to_json()
    assert manifest["request"] == REQUEST.digest
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
        name: digest_file(made / name) for name in FILES
    }


def test_nothing_but_the_artifact_lies_there_afterwards(made):
    assert names(made.parent) == ["graph"]
    assert set(snapshot(made)) == {*FILES, "manifest.json", "timings.json"}


def test_the_digest_follows_content_not_time_or_place(tmp_path, made):
    digest = open_artifact(made, "graph").digest
    assert open_artifact(make(tmp_path / "again", layers=2), "graph").digest == digest
    assert open_artifact(make(tmp_path / "info", layers=3), "graph").digest != digest
    assert open_artifact(make(tmp_path / "request", OTHER, layers=2), "graph").digest != digest
    changed = {**FILES, "model.onnx": b"A graph"}
    assert open_artifact(make(tmp_path / "file", files=changed, layers=2), "graph").digest != digest


def test_a_name_that_the_manifest_does_not_list_is_refused(made):
    (made / "extra").write_bytes(b"")
    with pytest.raises(UserError, match="lists no file 'extra'") as caught:
        open_artifact(made, "graph").file("extra")
    assert "model.onnx" in caught.value.fix


def test_one_flipped_bit_in_any_byte_is_refused(made):
    content = bytearray((made / "model.onnx").read_bytes())
    for position in range(len(content)):
        content[position] ^= 1
        (made / "model.onnx").write_bytes(content)
        with pytest.raises(UserError, match=r"model\.onnx: sha256") as caught:
            open_artifact(made, "graph")
        assert str(made) in caught.value.fix
        content[position] ^= 1


@pytest.mark.parametrize("content", [b"a graph and more", b"a gra", b""])
def test_a_file_of_another_length_is_refused(made, content):
    (made / "model.onnx").write_bytes(content)
    with pytest.raises(UserError, match=f"{len(content)} bytes, its manifest says 7") as caught:
        open_artifact(made, "graph")
    assert str(made) in caught.value.fix


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(made, name):
    (made / name).unlink()
    with pytest.raises(UserError, match=f"{name}.*is missing") as caught:
        open_artifact(made, "graph")
    assert str(made) in caught.value.fix


def test_a_folder_in_place_of_a_file_is_refused(made):
    (made / "model.onnx").unlink()
    (made / "model.onnx").mkdir()
    with pytest.raises(UserError, match=r"model\.onnx.*is missing"):
        open_artifact(made, "graph")


def test_another_kind_is_refused(made):
    with pytest.raises(UserError, match="kind 'graph', where one of kind 'engine'") as caught:
        open_artifact(made, "engine")
    assert "engine" in caught.value.fix


@pytest.mark.parametrize(
    ("place", "told"), [("nowhere", "no such folder"), ("folder", "no manifest.json"), ("file", "it is a file")]
)
def test_what_is_no_artifact_is_refused(tmp_path, place, told):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{place}: not an engine folder.*{told}") as caught:
        open_artifact(tmp_path / place, "engine")
    assert "the engine folder that `export-engine build` wrote" in caught.value.fix


def test_a_run_where_a_bundle_is_wanted_is_told_how_to_bundle_it(tmp_path):
    make(tmp_path / "quantized")
    with pytest.raises(UserError, match="not a bundle folder") as caught:
        open_artifact(tmp_path, "bundle")
    assert f"export-engine bundle {tmp_path} --out" in caught.value.fix


def test_who_has_a_damaged_bundle_is_not_told_to_make_it_alone(tmp_path):
    place = make(tmp_path / "tiny", Request("bundle", {}, {}, {}))
    (place / "model.onnx").write_bytes(b"A graph")
    with pytest.raises(UserError, match="sha256") as caught:
        open_artifact(place, "bundle")
    assert caught.value.fix == "do not use it: it was damaged or tampered with; get it, or make it, again"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"layers": 2', '"layers": 3'),
        ('"layers": 2', '"layers": NaN'),
        ('"layers": 2', '"layers": 2, "more": 1'),
        ('"fp16"', '"fp32"'),
        ('"bytes": 7', '"bytes": 8'),
        ('"kind": "graph"', '"kind": "engine"'),
        ('"model.onnx"', '"other.onnx"'),
        (f'"schema_version": {artifacts.SCHEMA_VERSION}', '"schema_version": 1'),
        (f'"schema_version": {artifacts.SCHEMA_VERSION}', '"schema_version": null'),
        ('"made_from"', '"mad_from"'),
        ('"info"', '"inf"'),
        ('"files"', '"fils"'),
        ('"digest": "', '"digest": "0'),
    ],
)
def test_a_changed_manifest_is_refused(made, old, new):
    text = (made / "manifest.json").read_text()
    assert old in text
    (made / "manifest.json").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=r"manifest\.json") as caught:
        open_artifact(made, "graph")
    assert caught.value.fix


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="half"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b"{}", id="without keys"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(b'{"a":' + b"[" * 50_000, id="deeply nested"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(made, content):
    (made / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json") as caught:
        open_artifact(made, "graph")
    assert caught.value.fix


def test_a_huge_manifest_is_not_even_read(made):
    with (made / "manifest.json").open("r+b") as file:
        file.truncate(artifacts.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(UserError, match="more than"):
        open_artifact(made, "graph")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "x/" * 200 + "x"])
def test_what_cannot_be_a_files_name_is_refused(made, name):
    resign(made, lambda manifest: manifest["files"].update({name: {"bytes": 1, "sha256": "f" * 64}}))
    with pytest.raises(UserError, match="cannot be a file's name"):
        open_artifact(made, "graph")


@pytest.mark.parametrize("digest", ["", "0", "\ud800", "é" * 64])
def test_a_digest_that_is_none_is_refused(made, digest):
    manifest = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps(manifest | {"digest": digest}))
    with pytest.raises(UserError, match="malformed"):
        open_artifact(made, "graph")


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "{root}/secret", "link", "folder-link/secret"])
def test_a_file_name_that_leaves_the_folder_is_refused_though_all_digests_fit(made, name):
    root = made.parent
    (root / "secret").write_bytes(b"secret")
    (made / "link").symlink_to(root / "secret")
    (made / "folder-link").symlink_to(root)
    name = name.format(root=root)
    entry = {"bytes": 6, "sha256": digest_file(root / "secret")}
    resign(made, lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(UserError, match="leaves the folder") as caught:
        open_artifact(made, "graph")
    assert name in caught.value.what
    assert "do not use" in caught.value.fix


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m.update(files=["model.onnx"]), id="files as a list"),
        pytest.param(lambda m: m["files"].update({"model.onnx": 7}), id="entry as a number"),
        pytest.param(lambda m: m["files"]["model.onnx"].pop("bytes"), id="no bytes"),
        pytest.param(lambda m: m["files"]["model.onnx"].pop("sha256"), id="no sha256"),
        pytest.param(lambda m: m["files"]["model.onnx"].update(sha256=7), id="sha256 as a number"),
        pytest.param(lambda m: m.update(info=None), id="no info"),
    ],
)
def test_a_malformed_manifest_is_refused_though_its_digest_fits(made, change):
    resign(made, change)
    with pytest.raises(UserError, match="graph") as caught:
        assert open_artifact(made, "graph").info == {"layers": 2}
    assert caught.value.fix


def test_current_returns_what_the_same_request_made(made):
    found = current(made, REQUEST)
    assert found is not None
    assert found.digest == open_artifact(made, "graph").digest


def test_current_is_none_for_another_request_or_an_empty_place(made, tmp_path):
    assert current(made, OTHER) is None
    assert current(tmp_path / "nowhere", REQUEST) is None


def test_current_refuses_a_damaged_artifact(made):
    (made / "model.onnx").write_bytes(b"A graph")
    with pytest.raises(UserError, match=r"model\.onnx"):
        current(made, REQUEST)


def test_current_refuses_a_manifest_of_another_program(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "a web page", "icons": []}')
    with pytest.raises(UserError, match="lacks"):
        current(tmp_path, REQUEST)


def test_the_digest_of_a_request_does_not_depend_on_the_order_of_its_keys():
    settings = {"samples": 1, "seed": 0}
    swapped = dict(reversed(settings.items()))
    assert Request("graph", {}, settings, {}).digest == Request("graph", {}, swapped, {}).digest
    requests = [REQUEST, OTHER, Request("engine", *list(vars(REQUEST).values())[1:])]
    assert len({request.digest for request in requests}) == 3


@pytest.mark.parametrize("error", [RuntimeError("no"), ValueError("no"), UserError("no", fix="yes"), SystemExit(3)])
def test_an_exception_inside_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)) as caught:
        fail(tmp_path / "graph", error, resumable=False)
    assert caught.value is error
    assert names(tmp_path) == []


def test_an_error_of_the_request_leaves_nothing_of_a_resumable_draft(tmp_path):
    with pytest.raises(UserError):
        fail(tmp_path / "graph", UserError("no", fix="yes"))
    assert names(tmp_path) == []


def test_an_exception_inside_leaves_an_older_artifact_as_it_was(made):
    before = snapshot(made)
    with pytest.raises(RuntimeError):
        fail(made, RuntimeError(), OTHER, resumable=False)
    assert snapshot(made) == before
    assert names(made.parent) == ["graph"]


def test_facts_that_json_cannot_hold_leave_nothing(tmp_path):
    for fact in (float("inf"), Path("x")):
        with pytest.raises((ValueError, TypeError)), drafting(tmp_path / "graph", REQUEST) as draft:
            draft.info = {"fact": fact}
    assert names(tmp_path) == []


def test_an_interrupt_keeps_the_draft_and_the_same_request_gets_it_back(tmp_path):
    path = tmp_path / "graph"
    interrupt(path)
    assert not path.exists()
    with drafting(path, REQUEST, resumable=True) as draft:
        assert draft.resumed
        assert (draft.path / "shard-0").read_bytes() == b"done before the end"
        (draft.path / "shard-1").write_bytes(b"done after it")
    assert open_artifact(path, "graph").files() == ["shard-0", "shard-1"]
    assert names(tmp_path) == ["graph"]


def test_a_draft_that_cannot_be_resumed_starts_empty_after_a_kill_and_is_removed_by_an_interrupt(tmp_path):
    path = tmp_path / "graph"
    interrupt(path)  # what a kill leaves: a resumable draft's files, of the same request
    with drafting(path, REQUEST) as draft:
        assert [file.name for file in draft.path.iterdir()] == [".request"]
    with pytest.raises(KeyboardInterrupt), drafting(tmp_path / "other", REQUEST):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["graph"]


def test_a_resumed_artifact_is_the_one_that_no_interrupt_met(tmp_path):
    interrupt(tmp_path / "resumed")
    make(tmp_path / "resumed", files={"shard-1": b"2"})
    make(tmp_path / "straight", files={"shard-0": b"done before the end", "shard-1": b"2"})
    resumed, straight = (open_artifact(tmp_path / name, "graph") for name in ("resumed", "straight"))
    assert resumed.manifest == straight.manifest


def test_another_request_does_not_get_an_interrupted_draft(tmp_path):
    path = tmp_path / "graph"
    interrupt(path)
    with drafting(path, OTHER, resumable=True) as draft:
        assert not draft.resumed
        assert not (draft.path / "shard-0").exists()
        (draft.path / "model.onnx").write_bytes(b"")
    assert open_artifact(path, "graph").files() == ["model.onnx"]


def test_while_one_process_writes_an_artifact_another_is_refused(tmp_path):
    path = tmp_path / "graph"
    other = f"""
from pathlib import Path
from engines.artifacts import Request, drafting
from engines.errors import UserError
try:
    with drafting(Path({str(path)!r}), Request("graph", {{}}, {{}}, {{}})):
        print("written")
except UserError as error:
    print(error)
"""

    def second():
        return subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=True).stdout

    with drafting(path, REQUEST) as draft:
        (draft.path / "half").write_bytes(b"of this one")
        assert "another process is writing it" in second()
    assert open_artifact(path, "graph").files() == ["half"]
    assert second() == "written\n"
    assert names(tmp_path) == ["graph"]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_stands_where_a_draft_belongs_goes(kind, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    if kind == "link":
        (tmp_path / ".graph.partial").symlink_to(tmp_path / "mine")
    else:
        (tmp_path / ".graph.partial").write_text("left over")
    make(tmp_path / "graph")
    assert snapshot(tmp_path / "mine") == {"thesis.txt": b"mine"}
    assert names(tmp_path) == ["graph", "mine"]


def test_an_artifact_of_an_earlier_schema_is_made_again(made):
    resign(made, lambda manifest: manifest.update(schema_version=artifacts.SCHEMA_VERSION - 1))
    with pytest.raises(UserError, match="make the artifact again"):
        open_artifact(made, "graph")
    assert current(made, REQUEST) is None
    make(made)
    assert current(made, REQUEST) is not None


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
def test_a_file_that_could_not_be_written_leaves_the_one_before_and_nothing_else(stop, tmp_path):
    path = tmp_path / "report.json"
    artifacts.write_json(path, {"a": 1})

    def interrupted():
        with artifacts.replacing(path) as temporary:
            temporary.write_text("half")
            raise stop

    with pytest.raises((UserError, KeyboardInterrupt)):
        interrupted()
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["report.json"]


def test_a_first_draft_is_not_resumed(tmp_path):
    with drafting(tmp_path / "graph", REQUEST, resumable=True) as draft:
        assert not draft.resumed


def test_an_interrupt_can_come_twice(tmp_path):
    path = tmp_path / "graph"
    interrupt(path)
    interrupt(path)
    with drafting(path, REQUEST, resumable=True) as draft:
        assert draft.resumed


def test_an_interrupt_leaves_an_older_artifact_as_it_was(made):
    before = snapshot(made)
    interrupt(made, OTHER)
    assert snapshot(made) == before
    assert open_artifact(made, "graph").info == {"layers": 2}


def test_an_artifact_takes_the_place_of_an_older_one_whole(made):
    make(made, OTHER, {"new": b"1"})
    assert open_artifact(made, "graph").files() == ["new"]
    assert set(snapshot(made)) == {"new", "manifest.json", "timings.json"}
    assert names(made.parent) == ["graph"]


def test_missing_parents_are_made(tmp_path):
    assert open_artifact(make(tmp_path / "a" / "b" / "graph"), "graph").info == {}


def test_an_empty_folder_may_be_written_to(tmp_path):
    (tmp_path / "graph").mkdir()
    assert open_artifact(make(tmp_path / "graph"), "graph").info == {}


def test_a_folder_of_other_things_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    with pytest.raises(UserError, match="thesis: is a folder that holds other things") as caught:
        make(tmp_path / "thesis")
    assert "folder" in caught.value.fix
    assert snapshot(tmp_path) == {"thesis/chapter": b"years of work"}


def test_a_folder_with_another_programs_manifest_is_refused_and_kept(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / "site" / "index.html").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="site"):
        make(tmp_path / "site")
    assert snapshot(tmp_path) == before


def test_a_file_at_the_path_is_refused_and_kept(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="notes: cannot be a folder: it is a file") as caught:
        make(tmp_path / "notes")
    assert caught.value.fix
    assert snapshot(tmp_path) == {"notes": b"mine"}


@pytest.mark.parametrize("below", ["graph", "a/graph", "a/b/graph"])
def test_a_path_beneath_a_file_is_refused(tmp_path, below):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="notes is a file") as caught:
        make(tmp_path / "notes" / below)
    assert caught.value.fix
    assert snapshot(tmp_path) == {"notes": b"mine"}


def test_the_working_directory_is_refused_as_any_folder_of_other_things(tmp_path, monkeypatch):
    (tmp_path / "chapter").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        make(Path())
    assert snapshot(tmp_path) == {"chapter": b"years of work"}


def test_an_artifact_behind_a_link_can_be_made_again_and_again(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "graph").symlink_to("disk")
    for request in (REQUEST, OTHER, REQUEST):
        make(tmp_path / "graph", request)
        assert current(tmp_path / "graph", request) is not None


def test_a_name_too_long_for_the_disk_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="could not be written") as caught:
        make(tmp_path / ("n" * 255))
    assert caught.value.fix
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "writable"),
        (errno.EROFS, "writable"),
    ],
)
def test_what_the_disk_refuses_is_the_users_error_and_leaves_nothing(tmp_path, code, fix):
    with pytest.raises(UserError, match="graph: could not be written") as caught:
        fail(tmp_path / "graph", OSError(code, os.strerror(code)), resumable=False)
    assert os.strerror(code) in caught.value.what
    assert fix in caught.value.fix
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG])
def test_a_disk_that_is_full_only_at_the_end_leaves_nothing_either(tmp_path, monkeypatch, code):
    def full(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="could not be written") as caught, drafting(tmp_path / "graph", REQUEST):
        pass
    assert "what is finished is kept, nothing half-written" in caught.value.fix
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), MemoryError(), RuntimeError("can't allocate memory")])
def test_what_is_no_fault_of_the_request_costs_a_resumable_draft_nothing(tmp_path, error):
    with pytest.raises((UserError, MemoryError, RuntimeError)) as caught:
        fail(tmp_path / "graph", error)
    if isinstance(caught.value, UserError):
        assert "what is finished is kept" in caught.value.fix
    with drafting(tmp_path / "graph", REQUEST, resumable=True) as draft:
        assert draft.resumed
        assert (draft.path / "shard-0").read_bytes() == b"done before the end"


@pytest.mark.parametrize("nth", [1, 2])  # a file, the manifest
def test_a_disk_that_is_full_at_the_very_end_costs_a_resumable_draft_nothing(tmp_path, monkeypatch, nth):
    path, calls, flush = tmp_path / "graph", itertools.count(1), os.fsync

    def full_once(handle: int) -> None:
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    monkeypatch.setattr(os, "fsync", full_once)
    with pytest.raises(UserError, match="could not be written"):
        make(path, files={"model.onnx": b"a graph"})
    with drafting(path, REQUEST, resumable=True) as draft:
        assert draft.resumed
    assert open_artifact(path, "graph").files() == ["model.onnx"]


def test_other_faults_of_the_system_are_passed_on(tmp_path):
    with pytest.raises(OSError, match="nothing to do with writing") as caught:
        fail(tmp_path / "graph", OSError(errno.EPIPE, "nothing to do with writing"), resumable=False)
    assert caught.value.errno == errno.EPIPE
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}), ({"ä": "ö"}, {"ä": "ö"})],
)
def test_json_digests_do_not_depend_on_the_order_of_keys(before, after):
    assert digest_json(before) == digest_json(after)
    assert digest_json(before) != digest_json({**before, "c": None})


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "facts.json"
    artifacts.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        artifacts.write_json(path, {"a": float("nan")})
    assert artifacts.read_json(path) == {"a": 1}


def test_an_artifact_of_another_kind_is_never_replaced(made):
    with pytest.raises(UserError, match="a graph, which"):
        make(made, Request("engine", {}, {}, {}))
    assert kind_of(made) == "graph"


def test_nothing_is_written_into_an_artifact(made):
    with pytest.raises(UserError, match="lies within") as caught:
        make(made / "sub" / "other")
    assert "outside" in caught.value.fix
    assert open_artifact(made, "graph").info == {"layers": 2}


def test_a_file_that_may_not_be_read_is_the_users_to_mend(made, monkeypatch):
    def refuse(*_):  # root, who tests may run as, may read all
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("hashlib.file_digest", refuse)
    with pytest.raises(UserError, match="cannot be read") as caught:
        open_artifact(made, "graph")
    assert caught.value.fix == "make it readable"
