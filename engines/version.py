"""The version of export-engine, part of every artifact's request."""

__version__ = "0.1.0"
