"""Captions as token ids, without transformers: the library `tokenizers` reads the file that a bundle holds."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import UserError


class Words:
    """A tokenizer's file, which also says how it pads and where it cuts."""

    def __init__(self, file: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError(
                f"captions are read by the library tokenizers, which cannot be imported ({error})",
                fix="pip install tokenizers, or give token ids",
            ) from error
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001  the library raises no narrower one
            raise UserError(f"{file}: no tokenizer ({error})", fix="get the bundle, or make it, again") from error

    def ids(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Returns token ids [n, tokens], started, ended, padded and cut as the text encoder was trained.

        A word that a vocabulary of whole words lacks is an error; others are spelled in pieces.
        """
        try:
            read = self._tokenizer.encode_batch(list(captions))
        except (TypeError, UnicodeEncodeError) as error:  # no string, or half a surrogate pair
            raise UserError(f"captions: {error}", fix="give a list of texts that UTF-8 can spell") from error
        for caption, found in zip(captions, read, strict=True):
            self._check_words(caption, found.ids)
        return np.array([found.ids for found in read], dtype=np.int64)

    def _check_words(self, caption: str, ids: Sequence[int]) -> None:
        model = self._tokenizer.model
        missing = self._tokenizer.token_to_id(model.unk_token) if type(model).__name__ == "WordLevel" else None
        if missing is None or missing not in ids:
            return
        word = next((one for one in caption.split() if self._lacks(one, missing)), caption)
        raise UserError(
            f"caption {caption!r}: its text encoder knows no {word!r}", fix=close_words(word, self._tokenizer.get_vocab())
        )

    def _lacks(self, word: str, missing: int) -> bool:
        found: Any = self._tokenizer.encode(word)
        return missing in found.ids


def close_words(word: str, vocabulary: Sequence[str] | dict[str, int]) -> str:
    """Returns what to do about a word that a vocabulary lacks: the words that are spelled like it."""
    close = difflib.get_close_matches(word, [known for known in vocabulary if known.isalpha()], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}use words that the model was trained on"
