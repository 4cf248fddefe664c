"""Costs of the activations: forward + backward alone, and the step time and memory of a ResNet-20 in training.

python scripts/bench_activations.py [--rounds 9] [--device cuda] [--json FILE]

Alone, each is timed against the native activation that it is to be compared with (ReLU or SiLU). In the network, each
is swapped in. On a CPU memory is what autograd keeps for the backward pass; on CUDA the peak of the allocator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmark import Row, aim, arguments, by_name, compare, machine, parse, save
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
LEARNABLE = ["smelu", "gsmelu", "rescu", "swish"]
IN_NETWORK = ["relu", "gelu", "silu", "helu", "smelu", "swish", "gcu"]


def training_pass(module: nn.Module, x: Tensor, compiled: bool) -> Callable[[], object]:
    """Forward and backward of one activation."""
    run = torch.compile(module, fullgraph=True) if compiled else module
    incoming = torch.randn_like(x)

    def once() -> object:
        x.grad = None
        return run(x).backward(incoming)

    return once


def alone(size: int, device: str, rounds: int, compiled: bool, names: list[str]) -> list[Row]:
    """Forward + backward of each, on `size` elements."""
    x = torch.randn(64, size // 64, device=device, requires_grad=True)
    candidates = {
        name: training_pass(activations.create(name).to(device), x.detach().clone().requires_grad_(), compiled)
        for name in names
    }
    setting = f"Forward + backward alone, {size:,} elements, {'compiled' if compiled else 'eager'}"
    return compare(candidates, "relu", rounds=rounds, device=device, repeats=10, warmup=3, setting=setting)


def learnable(size: int, device: str, rounds: int, channels: int) -> list[Row]:
    """The same with parameters that are learned: shared by all channels (1), or one a channel."""
    x = torch.randn(16, 64, size // 1024, device=device)
    modules = {"relu": nn.ReLU(), "prelu": activations.create("prelu", num_parameters=channels)}
    for name in LEARNABLE:
        modules[name] = activations.create(name, learnable=True, num_parameters=channels)
    candidates = {
        name: training_pass(module.to(device), x.clone().requires_grad_(), False) for name, module in modules.items()
    }
    shared = "shared" if channels == 1 else "one a channel"
    setting = f"Forward + backward alone with learned parameters, {shared}, {size:,} elements, eager"
    return compare(candidates, "relu", rounds=rounds, device=device, repeats=5, warmup=2, setting=setting)


def times(rows: list[Row], name: str, native: str) -> float:
    """How many times as long as a native activation one takes."""
    return float(by_name(rows, name)["median_s"]) / float(by_name(rows, native)["median_s"])


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


def elements(model: nn.Module, images: Tensor) -> int:
    """How many numbers all activations of a ResNet-20 put out."""
    counted: list[int] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: counted.append(output.numel()))
        for module in model.modules()
        if isinstance(module, nn.ReLU)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return sum(counted)


def in_network(batch: int, device: str, rounds: int, compiled: bool) -> tuple[list[Row], dict[str, int]]:
    """Step time and memory of the ResNet-20."""
    cuda = device.startswith("cuda")
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
    setting = f"ResNet-20, batch {batch}, forward + backward, {'compiled' if compiled else 'eager'}"
    rows = compare(steps, "relu", rounds=rounds, device=device, setting=setting)
    for row in rows:
        used = memory[row["name"]]
        what = "peak" if cuda else "kept for the backward pass"
        row["extra"] = {f"{what}, MiB": f"{used / 2**20:.1f}", "ratio to relu's": f"{used / memory['relu']:.3f}"}
        print(f"{row['name']:10} {what}: {used / 2**20:9.1f} MiB, {used / memory['relu']:.3f} × relu's")
    memory["elements"] = elements(network("relu", device), images)
    return rows, memory


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--size", type=int, default=2**20, help="elements of the activation alone")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--compile-network", action="store_true", help="the ResNet-20 compiled too, which takes minutes"
    )
    options = parse(parser)
    names = ALONE
    if options.quick:
        options.size, options.batch = 2**14, 4
        names = [name for name in ALONE if name in {*AGAINST, *(native for native, _ in AGAINST.values())}]
    eager = alone(options.size, options.device, options.rounds, False, names)
    compiled = alone(options.size, options.device, options.rounds, True, names)
    learned = [row for n in (1, 64) for row in learnable(options.size, options.device, options.rounds, n)]
    rows, memory = in_network(options.batch, options.device, options.rounds, False)
    if options.compile_network:
        rows += in_network(options.batch, options.device, options.rounds, True)[0]
    on_cpu = options.device == "cpu"
    aims = []
    for name, (native, limit) in AGAINST.items():
        what = f"forward + backward of `{name}`, of `{native}`'s"
        measured = times(eager, name, native) if on_cpu else None
        aims.append(aim(f"{name}-eager", f"{what}, eager on a CPU", measured, limit, needs="it is one for a CPU"))
        aims.append(aim(f"{name}-compiled", f"{what}, compiled (within 5 %)", times(compiled, name, native), 1.05))
    room = memory["relu"] + memory["elements"]
    what = "memory of a ResNet-20's training with"
    aims += [
        aim("smelu-memory", f"{what} `smelu`, of that with `relu`", memory["smelu"] / memory["relu"], 1.0),
        aim("swish-memory", f"{what} `swish`, of that with `gelu`", memory["swish"] / memory["gelu"], 1.0),
        aim("helu-memory", f"{what} `helu`, of that with `relu` and a byte an element", memory["helu"] / room, 1.0),
    ]
    save(
        options.json,
        title="Activations",
        about="Each alone, and each in a ResNet-20 that is trained. Memory is what autograd keeps for the backward "
        "pass (on CUDA the peak of the allocator).",
        machine=machine(options.device),
        rows=eager + compiled + learned + rows,
        aims=aims,
    )


if __name__ == "__main__":
    main()
