"""The text half of a diffusers pipeline: tokenizers and encoders, opened without the rest and without foreign code."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engines.artifacts import digest_file, inside, read_json
from engines.errors import UserError, unknown
from engines.text import close_words
from exporter import progress
from exporter.checkpoint import COPY, INDEX, Checkpoint
from exporter.models import Family, Tensors

CLASSES = (
    "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel",
    "CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast",
)  # fmt: skip
# Encoders up to this size on disk are computed in fp32, larger ones (T5-XXL) as they are stored: memory is theirs.
FP32_BYTES = 2 << 30
ZEROS = "force_zeros_for_empty_prompt"  # in a pipeline's index


def components(root: Path) -> dict[str, str]:
    """Returns the text encoders and tokenizers that a pipeline's index lists, name → class; none in a lone denoiser."""
    if not (root / INDEX).is_file():
        if (root / "text_encoder").is_dir():
            raise UserError(
                f"{root}: has a text_encoder/, but no {INDEX}, which says what it is",
                fix="copy the pipeline again, with that file",
            )
        return {}
    found = {}
    for name, entry in read_json(root / INDEX, fix=COPY).items():
        if not name.startswith(("text_encoder", "tokenizer")) or not isinstance(entry, list) or entry[:1] == [None]:
            continue
        library, class_name = (str(part) for part in (*entry, "", "")[:2])
        if library != "transformers" or class_name not in CLASSES:
            raise unknown("class", class_name, CLASSES, f"{root / INDEX}, {name}")
        if not inside(root, name, links=True).is_dir():
            raise UserError(
                f"{root}: its {INDEX} lists {name!r} ({class_name}), but there is no folder {name}/",
                fix="copy the pipeline again, with all its folders",
            )
        found[name] = class_name
    return found


def digest(root: Path) -> dict[str, str]:
    """Returns the digest of every file of the text half, by path."""
    files = (file for name in components(root) for file in sorted((root / name).iterdir()) if file.is_file())
    found = {file.relative_to(root).as_posix(): digest_file(file) for file in files}
    return found if _zeros_for_nothing(root) else found | {ZEROS: "false"}


def open_pipeline(checkpoint: Checkpoint) -> Any:
    """Builds the family's diffusers pipeline with its text half alone; None where the folder holds no encoder."""
    import diffusers
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what it warns of is not the user's to mend
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    diffusers.utils.logging.set_verbosity_error()
    found = components(checkpoint.root)
    encoders = [name for name in found if name.startswith("text_encoder")]
    weightless = [name for name in encoders if not any((checkpoint.root / name).glob("*.safetensors"))]
    if not encoders or (weightless and checkpoint.weights_seed is not None):
        return None
    if weightless:
        raise UserError(
            f"{checkpoint.root / weightless[0]}: holds no safetensors weights",
            fix="save the pipeline with save_pretrained(…, safe_serialization=True); pickles are never read",
        )
    parts = {name: _open(checkpoint.root / name, class_name) for name, class_name in found.items()}
    cls = getattr(diffusers, checkpoint.family.text_pipeline() or "")
    others = dict.fromkeys(cls.__init__.__annotations__.keys() - {"return", "requires_safety_checker"})
    others = {name: None for name in others if name not in (ZEROS, "add_watermarker")}
    extra = {"requires_safety_checker": False} if "requires_safety_checker" in cls.__init__.__annotations__ else {}
    if ZEROS in cls.__init__.__annotations__ and not _zeros_for_nothing(checkpoint.root):
        extra[ZEROS] = False
    return cls(**{**others, **parts, **extra})


def _zeros_for_nothing(root: Path) -> bool:
    """Whether guidance goes away from zeros in place of an empty caption, as SDXL's does unless its index says no."""
    index = read_json(root / INDEX, fix=COPY) if (root / INDEX).is_file() else {}
    return index.get(ZEROS) is not False


def _open(folder: Path, class_name: str) -> Any:
    import transformers
    from safetensors import SafetensorError

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if encoder := "Tokenizer" not in class_name:
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        options |= {"use_safetensors": True, "dtype": torch.float32 if stored <= FP32_BYTES else "auto"}
        options["output_loading_info"] = True
    try:
        opened = getattr(transformers, class_name).from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: no {class_name} can be opened ({error})", fix="copy the pipeline again") from error
    if not encoder:
        return opened
    model, info = opened
    if missing := sorted(info["missing_keys"]):  # transformers would draw them, and go on
        raise UserError(f"{folder}: its weights lack {missing[0]!r}", fix="copy the pipeline again")
    return model.eval()


def check_words(pipeline: Any, entries: Sequence[str], where: str) -> None:
    """Raises a UserError that names the first word a tokenizer does not know."""
    tokenizers = [part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part]
    for tokenizer in tokenizers:
        missing = tokenizer.unk_token_id
        if missing is None or missing in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            continue  # CLIP's tokenizer falls back on bytes: it knows every word
        whole_words = type(getattr(tokenizer, "backend_tokenizer", tokenizer).model).__name__ == "WordLevel"
        for entry in entries:
            if missing in tokenizer(entry).input_ids:
                word = next((w for w in entry.split() if missing in tokenizer(w).input_ids), entry)
                if not whole_words:  # one character is lost of a large vocabulary's reach, not the caption
                    progress.note(f"note: caption {entry!r}: its text encoder does not know all of {word!r}")
                    continue
                raise UserError(
                    f"{where}: caption {entry!r}: its text encoder knows no {word!r}",
                    fix=close_words(word, tokenizer.get_vocab()),
                )


def drawn(family: Family, entries: Sequence[str]) -> tuple[Tensors, Tensors]:
    """Returns stand-ins for encoded captions, for models without text encoders: normal noise keyed by the caption."""
    axes = family.axes()
    fixed = {"timestep", *family.constants(1)}
    specs = [spec for spec in family.inputs()[1:] if spec.name not in fixed]

    def rows(texts: Sequence[str]) -> Tensors:
        found: dict[str, list[torch.Tensor]] = {spec.name: [] for spec in specs}
        for entry in texts:
            key = hashlib.sha256(entry.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            for spec in specs:
                shape = [axes[d].opt if isinstance(d, str) else d for d in spec.shape[1:]]
                whole = spec.name.endswith("mask")  # every token counts
                found[spec.name].append(torch.ones(shape) if whole else torch.randn(shape, generator=generator))
        return {name: torch.stack(parts) for name, parts in found.items()}

    return rows(entries), rows([""] * len(entries))
