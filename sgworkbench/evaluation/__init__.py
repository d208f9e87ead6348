"""Judging what models do: responses, judges, behaviour, studies."""
