"""Fuzzing, in small: what was found before, and a few hundred random inputs, are read or refused with a message."""

from __future__ import annotations

import json
import random

import fuzz_loaders
import fuzz_targets
import pytest
from fuzz_targets import ODD, TARGETS, Place, edited, once, seeds

SLOW = {"checkpoint": 10, "golden": 100, "info": 100, "zip": 100}  # inputs, of targets that build or write much
pytestmark = pytest.mark.filterwarnings("ignore")  # numbers that overflow are the input's


@pytest.fixture
def place():
    with Place() as made:
        yield made


def mutated(content, generator):
    """Returns bytes with one to four changes: a byte, a bit, a cut, a repetition."""
    found = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 4])):
        at, how = generator.randrange(len(found) + 1), generator.randrange(4)
        if how < 2 and at < len(found):
            found[at] = generator.randrange(256) if how else found[at] ^ 1 << generator.randrange(8)
        elif how == 2:
            del found[at : at + generator.choice([1, 2, 8, 64])]
        else:
            found[at:at] = generator.randbytes(3)
    return bytes(found)


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_found_and_random_changes_are_read_or_refused(target, place):
    generator = random.Random(0)
    whole = [*seeds(target).values(), *(f.read_bytes() for f in sorted((fuzz_loaders.CORPUS / target).glob("*")))]
    for content in whole:
        once(target, place, content)
    tried = [mutated(generator.choice(whole), generator) for _ in range(SLOW.get(target, 300))]
    for content in tried:
        once(target, place, content)
    assert len(set(tried)) > len(tried) // 2


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_is_small(target):
    files = list((fuzz_loaders.CORPUS / target).glob("*"))
    assert all(file.stat().st_size <= 4096 for file in files)


def test_a_fault_is_no_refusal(place, monkeypatch):
    monkeypatch.setattr("fuzz_targets.open_bundle", lambda path: [][0])
    with pytest.raises(IndexError):
        once("zip", place, b"anything")


def test_a_whole_bundle_is_used_to_the_end(place, monkeypatch):
    monkeypatch.setattr(fuzz_targets, "_refused_or", lambda read: read())
    for target in ("info", "golden", "checkpoint"):
        once(target, place, b"")
    assert (place.path / "model/config.json").is_file()


def test_each_three_bytes_change_one_place():
    value = {"a": 1, "b": [2, {"c": 3}]}
    assert edited(value, b"") == value
    assert edited(value, bytes([0, 0, 0])) == {"a": None, "b": [2, {"c": 3}]}
    assert edited(value, bytes([0, 4, len(ODD)])) == {"a": 1, "b": [2, {}]}
    assert edited(value, bytes([1, 0, 2 * len(ODD) + 1])) == {"a": 1, "True": [2, {"c": 3}]}
    assert edited({}, bytes([0, 0, len(ODD)])) == {}


def test_results_are_a_table(tmp_path):
    found = {"target": "zip", "runs": 1_000_000, "seconds": 4321.4, "rss_growth_bytes": 2_500_000}
    (tmp_path / "zip.json").write_text(json.dumps(found))
    faults = len(list((fuzz_loaders.CORPUS / "zip").glob("fault-*")))
    assert f"| `zip` | 1,000,000 | 4,321 | {faults} | 2 |" in fuzz_loaders.table(tmp_path)
