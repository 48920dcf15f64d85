"""The bundle as a reader has it: whole, or refused as damaged, foreign or of another schema; no path leaves it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from manifests import HASH, SITES, make_bundle, make_expert, make_manifest, reseal
from safetensors.numpy import save

from lime_edge.bundle import bundle as reading
from lime_edge.bundle import seen
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.change import add_blend, add_experts, remove_expert
from lime_edge.bundle.experts import Expert
from lime_edge.bundle.fields import Companion
from lime_edge.bundle.manifest import MANIFEST, REFERENCE
from lime_edge.bundle.staging import stage_directory, write_file
from lime_edge.errors import EXIT_STORAGE, LimeEdgeError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/lime-edge/seen"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "x.lime"), verify=True)
    assert bundle.manifest.experts == ("one", "two")
    assert bundle.manifest.sites == SITES
    assert set(bundle.manifest.files) == {
        "onnx/model.onnx",
        REFERENCE,
        "experts/one.safetensors",
        "experts/two.safetensors",
    }
    assert bundle.open_bank().residual("two").tolist() == [2, 1, 0, -1, -2]
    assert {p.name for p in tmp_path.iterdir()} == {"x.lime", "cache"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda b: b.update(schema=1), "schema: expected 2, found 1\n  hint: export again"),
        (lambda b: b.update(format="other"), "not a lime-edge bundle"),
        (lambda b: b.pop("sites"), "missing required field `sites`"),
        (lambda b: b["files"].pop("experts/one.safetensors"), "expert 'one' has no file entry"),
        (lambda b: b["targets"][0].update(threads=10**6), "<= 1024"),
    ],
)
def test_bad_manifest_is_refused(tmp_path: Path, edit: Any, message: str) -> None:
    path = make_bundle(tmp_path / "x.lime")
    reseal(path, edit)
    with pytest.raises(LimeEdgeError, match=message):
        Bundle.open(path)


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace('"tiny"', '"tall"'))
    with pytest.raises(LimeEdgeError, match="manifest_sha256 does not fit"):
        Bundle.open(path)


def test_no_bundle_and_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LimeEdgeError, match="no such bundle"):
        Bundle.open(tmp_path / "nothing.lime")
    with pytest.raises(LimeEdgeError, match=r"lime.json is missing"):
        Bundle.open(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format":')
    with pytest.raises(LimeEdgeError, match="not readable JSON"):
        Bundle.open(tmp_path)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(LimeEdgeError, match="not a plain file"):
        Bundle.open(tmp_path)
    (tmp_path / MANIFEST).rmdir()
    os.mkfifo(tmp_path / MANIFEST)
    with pytest.raises(LimeEdgeError, match="not a plain file"):  # and does not wait for someone to write
        Bundle.open(tmp_path)


def test_unreadable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = make_bundle(tmp_path / "x.lime"), os.open

    def refuse(name: Any, *args: Any, **options: Any) -> int:
        if name == "model.onnx":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(name, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(LimeEdgeError, match="onnx/model.onnx cannot be read: Permission denied"):
        Bundle.open(path)


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    (path / "onnx/model.onnx").write_bytes(b"gra")
    (path / "experts/two.safetensors").unlink()
    (path / REFERENCE).write_bytes(bytes((path / REFERENCE).stat().st_size))
    with pytest.raises(LimeEdgeError) as caught:
        Bundle.open(path)
    assert "onnx/model.onnx: size in bytes: expected 5, found 3" in str(caught.value)
    assert "experts/two.safetensors is missing" in str(caught.value)
    assert f"{REFERENCE}: sha256" in str(caught.value)


# when what is hashed


def test_small_files_are_hashed_whenever_a_bundle_is_opened(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    Bundle.open(path)
    (path / "onnx/model.onnx").write_bytes(b"grapX")
    with pytest.raises(LimeEdgeError, match="onnx/model.onnx: sha256"):
        Bundle.open(path)


def flip(file: Path, place: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_an_expert_is_hashed_when_it_is_used(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    flip(path / "experts/two.safetensors")
    bank = Bundle.open(path).open_bank()
    assert bank.residual("one").tolist() == [1, 0, -1, -2, -3]
    for _ in range(2):
        with pytest.raises(LimeEdgeError, match=r"experts/two.safetensors: sha256 is another"):
            bank.residual("two")
    with pytest.raises(LimeEdgeError, match=r"experts/two.safetensors: sha256"):
        Bundle.open(path, verify=True)


def make_large(path: Path) -> Path:
    """A bundle whose graph is too large to be hashed at every opening, written a while ago."""
    make_bundle(path)
    graph = path / "onnx/model.onnx"
    graph.write_bytes(bytes(reading.SMALL + 1))
    reseal(path)
    age(graph)
    return path


def age(file: Path) -> None:
    """Make it look settled: notes are not taken of what was written just now."""
    stamp = file.stat().st_mtime_ns - 10**10 + 12345
    os.utime(file, ns=(stamp, stamp))


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    hashed: list[str] = []
    real = reading.Inside.hash

    def count(self: reading.Inside, name: str) -> str:
        hashed.append(name)
        return real(self, name)

    monkeypatch.setattr(reading.Inside, "hash", count)
    monkeypatch.setattr(seen.time, "time_ns", lambda real=seen.time.time_ns: real() + 10**10)
    return hashed


def test_large_files_are_hashed_when_first_seen_or_changed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, hashed = make_large(tmp_path / "x.lime"), count_hashes(monkeypatch)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    for _ in range(3):
        Bundle.open(path).check_target("onnx")
    assert hashed.count("onnx/model.onnx") == 1
    assert before == {p: p.stat().st_mtime_ns for p in path.rglob("*")}, "notes are not taken in the bundle"
    graph = path / "onnx/model.onnx"
    stamp = graph.stat().st_mtime_ns
    flip(graph)
    os.utime(graph, ns=(stamp, stamp))  # size and time as before: the change time tells
    with pytest.raises(LimeEdgeError, match="onnx/model.onnx: sha256"):
        Bundle.open(path).check_target("onnx")
    flip(graph)
    Bundle.open(path).check_target("onnx")
    Bundle.open(path).check_target("coreml")  # nothing of another target is looked at
    for note in cache.iterdir():
        note.chmod(0o666)  # others could have written it
    hashed.clear()
    Bundle.open(path).check_target("onnx")
    assert hashed.count("onnx/model.onnx") == 1


def test_a_moved_or_copied_bundle_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashed = make_large(tmp_path / "x.lime"), count_hashes(monkeypatch)
    Bundle.open(path).check_target("onnx")
    shutil.copytree(path, tmp_path / "y.lime")
    Bundle.open(tmp_path / "y.lime").check_target("onnx")
    assert hashed.count("onnx/model.onnx") == 2


def test_a_file_that_was_just_written_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another write within the clock's step would not show."""
    path = make_large(tmp_path / "x.lime")
    hashed = count_hashes(monkeypatch)
    monkeypatch.setattr(seen.time, "time_ns", lambda: (path / "onnx/model.onnx").stat().st_ctime_ns + 10**6)
    Bundle.open(path).check_target("onnx")
    Bundle.open(path).check_target("onnx")
    assert hashed.count("onnx/model.onnx") == 2


@pytest.mark.parametrize("note", [b"", b"[", b"{}", b'{"onnx/model.onnx": 3}', b"[" * 10**5, b"\xff"])
def test_a_broken_note_is_no_note(tmp_path: Path, cache: Path, note: bytes) -> None:
    path = make_large(tmp_path / "x.lime")
    Bundle.open(path).check_target("onnx")
    for file in cache.iterdir():
        file.write_bytes(note)
    flip(path / "onnx/model.onnx")
    with pytest.raises(LimeEdgeError, match="sha256"):
        Bundle.open(path).check_target("onnx")


def test_no_cache_folder_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_large(tmp_path / "x.lime")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    Bundle.open(path, verify=True).check_target("onnx")


def test_notes_do_not_pile_up(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "MOST_BUNDLES", 3)
    for index in range(6):
        seen.write_marks(tmp_path / str(index), {})
    assert len(list(cache.iterdir())) == 3


# paths


def test_no_link_is_followed(tmp_path: Path) -> None:
    path, outside = make_bundle(tmp_path / "x.lime"), tmp_path / "outside"
    outside.mkdir()
    for name in ("onnx/model.onnx", REFERENCE, "experts/one.safetensors", MANIFEST):
        file = path / name
        file.rename(outside / "same")
        file.symlink_to(outside / "same")
        with pytest.raises(LimeEdgeError, match=f"{name} is reached by a link"):
            Bundle.open(path)
        (outside / "same").replace(file)
    (path / "experts").rename(outside / "experts")
    (path / "experts").symlink_to(outside / "experts")
    with pytest.raises(LimeEdgeError, match=r"experts/one.safetensors is reached by a link"):
        Bundle.open(path)
    with pytest.raises(LimeEdgeError, match="is reached by a link"):
        add_experts(path, [make_expert("three")])
    assert sorted(p.name for p in (outside / "experts").iterdir()) == ["one.safetensors", "two.safetensors"]


def test_a_link_to_a_bundle_is_one(tmp_path: Path) -> None:
    make_bundle(tmp_path / "v1.lime")
    (tmp_path / "now.lime").symlink_to("v1.lime")
    add_experts(tmp_path / "now.lime", [make_expert("three")])
    assert Bundle.open(tmp_path / "v1.lime", verify=True).manifest.experts == ("one", "two", "three")
    with stage_directory(tmp_path / "now.lime", replace=True) as stage:
        (stage / "new").write_text("x")
    assert (tmp_path / "now.lime").is_symlink() and (tmp_path / "v1.lime/new").is_file()


def test_planted_links_are_not_written_through(tmp_path: Path) -> None:
    path, victim = make_bundle(tmp_path / "x.lime"), tmp_path / "victim"
    victim.write_text("precious")
    for name in (f".{MANIFEST}.partial", f".{MANIFEST}.{os.getpid()}.partial", "experts/three.safetensors"):
        (path / name).symlink_to(victim)
    add_experts(path, [make_expert("three", 3)])
    assert victim.read_text() == "precious"
    assert Bundle.open(path, verify=True).open_bank().vector("three").tolist() == [3] * 5
    assert not (path / "experts/three.safetensors").is_symlink()


@pytest.mark.parametrize("name", ["../../victim", "../onnx/model.onnx", "a/b", "", "con"])
def test_names_that_are_none_change_nothing(tmp_path: Path, name: str) -> None:
    path = make_bundle(tmp_path / "x.lime")
    (tmp_path / "victim.safetensors").write_text("precious")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(LimeEdgeError, match="unknown expert"):
        remove_expert(path, name)
    with pytest.raises(LimeEdgeError, match="valid expert name|file name on Windows"):
        add_experts(path, [make_expert(name)])
    assert (tmp_path / "victim.safetensors").exists()
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


# experts come and go


def test_experts_come_and_go(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    add_experts(path, [make_expert("three", 3)])
    with pytest.raises(LimeEdgeError, match="'three' exists already"):
        add_experts(path, [make_expert("three", 4)])
    with pytest.raises(LimeEdgeError, match=r"'three' exists already\n  hint: letter case"):
        add_experts(path, [make_expert("Three", 4)], replace=True)
    for value in (4, 5, 5, 6):
        add_experts(path, [make_expert("three", value)], replace=True)
    opened = Bundle.open(path, verify=True)
    assert opened.manifest.experts == ("one", "two", "three") and opened.manifest.added == ("three",)
    assert opened.open_bank().vector("three").tolist() == [6] * 5
    remove_expert(path, "two")
    opened = Bundle.open(path, verify=True)
    assert opened.manifest.experts == ("one", "three")
    assert len(list((path / "experts").iterdir())) == 2
    with pytest.raises(LimeEdgeError, match="unknown expert 'two'"):
        remove_expert(path, "two")


def test_several_come_together_or_not_at_all(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    for bad in (Expert("four", np.ones(5, np.float16), "0" * 64), make_expert("one"), make_expert("three")):
        with pytest.raises(LimeEdgeError):
            add_experts(path, [make_expert("three", 3), bad])
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    add_experts(path, [make_expert("three", 3), make_expert("four", 4)])
    assert Bundle.open(path, verify=True).manifest.experts == ("one", "two", "three", "four")


def test_a_foreign_expert_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(LimeEdgeError, match=f"adapter_id: expected {HASH[:16]}, found 0000000000000000"):
        add_experts(path, [Expert("new", np.ones(5, np.float16), "0" * 64)])
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (Expert("one", np.ones(5, np.float16), "0" * 64), "adapter_id"),
        (Expert("two", np.ones(5, np.float16), HASH), "name: expected 'one', found 'two'"),
        (Expert("one", np.ones(4, np.float16), HASH), "length: expected 5, found 4"),
        (Expert("one", np.full(5, np.nan, np.float16), HASH), "NaN"),
    ],
)
def test_a_planted_expert_is_refused_when_used(tmp_path: Path, expert: Expert, message: str) -> None:
    """Its hash fits the manifest; what it says of itself does not fit the bundle."""
    path = make_bundle(tmp_path / "x.lime")
    (path / "experts/one.safetensors").write_bytes(expert.to_bytes())
    reseal(path)
    bank = Bundle.open(path).open_bank()
    with pytest.raises(LimeEdgeError, match=message):
        bank.residual("one")


@pytest.mark.parametrize(
    "reference",
    [np.full(5, np.nan, np.float32), np.full(5, 1e30, np.float32), np.ones(4, np.float32), np.ones(5, np.float64)],
)
def test_a_bad_reference_is_refused(tmp_path: Path, reference: np.ndarray) -> None:
    path = make_bundle(tmp_path / "x.lime")
    (path / REFERENCE).write_bytes(save({"reference": reference}))
    reseal(path)
    with pytest.raises(LimeEdgeError, match=REFERENCE):
        Bundle.open(path).open_bank()


def test_a_single_bundle_takes_no_experts_and_keeps_its_own(tmp_path: Path) -> None:
    adapter = msgspec.structs.replace(make_manifest().adapter, single="one")
    target = msgspec.structs.replace(make_manifest().target_list[0], expert_input=False)
    path = make_bundle(tmp_path / "x.lime", ("one",), adapter=adapter, target_list=(target,))
    with pytest.raises(LimeEdgeError, match="exported with `single`: it holds 'one' only"):
        add_experts(path, [make_expert("three")])
    with pytest.raises(LimeEdgeError, match="`single`"):
        remove_expert(path, "one")


def test_the_default_moves_on_when_it_is_removed(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    remove_expert(path, "one")
    assert Bundle.open(path).manifest.default == "two"
    remove_expert(path, "two")
    assert Bundle.open(path).manifest.default == "none"
    dora = msgspec.structs.replace(make_manifest().adapter, variant="dora")
    path = make_bundle(tmp_path / "y.lime", adapter=dora)
    remove_expert(path, "one")
    with pytest.raises(LimeEdgeError, match="'two' is the last expert, and a dora adapter cannot be switched off"):
        remove_expert(path, "two")


def test_blends_are_written(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    add_blend(path, {"one": 0.5, "two": 0.5}, "mix")
    expert = Bundle.open(path).read_expert("mix")
    assert expert.vector.tolist() == [1.5] * 5 and expert.note == "blend of one=0.5,two=0.5"
    with pytest.raises(LimeEdgeError, match="sum to"):
        add_blend(path, {"one": 0.5}, "other")
    with pytest.raises(LimeEdgeError, match="'mix' exists already"):
        add_blend(path, {"one": 0.5, "two": 0.5}, "mix")
    with pytest.raises(LimeEdgeError, match="the blend one=1e.06,two=-999999: holds values up to"):
        add_blend(path, {"one": 1e6, "two": 1 - 1e6}, "other")


def test_companions_are_kept_in_step(tmp_path: Path) -> None:
    genai = Companion(target="onnx", folder="onnx", form="onnx_adapter")
    path = make_bundle(tmp_path / "x.lime", companions={"genai": genai})
    names = lambda: sorted(p.name for p in (path / "onnx").glob("*.onnx_adapter"))  # noqa: E731
    assert names() == ["none.onnx_adapter", "one.onnx_adapter", "two.onnx_adapter"]
    add_experts(path, [make_expert("three", 3)])
    first = (path / "onnx/three.onnx_adapter").read_bytes()
    add_experts(path, [make_expert("three", 4)], replace=True)
    files = Bundle.open(path, verify=True).manifest.companions["genai"].experts
    assert re.fullmatch(r"onnx/three-[0-9a-f]{16}\.onnx_adapter", files["three"]), "never written over"
    assert np.float32(1).tobytes() in (path / files["three"]).read_bytes() != first  # d = 4 - 3
    remove_expert(path, "one")
    (path / "onnx/left.onnx_adapter").write_text("by a killed writer")
    (path / "onnx/notes.txt").write_text("someone's own")
    remove_expert(path, "two")
    assert names() == sorted(["none.onnx_adapter", Path(files["three"]).name])
    assert (path / "onnx/notes.txt").exists()


# whole directories


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), stage_directory(tmp_path / "x.lime") as stage:
        (stage / "half").write_bytes(b"x" * 1000)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_replacing_keeps_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    with pytest.raises(LimeEdgeError, match="already exists"), stage_directory(path):
        pass
    with pytest.raises(RuntimeError), stage_directory(path, replace=True):
        raise RuntimeError
    assert Bundle.open(path).manifest.experts == ("one", "two")
    with stage_directory(path, replace=True) as stage:
        (stage / "new").write_text("x")
    assert [p.name for p in path.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["x.lime"]


def test_a_bundle_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(LimeEdgeError, match="cannot write"), stage_directory(tmp_path / "x.lime"):
        make_bundle(tmp_path / "x.lime")
    assert Bundle.open(tmp_path / "x.lime").manifest.experts == ("one", "two")


def test_storage_faults_have_their_own_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LimeEdgeError, match="cannot write") as caught, stage_directory(tmp_path / "file" / "x"):
        pass
    assert caught.value.exit_code == EXIT_STORAGE
    with pytest.raises(LimeEdgeError, match="cannot write") as caught:
        write_file(tmp_path / "missing" / "x", b"")
    assert caught.value.exit_code == EXIT_STORAGE


def test_opening_many_experts_reads_their_facts_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashed = make_bundle(tmp_path / "x.lime", tuple(f"skill_{index}" for index in range(100))), list[int]()
    real = reading.hashlib.sha256
    bundle = Bundle.open(path)

    def count(data: bytes) -> Any:
        hashed.append(len(data))
        return real(data)

    monkeypatch.setattr(reading.hashlib, "sha256", count)
    bank = bundle.open_bank()
    assert len(bank.names) == 100 and len(hashed) == 1, "the reference alone"
    bank.residual("skill_7")
    assert len(hashed) == 2


def test_a_session_keeps_the_experts_it_was_opened_with(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "x.lime")
    bank = Bundle.open(path).open_bank()
    remove_expert(path, "one")
    add_experts(path, [make_expert("two", 9)], replace=True)
    assert bank.vector("one").tolist() == [1] * 5 and bank.vector("two").tolist() == [2] * 5


def test_what_is_not_kept_is_read_later_and_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "AHEAD", 0)
    path = make_bundle(tmp_path / "x.lime")
    bank = Bundle.open(path).open_bank()
    assert bank.vector("one").tolist() == [1] * 5
    add_experts(path, [make_expert("two", 9)], replace=True)
    with pytest.raises(LimeEdgeError, match="changed after it was opened: open it again"):
        bank.vector("two")


def test_a_reader_begins_again_when_the_bundle_changed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_bundle(tmp_path / "x.lime")
    real, left = reading.decode_manifest, ["one"]

    def decode(data: bytes, where: str) -> Any:
        found = real(data, where)
        if left:
            remove_expert(path, left.pop())
        return found

    monkeypatch.setattr(reading, "decode_manifest", decode)
    assert Bundle.open(path).manifest.experts == ("two",)
