"""Activate-while-Pruning: measure the neurons that a pruned network leaves dead, and wake them while pruning."""
