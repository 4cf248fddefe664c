#!/usr/bin/env python3
"""Costs of the activations: forward + backward alone, and the step time and memory of a ResNet-20 in training.

Alone, each is timed against the native activation that it is to be compared with (ReLU or SiLU). In the network, each
is swapped in. On a CPU memory is what autograd keeps for the backward pass; on CUDA the peak of the allocator.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmark import compare, machine, save
from torch import Tensor, nn

from ap import activations
from recipes import models

# The native activation each one is held against, and by how much it may be slower when run eagerly on a CPU.
AGAINST = {"helu": ("relu", 2.0), "swish": ("silu", 2.0), "smelu": ("silu", 3.0)}
ALONE = [
    "relu",
    "helu",
    "prelu",
    "relu_squared",
    "star_relu",
    "silu",
    "swish",
    "gelu",
    "smelu",
    "gsmelu",
    "rescu",
    "gcu",
]
IN_NETWORK = ["relu", "gelu", "silu", "helu", "smelu", "swish", "gcu"]


def training_pass(module: nn.Module, x: Tensor, compiled: bool) -> Callable[[], object]:
    """Forward and backward of one activation."""
    run = torch.compile(module, fullgraph=True) if compiled else module
    incoming = torch.randn_like(x)

    def once() -> object:
        x.grad = None
        return run(x).backward(incoming)

    return once


def alone(size: int, device: str, rounds: int, compiled: bool) -> list[dict[str, object]]:
    """Forward + backward of each, on `size` elements."""
    print(f"\nforward + backward alone, {size:,} elements, {'compiled' if compiled else 'eager'}")
    x = torch.randn(64, size // 64, device=device, requires_grad=True)
    candidates = {
        name: training_pass(activations.create(name).to(device), x.detach().clone().requires_grad_(), compiled)
        for name in ALONE
    }
    rows = compare(candidates, "relu", rounds=rounds, device=device, repeats=10, warmup=3)
    medians = {row["name"]: float(row["median_s"]) for row in rows}  # type: ignore[arg-type]
    for name, (native, limit) in AGAINST.items():
        print(f"  {name}: {medians[name] / medians[native]:.2f} × {native} (at most {limit:.0f} ×)")
    return rows


def network(name: str, device: str) -> nn.Module:
    """A ResNet-20 with one activation throughout."""
    torch.manual_seed(0)
    return models.create("resnet20", activation=name).to(device).train()


def step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """A training step without the optimizer, which costs the same for all."""

    def once() -> object:
        model.zero_grad(set_to_none=True)
        return F.cross_entropy(model(images), labels).backward()

    return once


def kept(once: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage counted once."""
    storages: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        once()
    return sum(storages.values())


def peak(once: Callable[[], object]) -> int:
    """The allocator's peak in one step."""
    once()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    once()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def in_network(batch: int, device: str, rounds: int, compiled: bool) -> list[dict[str, object]]:
    """Step time and memory of the ResNet-20."""
    cuda = device.startswith("cuda")
    print(f"\nResNet-20, batch {batch}, forward + backward, {'compiled' if compiled else 'eager'}")
    images = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch,), device=device)
    memory: dict[str, int] = {}
    for name in IN_NETWORK:  # one network at a time, or the others' weights would count
        model = network(name, device)
        once = step(torch.compile(model) if compiled else model, images, labels)  # type: ignore[arg-type]
        memory[name] = peak(once) if cuda else kept(once)
        del model, once
    steps = {}
    for name in IN_NETWORK:
        model = network(name, device)
        steps[name] = step(torch.compile(model) if compiled else model, images, labels)  # type: ignore[arg-type]
    rows = compare(steps, "relu", rounds=rounds, device=device)
    print(f"  {'peak' if cuda else 'kept for the backward pass'}, MiB (ratio to relu):")
    for row in rows:
        used = memory[str(row["name"])]
        row["memory_bytes"] = used
        print(f"  {row['name']!s:8} {used / 2**20:9.1f}  {used / memory['relu']:.3f}")
    return rows


def main() -> None:
    """Runs both and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=2**20, help="elements of the activation alone")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    where = machine(options.device)
    print(where)
    save(
        options.json,
        machine=where,
        compiled=options.compile,
        alone=alone(options.size, options.device, options.rounds, options.compile),
        resnet20=in_network(options.batch, options.device, options.rounds, options.compile),
    )


if __name__ == "__main__":
    main()
