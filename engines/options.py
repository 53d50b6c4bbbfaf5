"""How an engine is built, beyond its target: choices that some backends have and others lack."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from engines.artifacts import Json
from engines.errors import UserError

AUTO = "auto"  # a budget that the library finds when an engine is opened
UNSETTLED = ("timing_cache",)  # says how long a build takes, not what comes of it


@dataclass(frozen=True)
class Options:
    """What may be asked of a build; what is left out is each backend's own.

    `decode`: how codebooks are decoded, one of the backend's `DECODES`. `refit`: weights can be exchanged in the built
    engine. `weight_streaming`: weights can lie in host memory; how many bytes of them stay on the GPU, or `auto`.
    `timing_cache`: the file in which TensorRT keeps what it timed.
    """

    decode: str | None = None
    refit: bool = False
    weight_streaming: int | str | None = None
    timing_cache: str | None = None

    def settings(self) -> Json:
        """Returns what decides the engine, and so stands in its request and its digest."""
        return {name: value for name, value in self.to_json().items() if name not in UNSETTLED}

    def to_json(self) -> Json:
        return asdict(self)

    def asked(self) -> dict[str, str]:
        """Returns what was asked for beyond the default, by name, as it is written on the command line."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: flag(name) if value is True else f"{flag(name)} {value}" for name, value in given.items()}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def budget(text: str | None) -> int | str | None:
    """Returns a budget for streamed weights: bytes, or `auto`; anything else is a UserError."""
    if text is None or text == AUTO:
        return text
    if not text.isascii() or not text.isdigit():
        raise UserError(f"--weight-streaming {text}: neither {AUTO} nor bytes", fix="give a whole number, 0 or more")
    return int(text)
