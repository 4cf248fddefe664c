"""Experiments: data, models, a fast training engine, paired comparisons, reports."""
