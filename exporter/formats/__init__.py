"""Number formats: one module each, holding a `Format`; the file name is the name used in recipes.

Nothing here may use the builtin `int`: importing the module `int` of this package hides it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Protocol, cast

import torch

from engines.errors import UserError, unknown
from exporter import catalog


class Format(Protocol):
    """A finite set of values, addressed by codes. Frozen dataclasses; their fields are the recipe's keys.

    Where `learned`, values are each tensor's own, and what follows `kind` is missing.
    """

    @property
    def bits(self) -> int:
        """Bits per code, as stored."""

    @property
    def carrier(self) -> torch.dtype:
        """The torch type that holds a code in memory."""

    @property
    def onnx_type(self) -> str:
        """The ONNX type that holds the codes: `FLOAT8E4M3FN`, `INT8`, `INT4`."""

    @property
    def native(self) -> bool:
        """Whether the values are that type's own; elsewhere a graph looks its codes up in a table of `values`."""

    @property
    def learned(self) -> bool:
        """Whether each tensor has values of its own, a codebook."""

    @property
    def kind(self) -> str:
        """The type as reports and plans spell it: fp8, int8, int4, …"""

    @property
    def max_value(self) -> float:
        """The value that the end of a range is scaled to."""

    @property
    def values(self) -> torch.Tensor:
        """The value of every code, fp32 [2^bits], in the order of the codes' bits."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the codes of the nearest values, ties to the even code; beyond the range they saturate."""

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the values of codes as fp32."""

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Returns decode(encode(x)) in x's own type; NaN stays NaN."""


def names() -> list[str]:
    return catalog.modules("formats")


def load(name: str, options: Mapping[str, Any], where: str) -> Format:
    """Builds the format `name` from its options, e.g. `fp` with exponent_bits and mantissa_bits."""
    if name not in names():
        raise unknown("format", name, (*names(), "auto"), where)
    cls = importlib.import_module(f"exporter.formats.{name}").Format
    known = [f.name for f in fields(cls)]
    for key in options:
        if key not in known:
            raise unknown("key", key, known, where)
    missing = [key for key in known if key not in options]
    if missing:
        raise UserError(f"{where}: format {name!r} lacks {', '.join(missing)}", fix=f"write {missing[0]} = NUMBER")
    try:
        return cast(Format, cls(**options))
    except UserError as error:
        raise UserError(f"{where}: {error.what}", fix=error.fix) from error


def of_bits(name: str, bits: Any, where: str, deployable: bool = True) -> tuple[Format, ...]:
    """Returns every format of `bits` bits that the file `name` makes, for engines or for study; `auto` is all files."""
    if name != "auto" and name not in names():
        raise unknown("format", name, (*names(), "auto"), where)
    modules = [importlib.import_module(f"exporter.formats.{n}") for n in (names() if name == "auto" else (name,))]
    try:
        return tuple(found for module in modules for found in module.of_bits(bits, deployable))
    except UserError as error:
        raise UserError(f"{where}: {error.what}", fix=error.fix) from error
