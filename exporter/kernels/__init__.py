"""GPU kernels for what a graph would compute in several nodes: one module each, beside its torch reference."""
