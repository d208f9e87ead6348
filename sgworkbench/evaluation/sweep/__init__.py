"""Sweeps: grids over layers, coefficients, operators and conditions, screened by forward passes, resumable anywhere."""
