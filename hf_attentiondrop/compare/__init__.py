"""Comparison of methods over seeds: the runs of a study, their statistics and the report.

`results.py` stores the runs, `comparison.py` compares them with the tests of `statistics.py`, `sentences.py` puts the
outcome into words, and `report.py` writes it with the figures of `plots.py`.
"""
