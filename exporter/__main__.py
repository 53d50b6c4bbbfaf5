"""`python -m exporter` is `export-engine`."""

from exporter.cli import main

main()
