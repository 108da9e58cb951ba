"""Figures: style.py colours, fonts, files; run.py those of a run, losses.py, steps.py, accuracies.py; relearning.py, compare.py."""
