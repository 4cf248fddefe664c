"""Activations proposed against dead neurons, under one registry."""
