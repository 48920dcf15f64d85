"""The kind of model is found once; a bundle of another kind, or of none that is known, is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import Session
from lime_edge.session.encoder import EncoderSession
from lime_edge.session.generate import GenerationOptions
from lime_edge.session.kinds import DECODER, ENCODER, find_kind
from lime_edge.session.open import load_engine, open_any

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def encoder(encoder_bundle: Make) -> Path:
    return encoder_bundle("bert-lora-cls")


def test_open_gives_the_session_of_the_kind(tiny_bundle: Make, encoder: Path) -> None:
    decoder = lime_edge.open(tiny_bundle(), threads=1)
    assert isinstance(decoder, Session) and list(decoder.generate_ids([5, 6], GenerationOptions(2, ignore_eos=True)))
    found = lime_edge.open(encoder, threads=1)
    assert isinstance(found, EncoderSession) and found.run(input_ids=[[5, 6, 7]])
    assert find_kind(decoder.bundle) is DECODER and find_kind(found.bundle) is ENCODER


def test_the_other_kind_is_refused_and_the_hint_says_how(tiny_bundle: Make, encoder: Path) -> None:
    with pytest.raises(LimeEdgeError, match="holds an encoder: it answers no prompts") as error:
        lime_edge.open_decoder(encoder)
    assert error.value.hint == "call lime_edge.open(BUNDLE).run(**inputs)"
    with pytest.raises(LimeEdgeError, match="holds a language model: it takes no named inputs") as error:
        lime_edge.open_encoder(tiny_bundle())
    assert error.value.hint == "call lime_edge.open(BUNDLE).generate(prompt)"


def test_a_kind_of_tomorrow_is_refused(tiny_bundle: Make) -> None:
    bundle = Bundle.open(tiny_bundle())
    strange = replace(bundle, manifest=structs.replace(bundle.manifest, kind="diffusion"))
    for use in (open_any, lambda one: load_engine(one, None)):
        with pytest.raises(LimeEdgeError, match="kind of model: expected decoder or encoder or .*, found 'diffusion'"):
            use(strange)


def test_nothing_on_the_device_side_tests_the_kind_by_its_name() -> None:
    """One seam: only session/kinds.py reads the manifest's word."""
    root = Path(lime_edge.__file__).parent
    for folder in ("bench", "bundle", "checks", "cli", "session", "targets"):
        for file in (root / folder).rglob("*.py"):
            if file.name != "kinds.py":
                assert '.get("kind")' not in file.read_text() and '["kind"] ==' not in file.read_text(), file


def test_sessions_and_bundles_import_no_runtime() -> None:
    root = Path(lime_edge.__file__).parent
    for folder in ("bundle", "checks", "session"):
        for file in (root / folder).rglob("*.py"):
            lines = [
                line for line in file.read_text().splitlines() if "import" in line and "lime_edge.runtimes" in line
            ]
            assert not lines, f"{file}: {lines}"
