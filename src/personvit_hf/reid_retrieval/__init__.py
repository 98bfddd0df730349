"""Folder for `evaluate.load`: the ReID metric and the ranking behind it."""
