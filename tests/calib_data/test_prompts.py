"""Prompt lists: one entry to a line, and every fault of a file named with its line."""

from __future__ import annotations

import pytest

from calib_data import prompts
from calib_data.prompts import GENERAL, MAX_BYTES, MAX_LINE, read_list
from engines.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(content: bytes):
        path = tmp_path / "mine.txt"
        path.write_bytes(content)
        return path

    return write


def refusal(path) -> UserError:
    with pytest.raises(UserError) as caught:
        read_list(path)
    assert str(path) in caught.value.what
    assert caught.value.fix
    return caught.value


def test_entries_are_the_lines_without_comments_and_empty_ones(write):
    assert read_list(write(b"# mine\n a red fox \n\n\t\n#no\nse\xc3\xb1or # 5\n")) == ["a red fox", "señor # 5"]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_any_line_ending_will_do_and_the_last_may_lack_it(write, ending):
    assert read_list(write(ending.join([b"one", b"two"]))) == ["one", "two"]


def test_a_byte_order_mark_is_no_part_of_the_first_entry(write):
    assert read_list(write(b"\xef\xbb\xbfone\ntwo\n")) == ["one", "two"]
    assert read_list(write(b"\xef\xbb\xbf# a comment\ntwo\n")) == ["two"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# only\n  # comments\n", b"\xef\xbb\xbf\n"])
def test_a_list_without_entries_is_refused(write, content):
    assert "holds no prompt" in refusal(write(content)).what


def test_text_that_is_not_utf8_is_refused_with_its_line_and_byte(write):
    error = refusal(write(b"# mine\none\nse\xf1or\n"))
    assert "line 3" in error.what
    assert "0xf1" in error.what
    assert "UTF-8" in error.fix


def test_text_of_two_bytes_to_a_character_is_refused_at_its_first_line(write):
    assert "line 1" in refusal(write("one\n".encode("utf-16"))).what


def test_a_file_too_large_for_text_is_refused_unread(write, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_BYTES", 10 << 20)
    path = write(b"")
    with path.open("r+b") as file:
        file.truncate((10 << 20) + 1)  # of zeros, and without taking the disk's room
    assert "larger than 10 MiB" in refusal(path).what
    assert MAX_BYTES == 16 << 20


@pytest.mark.parametrize("line", [b"x" * (MAX_LINE + 1), b"a\0b"], ids=["too long", "a zero byte"])
def test_what_is_no_line_of_text_is_refused_with_its_number(write, line):
    assert "line 2" in refusal(write(b"one\n" + line + b"\n")).what


@pytest.mark.parametrize("kind", ["missing", "a folder"])
def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path, kind):
    path = tmp_path if kind == "a folder" else tmp_path / "gone.txt"
    assert "cannot be read" in refusal(path).what


def test_the_shipped_captions_are_sixty_four_different_ones():
    found = read_list(GENERAL)
    assert len(found) == len(set(found)) == 64
    assert all(len(caption.split()) >= 3 for caption in found)
