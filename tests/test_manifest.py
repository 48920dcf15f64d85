"""lime.json: its types, its ranges, its own hash, and what has to agree in it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from manifests import HASH, make_manifest, seal

from lime_edge.bundle.fields import Always, ExpertEntry, FileEntry, FromGenerationPrompt, Manifest, Prompts, Speaker
from lime_edge.bundle.identity import hash_adapter, hash_shared
from lime_edge.bundle.manifest import LARGEST, decode_manifest, encode_manifest
from lime_edge.bundle.names import check_name, check_path, find_clashes
from lime_edge.bundle.sites import SiteTable
from lime_edge.errors import LimeEdgeError

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS.parent / "tools"))
Body = dict[str, Any]


def body_of(manifest: Manifest) -> Body:
    return json.loads(encode_manifest(manifest))


def test_what_is_encoded_is_decoded() -> None:
    manifest = make_manifest(activation=FromGenerationPrompt(tokens=3, text="<a>"), prompts=Prompts(reason="loops"))
    data = encode_manifest(manifest)
    read = decode_manifest(data, "x")
    assert msgspec.structs.replace(read, manifest_sha256="0" * 64) == manifest
    assert encode_manifest(read) == data
    assert read.experts == ("one", "two") and read.sites.total == 5 and list(read.targets) == ["onnx"]


def test_every_field_is_written() -> None:
    """Readers in other languages need no defaults, and renaming a field breaks every device out there."""
    body = body_of(make_manifest())
    assert list(body) == [
        *("manifest_sha256", "format", "schema", "kind", "adapter_id", "device", "backbone", "decoder", "encoder"),
        "vision",
        *("adapter", "quantization", "default", "activation", "prompts", "tokenizer", "experts", "targets"),
        *("companions", "versions", "export", "sites", "files"),
    ]
    assert body["format"] == "lime-edge-bundle" and body["schema"] == 2
    assert body["sites"][1] == {"name": "model.b", "width": 2, "offset": 3}
    assert body["experts"][0] == {"name": "one", "file": "experts/one.safetensors", "added": False}
    assert body["activation"] == {"kind": "always"} and body["targets"][0]["target"] == "onnx"


def test_the_seal_is_what_the_page_says() -> None:
    """In other words than the code's: sha256 of the bytes with zeros in place of the digits."""
    text = encode_manifest(make_manifest()).decode()
    before, _, rest = text.partition('"manifest_sha256": "')
    digits, after = rest[:64], rest[64:]
    blank = before + '"manifest_sha256": "' + "0" * 64 + after
    assert hashlib.sha256(blank.encode()).hexdigest() == digits
    for damaged in (text.replace('"tiny"', '"tinz"'), text.replace(digits, "0" * 64), text + " "):
        with pytest.raises(LimeEdgeError, match="manifest_sha256 does not fit"):
            decode_manifest(damaged.encode(), "lime.json")


def test_schema_and_tables_are_those_of_the_types() -> None:
    import bundle_docs

    page = (DOCS / "bundle-format.md").read_text(encoding="utf-8")
    assert (DOCS / "bundle.schema.json").read_text(encoding="utf-8") == bundle_docs.render_schema(), (
        "python tools/bundle_docs.py writes it"
    )
    assert page == bundle_docs.fill_tables(page), "python tools/bundle_docs.py writes it"


def put(*path: str | int, value: Any) -> Callable[[Body], None]:
    def change(body: Body) -> None:
        place: Any = body
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def drop(*path: str | int) -> Callable[[Body], None]:
    def change(body: Body) -> None:
        place: Any = body
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("schema", value=1), "schema: expected 2, found 1\n  hint: export again"),
        (put("schema", value=3), "schema: expected 2, found 3\n  hint: upgrade"),
        (put("schema", value=True), "schema: expected 2"),
        (put("format", value="other"), "not a lime-edge bundle"),
        (drop("sites"), "missing required field `sites`"),
        (drop("backbone", "vocab"), "`vocab`"),
        (put("files", value=3), "got `int` - at `\\$.files`"),
        (put("more", value=3), "unknown field `more`"),
        (put("backbone", "layers", value=10**9), "<= 4096"),
        (put("targets", 0, "threads", value=10**6), "<= 1024"),
        (put("targets", 0, "threads", value=1.5), "got `float`"),
        (put("targets", 0, "virtual_tokens", value=10**9), "<= 65536"),
        (put("targets", 0, "target", value="tpu"), "tpu"),
        (put("decoder", "eos", value=[7]), "eos: expected ids below 7, found 7"),
        (put("decoder", "kv_heads", value=3), "multiple of kv_heads"),
        (
            put("decoder", value={"heads": 64, "kv_heads": 64, "head_dim": 65536, "eos": []}),
            "bytes of a token in the cache: expected at most 16777216",
        ),
        (put("backbone", "vocab", value=0), "vocab: expected at least 1"),
        (put("targets", 0, "virtual_tokens", value=64), "virtual_tokens: expected fewer than 64"),
        (put("decoder", value=None), "decoder: missing"),
        (put("kind", value="encoder"), "encoder: missing"),
        (put("sites", 1, "offset", value=4), "offset: expected 3, found 4"),
        (put("sites", 1, "name", value="model.a"), "there twice"),
        (put("sites", 1, "width", value=1 << 30), "<= 16777216"),
        (put("experts", 0, "name", value="../x"), "regex"),
        (put("experts", 0, "name", value="Two"), "there twice"),
        (put("experts", 0, "name", value="None"), "reserved"),
        (put("experts", 0, "name", value="con"), "no file name on Windows"),
        (put("experts", 0, "file", value="../victim"), "regex"),
        (put("experts", 0, "file", value="onnx/model.onnx"), "expected below experts/"),
        (put("experts", 0, "file", value="experts/gone.safetensors"), "expert 'one' has no file entry"),
        (put("experts", 0, "file", value="experts/two.safetensors"), "share a file"),
        (put("files", "/etc/passwd", value={"size": 1, "sha256": HASH}), "regex"),
        (put("files", "a/../../b", value={"size": 1, "sha256": HASH}), "regex"),
        (put("files", "a\\b", value={"size": 1, "sha256": HASH}), "regex"),
        (put("files", "lpt1.txt", value={"size": 1, "sha256": HASH}), "no file name on Windows"),
        (put("files", "LIME.json", value={"size": 1, "sha256": HASH}), "the manifest itself"),
        (put("files", "ONNX/model.onnx", value={"size": 1, "sha256": HASH}), "one on some file systems"),
        (put("files", "onnx/model.onnx/x", value={"size": 1, "sha256": HASH}), "needs a folder there"),
        (put("files", "onnx/model.onnx", "size", value=-1), ">= 0"),
        (put("files", "onnx/model.onnx", "sha256", value="G" * 64), "regex"),
        (drop("files", "reference.safetensors"), "reference.safetensors is missing"),
        (put("targets", 0, "file", value="coreml/model.onnx"), "expected below onnx/"),
        (put("targets", 0, "file", value="onnx/other.onnx"), "onnx/other.onnx has no file entry"),
        (put("targets", 0, "layers", value=2), "layers: expected 1, found 2"),
        (put("targets", 0, "expert_input", value=False), "expert_input: expected True, found False"),
        (put("targets", value=[]), "length >= 1"),
        (put("default", value="three"), "default: expected an expert"),
        (put("default", value="routed"), "no target has a routed graph"),
        (put("adapter", "single", value="one"), "experts of a bundle with a single one"),
        (put("prompts", value={}), "roles, or the reason"),
        (put("activation", value={"kind": "generation_prompt", "tokens": 0, "text": "x"}), ">= 1"),
        (put("activation", value={"kind": "sometimes"}), "sometimes"),
        (put("backbone", "name", value="a\x1b[31mb"), "regex"),
        (put("backbone", "name", value="a\u202eb"), "regex"),
        (put("backbone", "name", value="a\n"), "regex"),
    ],
)
def test_bad_manifest_is_refused(change: Callable[[Body], None], message: str) -> None:
    body = body_of(make_manifest())
    change(body)
    with pytest.raises(LimeEdgeError, match=message):
        decode_manifest(seal(body), "x.lime/lime.json")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b'{"format":',
        b"\xff\xfe{}",
        b"[]",
        b"null",
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b'{"format": "lime-edge-bundle", "schema": ' + b"9" * 10**5 + b"}",
        b'{"format": "lime-edge-bundle", "schema": 1e999}',
        b" " * (LARGEST + 1),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(LimeEdgeError):
        decode_manifest(data, "x.lime/lime.json")


def test_nesting_in_free_fields_is_refused() -> None:
    data = encode_manifest(make_manifest())
    deep = data.replace(b'"report": {}', b'"report": {"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}")
    assert deep != data
    with pytest.raises(LimeEdgeError, match="recursion"):
        decode_manifest(deep, "x.lime/lime.json")


def test_what_cannot_be_switched_off_acts_always_and_opens_with_an_expert() -> None:
    adapter = msgspec.structs.replace(make_manifest().adapter, variant="dora")
    for changes in ({"default": "none"}, {"activation": FromGenerationPrompt(tokens=3)}):
        with pytest.raises(LimeEdgeError, match="cannot be switched off"):
            encode_manifest(make_manifest(adapter=adapter, **changes))
    prompts = Prompts(roles={"user": Speaker(prefix="<u>", suffix="\n")}, opening="<a>")
    for text, fits in (("<a>", True), ("<b>", False), (None, True)):
        made = make_manifest(prompts=prompts, activation=FromGenerationPrompt(tokens=1, text=text))
        if fits:
            assert encode_manifest(made)
        else:
            with pytest.raises(LimeEdgeError, match="opening of the assistant's turn"):
                encode_manifest(made)
    assert isinstance(make_manifest().activation, Always)


@pytest.mark.parametrize(
    "name", ["", "a b", "a/b", "none", "Routed", ".hidden", "x" * 65, 5, "a\n", "nul", "Com1.x", "a."]
)
def test_bad_names(name: object) -> None:
    assert check_name(name)


@pytest.mark.parametrize(
    "path", ["", "/a", "a//b", "a/", "..", "a/../b", ".a", "a/.b", "c:/a", "a\\b", "a/aux", "a\x00", "é"]
)
def test_bad_paths(path: str) -> None:
    assert check_path(path)


def test_good_names_and_paths() -> None:
    assert not any(map(check_name, ("plural", "long_date", "v1.2-b", "X", "console", "com10")))
    assert not any(map(check_path, ("lime.json", "coreml/model.mlpackage/Data/com.apple.CoreML/weights/weight.bin")))
    assert find_clashes(["a/b", "a/c", "b"]) == []


def test_many_experts_are_read() -> None:
    names = [f"skill_{index}" for index in range(2000)]
    experts = tuple(ExpertEntry(name=name, file=f"experts/{name}.safetensors") for name in names)
    files = make_manifest().files | {entry.file: FileEntry(size=1, sha256=HASH) for entry in experts}
    manifest = make_manifest(expert_list=experts, files=files, default=names[7])
    assert list(decode_manifest(encode_manifest(manifest), "x").experts) == names


def test_adapter_id_is_what_the_page_says() -> None:
    """Put together byte by byte, without numpy's help."""
    sites = SiteTable.from_widths([("é", 2), ("b", 1)])
    tensors: dict[str, np.ndarray] = {
        "é.A": np.array([[1, -2]], np.float16),
        "é.B": np.array([[0.5], [3]], np.float32),
        "é.gamma": np.array([0.25], np.float64),
        "é.LiME_shared": np.array([1, 1], np.float32),
        "é.LiMEs": np.ones((1, 2), np.float32),
    }
    u64 = lambda *numbers: b"".join(n.to_bytes(8, "little") for n in numbers)  # noqa: E731
    f32 = {1: "0000803f", -2: "000000c0", 0.5: "0000003f", 3: "00004040", 0.25: "0000803e"}
    values = lambda *numbers: b"".join(bytes.fromhex(f32[n]) for n in numbers)  # noqa: E731
    shared = u64(11) + b"LiME_shared" + u64(1, 2) + values(1, 1) + u64(5) + b"gamma" + u64(1, 1) + values(0.25)
    text = b"lime-edge-adapter\n2\n" + u64(4) + b"lora" + u64(1) + bytes.fromhex("0000000000003040") + u64(2)
    text += u64(2) + "é".encode() + u64(2, 4)
    text += u64(1) + b"A" + u64(2, 1, 2) + values(1, -2) + u64(1) + b"B" + u64(2, 2, 1) + values(0.5, 3) + shared
    text += u64(1) + b"b" + u64(1, 0)
    assert hash_adapter("lora", 1, 16.0, sites, tensors) == hashlib.sha256(text).hexdigest()
    own = b"lime-edge-shared\n2\n" + u64(2, 2) + "é".encode() + u64(2, 2) + shared + u64(1) + b"b" + u64(1, 0)
    assert hash_shared(sites, tensors) == hashlib.sha256(own).hexdigest()
    assert hash_shared(sites, {"é.A": tensors["é.A"]}) is None


@pytest.mark.parametrize("change", ["variant", "rank", "alpha", "site", "value", "part", "sign"])
def test_adapter_id_tells_every_change(change: str) -> None:
    sites = SiteTable.from_widths([("a", 2)])
    tensors = {"a.A": np.ones((1, 2), np.float32), "a.B": np.zeros((2, 1), np.float32)}
    before = hash_adapter("lora", 1, 16.0, sites, tensors)
    assert before == hash_adapter("lora", 1, 16.0, sites, tensors | {"a.LiMEs": np.ones((3, 2), np.float32)})
    other = {
        "variant": lambda: hash_adapter("lora_fa", 1, 16.0, sites, tensors),
        "rank": lambda: hash_adapter("lora", 2, 16.0, sites, tensors),
        "alpha": lambda: hash_adapter("lora", 1, 8.0, sites, tensors),
        "site": lambda: hash_adapter("lora", 1, 16.0, SiteTable.from_widths([("a", 2), ("b", 1)]), tensors),
        "value": lambda: hash_adapter("lora", 1, 16.0, sites, tensors | {"a.A": np.array([[1, 1.001]], np.float32)}),
        "part": lambda: hash_adapter("lora", 1, 16.0, sites, tensors | {"a.m": np.ones(2, np.float32)}),
        "sign": lambda: hash_adapter("lora", 1, 16.0, sites, tensors | {"a.B": -tensors["a.B"]}),
    }[change]()
    assert before != other
