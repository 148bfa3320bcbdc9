"""The rule language: load, match, test."""
