"""Thin adapters, one file for each foreign system."""
