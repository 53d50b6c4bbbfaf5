"""Calibration data: the shipped demo models, and the capture and storage of calibration sets."""
