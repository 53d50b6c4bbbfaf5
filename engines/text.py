"""Captions as token ids, without transformers: the library `tokenizers` reads the file that a bundle holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.errors import UserError, did_you_mean


class Words:
    """A tokenizer's file, which also says how it pads and where it cuts; `special` are ids that no word has."""

    def __init__(self, file: Path, special: Collection[int | None] = ()) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError(
                f"captions are read by the library tokenizers, which cannot be imported ({error})",
                fix="pip install tokenizers, or give token ids",
            ) from error
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower one
            raise UserError(f"{file}: no tokenizer ({error})", fix="get the bundle, or make it, again") from error
        model = self._tokenizer.model
        unknown = self._tokenizer.token_to_id(model.unk_token) if type(model).__name__ == "WordLevel" else None
        self._unknown: int | None = None if unknown in special else unknown  # other kinds spell words in pieces

    def ids(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Returns token ids [n, tokens], started, ended, padded and cut as the text encoder was trained.

        A word that a vocabulary of whole words lacks is an error; others are spelled in pieces.
        """
        if not all(isinstance(caption, str) for caption in captions):
            raise UserError(f"captions: {captions!r:.80} are no texts", fix="give a list of str")
        try:
            read = self._tokenizer.encode_batch(list(captions))
        except TypeError as error:  # half a surrogate pair is no text either
            raise UserError(f"captions: {error}", fix="give texts that UTF-8 can spell") from error
        for caption, found in zip(captions, read, strict=True):
            if self._unknown is not None and self._unknown in found.ids:
                raise self._unknown_word(caption, self._unknown)
        return np.array([found.ids for found in read], dtype=np.int64)

    def _unknown_word(self, caption: str, unknown: int) -> UserError:
        word = next((one for one in caption.split() if unknown in self._tokenizer.encode(one).ids), caption)
        return UserError(
            f"caption {caption!r}: its text encoder knows no {word!r}",
            fix=close_words(word, self._tokenizer.get_vocab()),
        )


def close_words(word: str, vocabulary: Iterable[str]) -> str:
    """Returns what to do about a word that a vocabulary lacks: the words that are spelled like it."""
    hint = did_you_mean(word, [known for known in vocabulary if known.isalpha()])
    return f"{hint}use words that the model was trained on"
