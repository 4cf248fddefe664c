"""Measured answers: does AP help, where, and why? Plans first, then runs, then pages made from the runs."""

from recipes.answers.plans import PLANS, Plan, get, names

__all__ = ["PLANS", "Plan", "get", "names"]
