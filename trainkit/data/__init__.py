"""Labelled texts in; examples, splits, statistics and a vocabulary out. No torch here."""
