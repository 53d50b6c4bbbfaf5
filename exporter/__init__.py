"""The tool chain: calibrate, quantize, lower, validate, and the command line."""

import os

# Read when torch is first imported. OpenMP's threads otherwise spin at every barrier, and where two processes share two
# cores each then waits for threads that are not running: 8 sampling steps of 50 digits took 8 to 13 s against 1 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
