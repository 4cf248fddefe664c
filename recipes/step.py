"""One optimizer step: from the numbers that say which images, to weights that are a step further.

On a GPU a step is one CUDA graph: gathering and augmenting the batch, forward pass, loss, backward pass, the optimizer,
what keeps dead weights dead, and the counting of dead neurons. Python only replays it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ap import DNRMonitor
from ap.dnr_recording import Recording
from recipes import distributed

WARM_UP = 2  # steps before a capture, in which libraries choose their kernels and the optimizer makes its state


class Step:
    """Makes the steps of one training, each as Python says.

    Args:
        model: what is trained.
        forward: what is called: the model, or something around it.
        optimizer: its optimizer.
        batch: makes (images, targets) of a step's inputs, on the device.
        loss_fn: (outputs, targets) to the loss, a mean over the batch.
        autocast: the precision of the forward pass.
        monitor: the monitor that is attached to what is called, if any.
        parts: a batch is made, and goes through the model, in this many parts; its size is a multiple of it.
        before: called between the backward pass and the optimizer, to clip gradients for example.
        after: called after the optimizer, to average weights for example.
        also: gives the tensors that `after`, or a hook of the optimizer's steps, changes in place.

    Attributes:
        loss_sum: the sum of the steps' losses, since somebody zeroed it.
        bad: which step, counted from 0, was the first whose loss was not finite; −1 for none. Not kept on a CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        optimizer: Optimizer,
        batch: Callable[..., tuple[Tensor, Any]],
        loss_fn: Callable[[Tensor, Any], Tensor],
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        monitor: DNRMonitor | None = None,
        *,
        parts: int = 1,
        before: Callable[[], Any] | None = None,
        after: Callable[[], Any] | None = None,
        also: Callable[[], Sequence[Tensor]] = tuple,
    ) -> None:
        self.model, self.optimizer, self.monitor = model, optimizer, monitor
        self._forward, self._batch, self._loss_fn, self._autocast = forward, batch, loss_fn, autocast
        self._parts, self._before, self._after, self._also = parts, before, after, also
        self.device = next(model.parameters()).device
        self.loss_sum = torch.zeros((), device=self.device)
        self.bad = torch.full((), -1, dtype=torch.int64, device=self.device)
        self._number = torch.zeros((), dtype=torch.int64, device=self.device)
        self._recording: Recording | None = None

    def __call__(self, inputs: tuple[Tensor, ...], rate: float) -> bool:
        """Makes one step with this learning rate.

        Returns:
            False where the loss is known not to be finite, as it is at once on a CPU: the weights are then untouched.
            A GPU is not waited for; ask `bad` now and then.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.monitor is None or self._parts == 1:
            loss = self._backward(inputs)
        else:  # the monitor counts passes, of which a step then has several: it sees all of a step's, or none
            count = self.monitor.due("train")
            with self._counting(count):
                loss = self._backward(inputs)
            self._counted(count)
        loss = distributed.mean_(loss)
        if self.device.type != "cpu":
            self._note(loss)
        elif not math.isfinite(loss.item()):
            return False
        self._update(loss)
        return True

    def restart(self) -> None:
        """Begins anew, after something replaced the optimizer's state."""
        self.bad.fill_(-1)
        self._number.zero_()

    def _backward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        size = inputs[0].shape[-1] // self._parts
        total: Tensor | None = None
        for part in range(self._parts):
            x, targets = self._batch(*(tensor[..., part * size : (part + 1) * size] for tensor in inputs))
            with contextlib.nullcontext() if part == self._parts - 1 else self._local():
                with self._autocast():
                    outputs = self._forward(x)
                loss = self._loss_fn(outputs.float(), targets) / self._parts
                loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def _local(self) -> contextlib.AbstractContextManager[Any]:
        """Without averaging over the ranks: once a step is enough."""
        no_sync = getattr(self._forward, "no_sync", None)
        return contextlib.nullcontext() if no_sync is None else no_sync()

    def _counting(self, count: bool) -> contextlib.AbstractContextManager[Any]:
        if self.monitor is None:
            return contextlib.nullcontext()
        if not count:
            return self.monitor.into(None)
        if self._recording is None:
            self._recording = self.monitor.record()
        return self.monitor.into(self._recording)

    def _counted(self, count: bool) -> None:
        if count and self._recording is not None:
            self._recording.passes += self._parts  # each part is a pass of the model

    def _note(self, loss: Tensor) -> None:
        first = ~torch.isfinite(loss) & (self.bad < 0)
        self.bad.copy_(torch.where(first, self._number, self.bad))
        self._number += 1

    def _update(self, loss: Tensor) -> None:
        if self._before is not None:
            self._before()
        self.optimizer.step()
        if self._after is not None:
            self._after()
        self.loss_sum += loss


def capture(make: Callable[[], None]) -> Callable[[], None]:
    """Captures what the function does on the current CUDA device, without doing it; returns what does it."""
    graph, stream = torch.cuda.CUDAGraph(), _side_stream(torch.cuda.current_stream())
    # Other threads may be reading batches.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        make()
    return graph.replay


class CapturedStep(Step):
    """The same steps as CUDA graphs: one that counts dead neurons, where the monitor is due, and one that does not.

    Inputs and learning rate are copied to where the graphs read them. A graph is captured when it is first needed,
    after steps that warm up and are then undone. What the optimizer's step hooks do must be work for the device.

    Args:
        args, kw: see `Step`; the optimizer must be capturable.
        capture: makes a replay out of a function.
    """

    def __init__(
        self, *args: Any, capture: Callable[[Callable[[], None]], Callable[[], Any]] = capture, **kw: Any
    ) -> None:
        super().__init__(*args, **kw)
        self._capture = capture
        self._rate = torch.zeros((), device=self.device)
        self._inputs: tuple[Tensor, ...] = ()
        self._replays: dict[bool, Callable[[], Any]] = {}

    def __call__(self, inputs: tuple[Tensor, ...], rate: float) -> bool:
        """Makes one step with this learning rate; always True, see `bad`."""
        if not self._inputs:
            self._inputs = tuple(torch.empty_like(tensor) for tensor in inputs)
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._rate.fill_(rate)
        count = self.monitor is not None and self.monitor.due("train")
        if count not in self._replays:
            self._replays[count] = self._prepared(count)
        self._replays[count]()
        self._counted(count)
        return True

    def restart(self) -> None:
        """Begins anew, after something replaced the optimizer's state: with new graphs."""
        super().restart()
        self._replays.clear()

    def _make(self) -> None:
        loss = self._backward(self._inputs)
        self._note(loss)
        self._update(loss)

    def _prepared(self, count: bool) -> Callable[[], Any]:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate
        with self._counting(count), _on_device(self.device):
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # cuDNN is about to measure kernels, and other runs' would be in the way
            with self._undone(), _aside(self.device), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
                for _ in range(WARM_UP):
                    self._make()
            if count and self._recording is not None:
                self._recording.clear()
            return self._capture(self._make)

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Puts back, in place, everything that steps change."""
        kept = [*self.model.parameters(), *self.model.buffers(), self.loss_sum, self.bad, self._number, *self._also()]
        before = [tensor.detach().clone() for tensor in kept]
        states = self.optimizer.state
        held = {
            parameter: {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
            for parameter, state in states.items()
        }
        random = torch.get_rng_state()
        random_cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        yield
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)
            for parameter, state in states.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):  # what a first step makes is as good as 0 before it
                        value.copy_(held[parameter][key]) if parameter in held else value.zero_()
        torch.set_rng_state(random)
        if random_cuda is not None:
            torch.cuda.set_rng_state(random_cuda, self.device)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _side_stream(stream: Any) -> Any:
    """One for warming up and captures beside a stream. cuBLAS keeps a workspace for each that it was ever used on, so
    that one for every capture would take ever more memory, and one for runs on several streams would mix them up."""
    return torch.cuda.Stream(stream.device)


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """On the stream of captures: what is set up on the default stream cannot be captured."""
    if device.type != "cuda":
        yield
        return
    current = torch.cuda.current_stream(device)
    stream = _side_stream(current)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
