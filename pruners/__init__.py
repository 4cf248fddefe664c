"""Pruning criteria: one a file, a few lines each. Ranking, counting and ties live in `ap.ranking`."""
