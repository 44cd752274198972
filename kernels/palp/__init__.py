"""Triton kernels and their launchers, one file per operator; the package imports them as palp_fast.kernels."""
