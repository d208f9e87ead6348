"""Calibration: choosing layers, dose, operator and gate for an objective under budgets, and confirming the choice."""
