"""The controller of the activation search: a recurrent network that writes candidates and learns by PPO."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recipes.studies.grammar import BINARY, UNARY, Candidate, Unit


class Controller(nn.Module):
    """Writes a chain of core units token by token, each conditioned on the ones before.

    Trained with PPO's clipped objective (Schulman et al. 2017) against an exponential moving average of the rewards.

    Args:
        units: length of the chain.
        seed: of the weights and the draws.
    """

    def __init__(
        self, units: int, seed: int = 0, *, size: int = 48, rate: float = 5e-3, clip: float = 0.2, entropy: float = 0.01
    ) -> None:
        super().__init__()
        if units < 1:
            raise ValueError(f"a chain has at least 1 unit, not {units}")
        # Where the second input comes from is a choice only from the second unit on.
        kinds = [("source", j + 1) if k == "source" else (k, n) for j in range(units) for k, n in _CHOICES]
        self.choices = [n for _, n in kinds]
        self.units, self.clip, self.entropy = units, clip, entropy
        self.baseline: float | None = None
        self._draws = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.cell = nn.LSTMCell(size, size)
            self.start = nn.Parameter(torch.zeros(size))
            self.embed = nn.ModuleList(nn.Embedding(n, size) for n in self.choices)
            self.heads = nn.ModuleList(nn.Linear(size, n) for n in self.choices)
        self._optimizer = torch.optim.Adam(self.parameters(), rate)

    def sample(self, count: int) -> Tensor:
        """`count` rows of tokens, int64 [count, steps]."""
        with torch.no_grad():
            tokens, _, _ = self._roll(count, None)
        return tokens

    def update(self, tokens: Tensor, rewards: Sequence[float], epochs: int = 4) -> None:
        """Learns from the rewards of `tokens` [N, steps], which `sample` drew."""
        reward = torch.tensor(rewards, dtype=torch.float32)
        if self.baseline is None:
            self.baseline = float(reward.mean())
        advantage = (reward - self.baseline) / (reward.std() + 1e-6)
        self.baseline = 0.8 * self.baseline + 0.2 * float(reward.mean())
        with torch.no_grad():
            _, before, _ = self._roll(len(tokens), tokens)
        for _ in range(epochs):
            _, now, entropy = self._roll(len(tokens), tokens)
            ratio = (now - before).exp()
            bounded = ratio.clamp(1 - self.clip, 1 + self.clip)
            gain = torch.minimum(ratio * advantage[:, None], bounded * advantage[:, None]).sum(1).mean()
            self._optimizer.zero_grad()
            (-(gain + self.entropy * entropy)).backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            self._optimizer.step()

    def _roll(self, count: int, tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, their log probabilities [count, steps], and the mean entropy, drawing tokens where none are given."""
        step_input = self.start.expand(count, -1)
        state: tuple[Tensor, Tensor] | None = None
        drawn, logs, entropies = [], [], []
        for i, (head, embed) in enumerate(zip(self.heads, self.embed, strict=True)):
            state = self.cell(step_input, state)
            log = head(state[0]).log_softmax(1)
            token = torch.multinomial(log.exp(), 1, generator=self._draws)[:, 0] if tokens is None else tokens[:, i]
            drawn.append(token)
            logs.append(log.gather(1, token[:, None])[:, 0])
            entropies.append(-(log.exp() * log).sum(1).mean())
            step_input = embed(token)
        return torch.stack(drawn, 1), torch.stack(logs, 1), torch.stack(entropies).mean()


_CHOICES = (("source", 0), ("first", len(UNARY)), ("second", len(UNARY)), ("binary", len(BINARY)))


def to_candidate(tokens: Sequence[int]) -> Candidate:
    """The candidate that a row of tokens (source, first, second, binary for each unit) stands for."""
    rows = zip(*[iter(tokens)] * 4, strict=True)
    return tuple(Unit(first, second, binary, source) for source, first, second, binary in rows)
