"""The tool chain: calibrate, quantize, lower, validate, and the command line."""
