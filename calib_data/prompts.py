"""Lists of what to draw: captions or class labels, one to a line, from a file or as shipped."""

from __future__ import annotations

from pathlib import Path

from engines.errors import UserError

FOLDER = Path(__file__).parent / "prompts"
GENERAL = FOLDER / "general.txt"
MAX_BYTES = 16 << 20
MAX_LINE = 10_000  # characters: far beyond what any text encoder reads


def read_list(path: Path) -> list[str]:
    """Returns the lines of a UTF-8 text file, without empty ones and those that start with #."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(
                f"{path}: larger than {MAX_BYTES >> 20} MiB", fix="give a text file with one prompt to a line"
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        number = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {number}: byte {error.object[error.start]:#04x} is not UTF-8", fix="save the file as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", fix="check the path") from error
    lines = [line.strip() for line in text.removeprefix("\ufeff").splitlines()]
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE or "\0" in line:
            raise UserError(
                f"{path}, line {number}: is not a line of text", fix="give a text file with one prompt to a line"
            )
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UserError(f"{path}: holds no prompt", fix="write one to a line; lines that start with # are comments")
    return found
