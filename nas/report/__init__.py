"""Figures and tables of searches, drawn from their CSVs alone. In each module, one function computes a data frame and
another draws it."""
