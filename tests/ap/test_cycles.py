import copy

import pytest
import torch
from torch import nn

from ap import Masks, prune_iteratively
from ap.cycles import Cycles
from ap.rewind import Rewind, Snapshot


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 32)
        self.norm = nn.BatchNorm1d(32)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(32, 3)

    def forward(self, x):
        return self.fc2(self.relu(self.norm(self.fc1(x))))


def network():
    torch.manual_seed(0)
    return Net()


def magnitude(model, masks):
    return {name: masks.weight(name).detach().abs() for name in masks}


class Trainer:
    """Trains for a few steps, and keeps a record of what it was asked to do."""

    def __init__(self, steps=8):
        self.steps, self.calls = steps, []

    def __call__(self, model, masks, run):
        self.calls.append((run.cycle, run.phase, run.start_step, masks.alive))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(run.start_step, self.steps):
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(16, 10, generator=generator), torch.randint(3, (16,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            run.reached(step + 1)
        return {"weight_sum": float(sum(p.detach().double().sum() for p in model.parameters()))}


@pytest.mark.parametrize("ap", ["none", "lite", "pro", "solo", "pro:pruner", "lite:pruner", "lite:random"])
def test_equal_counts_in_every_arm(ap):
    variant, _, criterion = ap.partition(":")
    options = {"criterion": criterion} if criterion else {}
    history = prune_iteratively(network(), Trainer(), magnitude, cycles=3, ap=variant, **options)
    alive = [416]
    for _ in range(3):
        alive.append(alive[-1] - round(0.2 * alive[-1]))
    assert [row["alive"] for row in history] == alive
    assert [row["cycle"] for row in history] == [0, 1, 2, 3]
    own = [0] + [round(0.2 * a) if variant == "solo" else round(0.02 * a) for a in alive[:-1]]
    if ap in ("none", "lite:pruner"):
        own = [0] * 4
    assert [row["activated"] for row in history] == own
    per_cycle = 2 if variant == "pro" else 1
    assert [row["trainings"] for row in history] == [per_cycle * c for c in range(4)]


def test_lite_with_the_pruners_criterion_is_none():
    a = prune_iteratively(network(), Trainer(), magnitude, cycles=3, ap="none")
    b = prune_iteratively(network(), Trainer(), magnitude, cycles=3, ap="lite", criterion="pruner")
    assert a == b


def test_pro_retrains_between_the_pruner_and_ap():
    train = Trainer()
    prune_iteratively(network(), train, magnitude, cycles=2, ap="pro", amount=0.25, rate=0.05)
    alive = 416
    expected = []
    for cycle in range(2):
        expected.append((cycle, "train", 0, alive))
        expected.append((cycle, "retrain", 0, alive - (round(0.25 * alive) - round(0.05 * alive))))
        alive -= round(0.25 * alive)
    assert train.calls == [*expected, (2, "train", 0, alive)]


def test_rewinding_restores_parameters_and_buffers():
    model = network()
    initial = copy.deepcopy(model.state_dict())
    seen = []

    def train(model, masks, run):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return Trainer()(model, masks, run)

    prune_iteratively(model, train, magnitude, cycles=2)
    for state in seen:
        for name, value in state.items():
            if name in ("fc1.weight", "fc2.weight"):
                assert bool(((value == initial[name]) | (value == 0)).all())
            else:
                assert torch.equal(value, initial[name]), name
    assert not torch.equal(seen[1]["fc1.weight"], initial["fc1.weight"])


def test_rewinding_to_a_step_restarts_there():
    model = network()
    reference = network()
    Trainer(steps=3)(
        reference, Masks(reference), type("R", (), {"start_step": 0, "cycle": 0, "phase": "", "reached": id})()
    )
    starts = []

    def train(model, masks, run):
        starts.append((run.start_step, model.norm.running_mean.clone()))
        return Trainer()(model, masks, run)

    prune_iteratively(model, train, magnitude, cycles=2, rewind="3it")
    assert [s for s, _ in starts] == [0, 3, 3]
    for _, mean in starts[1:]:
        assert torch.equal(mean, reference.norm.running_mean)
    with pytest.raises(ValueError, match=r"training never called run.reached\(100\)"):
        prune_iteratively(network(), Trainer(), magnitude, cycles=2, rewind="100it")


@pytest.mark.parametrize("rewind", ["lr", "none"])
def test_without_rewinding_weights_go_on_from_where_they_are(rewind):
    ends, starts = [], []

    def train(model, masks, run):
        starts.append((run.start_step, run.rewind.kind, model.fc1.weight.detach().clone()))
        metrics = Trainer()(model, masks, run)
        ends.append(model.fc1.weight.detach().clone())
        return metrics

    prune_iteratively(network(), train, magnitude, cycles=2, rewind=rewind)
    for (step, kind, start), end in zip(starts[1:], ends, strict=False):
        assert (step, kind) == (0, rewind)
        assert bool(((start == end) | (start == 0)).all())


def test_solo_runs_out_of_negatives_and_says_so():
    model = network()
    with pytest.warns(UserWarning, match="AP found .* this arm ends here"):
        history = prune_iteratively(model, Trainer(), ap="solo", cycles=10)
    assert 3 <= len(history) <= 6  # about half of the weights are negative: 0.8^n < 0.5 from n = 4 on
    assert history[-1]["shortfall"] > 0
    assert all(row["shortfall"] == 0 for row in history[:-1])
    shares = [row["negative_share"] for row in history]
    assert shares == sorted(shares, reverse=True)


def test_overlaps_with_the_suspicious_alternatives():
    history = prune_iteratively(network(), Trainer(), magnitude, cycles=1, ap="solo", criterion="smallest-negative")
    assert history[1]["overlap_smallest_negative"] == 1.0
    history = prune_iteratively(network(), Trainer(), magnitude, cycles=1, ap="lite")
    assert 0 <= history[1]["overlap_smallest_negative"] < 1
    assert 0 <= history[1]["overlap_pruner"] < 1


@pytest.mark.parametrize("ap", ["none", "lite", "pro"])
@pytest.mark.parametrize("rewind", ["init", "3it", "lr"])
def test_a_loop_stopped_in_any_training_goes_on_to_the_same_end(ap, rewind, tmp_path):
    expected = prune_iteratively(network(), Trainer(), magnitude, cycles=2, ap=ap, rewind=rewind)

    class Stop(Exception):
        pass

    total = 5 if ap == "pro" else 3
    for stop_at in range(total):
        model = network()
        loop = Cycles(model, magnitude, cycles=2, ap=ap, rewind=rewind)
        saved = tmp_path / "state.pt"
        trained = 0

        def save(loop, saved=saved, model=model):
            torch.save({"loop": loop.state_dict(), "model": model.state_dict()}, saved)

        def train(model, masks, run, stop_at=stop_at):
            nonlocal trained
            if trained == stop_at:
                raise Stop
            trained += 1
            return Trainer()(model, masks, run)

        with pytest.raises(Stop):
            loop.run(train, on_phase=save)
        state = torch.load(saved, weights_only=True)
        fresh = Net()
        fresh.load_state_dict(state["model"])
        again = Cycles(fresh, magnitude, cycles=2, ap=ap, rewind=rewind)
        again.load_state_dict(state["loop"])
        assert again.run(Trainer()) == expected


def test_what_was_computed_stays_when_weights_become_nan():
    def train(model, masks, run):
        if run.cycle == 2:
            with torch.no_grad():
                model.fc2.weight[0, 0] = float("nan")
        return {}

    with pytest.raises(
        FloatingPointError, match=r"fc2.weight has weights that are not finite after .* cycle 2"
    ) as error:
        prune_iteratively(network(), train, magnitude, cycles=5)
    assert [row["cycle"] for row in error.value.history] == [0, 1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ap": "light"}, ValueError, "unknown variant 'light'; close: lite"),
        ({"cycles": -1}, ValueError, "cycles must be a whole number"),
        ({"amount": 1.0}, ValueError, r"amount is a share of what is alive, in \(0, 1\)"),
        ({"rate": 0.2}, ValueError, r"rate \(0.2\) must be below amount \(0.2\)"),
        ({"criterion": "leest-moved"}, ValueError, "unknown criterion 'leest-moved'; close: least-moved"),
        ({"rewind": "500"}, ValueError, 'a step such as "500it" or "2ep", not \'500\''),
        ({"rewind": "2ep"}, ValueError, "say how many steps one has"),
        ({"pruner": None}, ValueError, "ap='lite' needs a pruner"),
        ({"pruner": "magnitude"}, TypeError, r"pass the object, pruners.create\('magnitude'\)"),
        ({"pruner": 3}, TypeError, "or is a function, not a int"),
        ({"ap": "solo", "criterion": "pruner"}, ValueError, "solo has no pruner"),
    ],
)
def test_bad_input_is_refused_before_any_training(options, error, message):
    train = Trainer()
    with pytest.raises(error, match=message):
        prune_iteratively(network(), train, **{"pruner": magnitude, **options})
    assert train.calls == []


def test_a_pruner_that_only_writes_zeros_is_understood():
    class Zeroing:
        def prune(self, model, masks, amount, batches=None, loss_fn=None):
            k = round(amount * masks.alive)
            weight = model.fc1.weight
            with torch.no_grad():
                weight.view(-1)[(weight.view(-1) != 0).nonzero()[:k, 0]] = 0
            return k

    history = prune_iteratively(network(), Trainer(), Zeroing(), cycles=2, ap="lite")
    assert [row["alive"] for row in history] == [416, 333, 266]


def test_rewind_parsing():
    assert Rewind.parse("0it") == Rewind("init")
    assert Rewind.parse("3ep", steps_per_epoch=10) == Rewind("step", 30)
    for text in ("", "it", "-3it", "1e3it", "INIT", "9999999999999999it"):
        with pytest.raises(ValueError, match="rewind must be"):
            Rewind.parse(text)


def test_snapshot_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the snapshot is of another model"):
        Snapshot(network()).restore(nn.Linear(2, 2))
