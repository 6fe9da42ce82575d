"""Matrices of trainings: what is run, the runs themselves, their results as tables."""
