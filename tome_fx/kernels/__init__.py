"""Kernels of the `tome` operators, one file per kind of device."""
