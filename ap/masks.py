"""Which weights are alive, and that the dead ones stay dead. Masks live beside the model, never in it."""

from __future__ import annotations

import copy
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim.optimizer import Optimizer

from ap.names import close_names, refuse_wrappers
from ap.ranking import apportion, count_true, lowest, lowest_per_row, select_lowest
from ap.slots import (
    Filter,
    Handle,
    Handles,
    Kept,
    Slot,
    enforce,
    find_slots,
    follow_optimizer,
    gradient_hook,
    parameter_ids,
    zeros_of,
)
from ap.steps import after_every_step
from ap.warn import warn

Scope = Literal["global", "layer", "row", "group"]
_SCHEMA = 1


class Masks:
    """Which of a model's weights are alive.

    Every convolution's, linear layer's and attention projection's weight gets a mask of its own shape; biases and
    normalisation parameters are never pruned. A tensor that several layers share is counted once, under its first name.
    The model itself is not changed: parameters keep their names, and pruning just writes zeros.

    Args:
        model: any module. `nn.DataParallel` and FSDP are refused; the prefixes of DDP (`module.`) and `torch.compile`
            (`_orig_mod.`) are left out of the names. What `torch.nn.utils.prune` has masked starts dead.
        include: which weights: names (`"fc1.weight"` or `"fc1"`), globs (`"layer1.*"`), or a predicate
            `(name, module) -> bool`; default all. A full parameter name may also name another parameter, e.g. an
            embedding's.
        exclude: the same, for what to leave out.
        floor: how many weights every layer keeps at least, whatever the scores say.

    Raises:
        ValueError: nothing to prune, or a filter that matches nothing (the close names are listed).
        TypeError: a wrapper whose parameters are not the model's own.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> masks = Masks(model)
        >>> masks.names, masks.total
        (['0.weight', '2.weight'], 10)
        >>> masks.prune({"0.weight": torch.arange(8.0).view(2, 4), "2.weight": torch.ones(1, 2)}, amount=0.2)
        2
        >>> masks["0.weight"]
        tensor([[False, False,  True,  True],
                [ True,  True,  True,  True]])
        >>> masks.alive, masks.density
        (8, 0.8)
    """

    def __init__(
        self,
        model: nn.Module,
        include: Filter | None = None,
        exclude: Filter | None = None,
        floor: int = 0,
    ) -> None:
        refuse_wrappers(model)
        if floor < 0:
            raise ValueError(f"floor must be at least 0, not {floor}")
        self.floor = floor
        self.model = model
        self._slots = {slot.name: slot for slot in find_slots(model, include, exclude)}
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # those that are bound
        self._followers: list[weakref.WeakMethod[Callable[[Mapping[nn.Parameter, Kept]], None]]] = []
        if not self._slots:
            raise ValueError(
                f"{type(model).__name__} has nothing to prune: no convolution, linear layer or attention projection"
                + (" passes the filters" if include is not None or exclude is not None else "")
            )
        self.from_torch_prune_()
        for name, slot in self._slots.items():
            if not count_true(slot.mask):
                warn(f"{name} has no weight that is alive")

    @classmethod
    def from_zeros(cls, model: nn.Module, **kwargs: Any) -> Masks:
        """Masks of an already sparse model: what is exactly zero is dead.

        Example:
            >>> layer = nn.Linear(2, 1)
            >>> _ = nn.init.constant_(layer.weight, 0.0)
            >>> import warnings
            >>> with warnings.catch_warnings(action="ignore"):
            ...     Masks.from_zeros(layer).alive
            0
        """
        masks = cls(model, **kwargs)
        masks.remove({name: zeros_of(masks.weight(name)) for name in masks.names})
        return masks

    @classmethod
    def from_torch_prune(cls, model: nn.Module, **kwargs: Any) -> Masks:
        """Masks of a model that torch.nn.utils.prune has pruned; its `weight_mask` buffers follow from now on.

        Raises:
            ValueError: it has masked none of the weights.

        Example:
            >>> from torch.nn.utils import prune
            >>> layer = prune.l1_unstructured(nn.Linear(4, 2), "weight", amount=3)
            >>> Masks.from_torch_prune(layer).alive
            5
        """
        from ap.compat.torch_prune import check_pruned

        masks = cls(model, **kwargs)
        check_pruned(masks)
        return masks

    def to_torch_prune(self) -> nn.Module:
        """Gives the model torch.nn.utils.prune's `weight_orig` and `weight_mask`; `prune.remove` undoes it.

        Returns:
            The model, changed in place; its parameters are the same objects, and these masks go on working.

        Example:
            >>> layer = nn.Linear(2, 1)
            >>> masks = Masks(layer)
            >>> _ = masks.remove({"weight": torch.tensor([[True, False]])})
            >>> masks.to_torch_prune().weight_mask
            tensor([[0., 1.]])
        """
        from ap.compat.torch_prune import to_torch_prune

        return to_torch_prune(self)

    @property
    def names(self) -> list[str]:
        """The weights' names in module order, which is also the order of ties."""
        return list(self._slots)

    @property
    def total(self) -> int:
        """How many weights there are, dead or alive; those removed physically count as dead."""
        return sum(slot.total for slot in self._slots.values())

    @property
    def alive(self) -> int:
        """How many weights are alive."""
        return sum(self.layer_alive().values())

    @property
    def density(self) -> float:
        """The share of weights that are alive, in [0, 1]."""
        return self.alive / self.total

    def layer_alive(self) -> dict[str, int]:
        """How many weights of each layer are alive."""
        return {name: count_true(slot.mask) for name, slot in self._slots.items()}

    def layer_density(self) -> dict[str, float]:
        """The share of each layer's weights that are alive, in [0, 1]."""
        alive = self.layer_alive()
        return {name: alive[name] / max(1, slot.total) for name, slot in self._slots.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._slot(name).current_mask()

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        return f"Masks({len(self)} weights, {self.alive:,} of {self.total:,} alive, density {self.density:.4f})"

    def weight(self, name: str) -> nn.Parameter:
        """The parameter that the mask of this name belongs to (`weight_orig` where torch.nn.utils.prune is at work)."""
        return self._slot(name).parameter()

    def module(self, name: str) -> nn.Module:
        """The layer that owns the weight of this name."""
        return self._slot(name).module()

    def prune(
        self,
        scores: Mapping[str, Tensor],
        amount: float | None = None,
        *,
        count: int | None = None,
        scope: Scope = "global",
        group: int = 4,
    ) -> int:
        """Removes the alive weights with the lowest scores, and zeroes them at once.

        Exactly round(amount × alive) go, or `count`. Within a layer, row or group that exact total is apportioned by
        largest remainder; ties are broken by position.

        Args:
            scores: for each name of `names` a floating tensor of the weight's shape, higher = keep; may be computed
                lazily (any mapping). `inf` is kept as long as possible.
            amount: share of what is alive, in (0, 1).
            count: how many, instead of `amount`.
            scope: what is compared with each other: "global", within a "layer", within an output "row" (all that one
                output unit or channel adds up, also of a transposed convolution), or within a "group" of `group`
                neighbours along the input axis (as in N:M sparsity).
            group: the size of a group; every input axis must be a multiple of it.

        Returns:
            How many weights went. A layer left empty is warned about by name.

        Raises:
            ValueError: amount outside (0, 1), a missing, unknown or wrongly shaped score, NaN among the scores, a floor
                that leaves too few.
        """
        alive = self.layer_alive()
        k = _how_many(sum(alive.values()), amount, count)
        self._check_scores(scores)
        eligible = {name: slot.current_mask() for name, slot in self._slots.items()}
        if self.floor:
            eligible = self._above_floor(scores, eligible, alive, k)
        return self.remove(_choose(scores, eligible, k, scope, group, self._transposed()))

    def remove(self, dead: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> int:
        """Removes the weights that are True in `dead` (bool tensors by name) and zeroes them; returns how many went.

        A layer left empty is warned about by name.

        Example:
            >>> masks = Masks(nn.Linear(2, 1))
            >>> masks.remove({"weight": torch.tensor([[True, False]])})
            1
        """
        gone = 0
        emptied = []
        for name, where in dead.items() if isinstance(dead, Mapping) else dead:
            slot = self._slot(name)
            mask = slot.current_mask()
            if where.shape != mask.shape:
                raise ValueError(f"{name}: expected shape {list(mask.shape)}, got {list(where.shape)}")
            if where.dtype != torch.bool:
                raise TypeError(f"{name}: expected bools, True = remove, got {where.dtype}")
            before = count_true(mask)
            mask.gt_(where.to(mask.device))  # mask and not where, without a temporary
            after = count_true(mask)
            if after != before:
                gone += before - after
                slot.apply()
                if after == 0:
                    emptied.append(name)
        if emptied:
            warn(f"pruning left no weight in {', '.join(emptied)}")
        return gone

    @torch.no_grad()
    def apply_(self) -> Masks:
        """Zeroes the dead weights again, after something overwrote them (a rewind, a loaded checkpoint)."""
        for slot in self._slots.values():
            slot.apply()
        return self

    def bind(self, optimizer: Optimizer, mask_gradients: bool = False) -> Handle:
        """From now on no step of `optimizer` revives a weight, also after later `prune()` calls.

        After each step one fused multiply zeroes the dead weights and their entries in the optimizer's state (momentum,
        moments), so that the state of a weight is as dead as the weight.

        Args:
            optimizer: any `torch.optim` optimizer, or one that derives from its base.
            mask_gradients: also zero the dead weights' gradients as soon as they are accumulated, so that gradient
                clipping, gradient norms and line searches (L-BFGS) see the living weights only. For the weights that
                require gradients now: bind again after unfreezing layers.

        Returns:
            A handle; `.remove()` lets go.

        Raises:
            ValueError: the optimizer holds none of the masked weights.

        Example:
            >>> layer = nn.Linear(2, 1)
            >>> masks = Masks(layer)
            >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
            >>> handle = masks.bind(optimizer)
            >>> _ = masks.prune({"weight": torch.tensor([[1.0, 2.0]])}, amount=0.5)
            >>> layer(torch.ones(1, 2)).sum().backward(); _ = optimizer.step()
            >>> layer.weight[0, 0].item() == 0
            True
        """
        held = parameter_ids(optimizer)
        if not any(id(slot.parameter()) in held for slot in self._slots.values()):
            raise ValueError(
                f"this {type(optimizer).__name__} holds none of the {len(self)} masked weights: "
                "was it built for another model, or before the model was copied?"
            )
        slots = list(self._slots.values())
        self._optimizers.add(optimizer)
        warned = False

        def after_step(stepped: Optimizer, args: Any, kwargs: Any) -> None:
            nonlocal warned
            if not enforce(slots, stepped) and not warned:
                warned = True
                warn(
                    f"this {type(stepped).__name__} no longer holds any of the masked weights, which something "
                    "replaced (load_state_dict(assign=True)?): make a new optimizer, and bind it"
                )

        handles: list[Handle] = [optimizer.register_step_post_hook(after_step)]
        if mask_gradients:
            handles += [
                slot.parameter().register_post_accumulate_grad_hook(gradient_hook(slot))
                for slot in slots
                if id(slot.parameter()) in held and slot.parameter().requires_grad
            ]
        return Handles(handles)

    def hold(self) -> Handle:
        """Like `bind`, for every optimizer that ever steps these weights: PyTorch's global step hook.

        The hook lives until its handle's `.remove()`, or until the model is gone.
        """
        slots = list(self._slots.values())  # hold their modules weakly, so the hook does not keep the model alive
        return after_every_step(lambda opt, args, kwargs: enforce(slots, opt), owner=self.model)

    def on_resize(self, follower: Callable[[Mapping[nn.Parameter, Kept]], None]) -> None:
        """Calls `follower`, a method that is held weakly, whenever layers were made smaller."""
        self._followers = [known for known in self._followers if known() is not None]
        self._followers.append(weakref.WeakMethod(follower))

    def follow(self, kept: Mapping[nn.Parameter, Kept]) -> int:
        """After layers were made smaller: masks, bound optimizers' states and AP's start go along.

        The parameters must be the same objects as before, with new shapes.

        Args:
            kept: for each parameter that changed, masked or not, what is left of it.

        Returns:
            How many living weights went.

        Example:
            >>> layer = nn.Linear(3, 2)
            >>> masks = Masks(layer)
            >>> layer.weight.data = layer.weight.data[:, [0, 2]]  # without the middle column
            >>> masks.follow({layer.weight: Kept(torch.Size([2, 3]), torch.arange(2), torch.tensor([0, 2]))})
            2
            >>> masks["weight"].shape, masks.alive, masks.total
            (torch.Size([2, 2]), 4, 6)
        """
        before = sum(count_true(slot.mask) for slot in self._slots.values())
        for slot in self._slots.values():
            if slot.parameter() in kept:
                slot.follow(kept[slot.parameter()])
        for optimizer in self._optimizers:
            follow_optimizer(optimizer, kept)
        for reference in self._followers:
            follower = reference()
            if follower is not None:
                follower(kept)
        return before - self.alive

    def __deepcopy__(self, memo: dict[int, Any]) -> Masks:
        """Masks of a copy of the model, or of the copy that is being made; optimizers are not bound to it."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.floor, copied.model = self.floor, copy.deepcopy(self.model, memo)
        copied._optimizers, copied._followers = weakref.WeakSet(), []
        copied._slots = {name: slot.of_copy(memo) for name, slot in self._slots.items()}
        return copied

    def __reduce__(self) -> Any:
        raise TypeError("Masks belong to a living model and are not pickled: save masks.state_dict()")

    def refresh(self) -> list[str]:
        """After something else gave layers another shape: their masks start whole again, in the new shape.

        What a layer lost counts as dead weights; `follow` is for whoever knows which elements are left.

        Returns:
            The names of those weights.

        Example:
            >>> layer = nn.Linear(3, 2)
            >>> masks = Masks(layer)
            >>> layer.weight = nn.Parameter(torch.ones(2, 2))
            >>> masks.refresh(), masks.alive, masks.total
            (['weight'], 4, 6)
        """
        return [name for name, slot in self._slots.items() if slot.refresh()]

    def state_dict(self) -> dict[str, Any]:
        """The masks as packed bits: safe to save with `torch.save` and to load with `weights_only=True`."""
        bits = {}
        for name, slot in self._slots.items():
            packed = np.packbits(slot.current_mask().contiguous().cpu().numpy())
            bits[name] = torch.from_numpy(packed.reshape(-1))
        shapes = {name: list(slot.mask.shape) for name, slot in self._slots.items()}
        gone = {name: slot.gone for name, slot in self._slots.items() if slot.gone}
        # torch.save has no checksum that torch.load looks at, and every bit pattern is a mask.
        crc32 = {name: zlib.crc32(packed.numpy().data) for name, packed in bits.items()}
        state = {"schema": _SCHEMA, "shapes": shapes, "bits": bits, "crc32": crc32}
        return state | ({"gone": gone} if gone else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over saved masks, and zeroes what they say is dead.

        Raises:
            ValueError: another schema, names or shapes than this model's; nothing is changed then.
        """
        self.refresh()
        try:
            masks, gone = self._unpack(state)
        except ValueError:
            raise
        except Exception as error:  # a state can be damaged in more ways than there are checks
            raise ValueError(f"damaged mask state: {error}") from error
        for name, mask in masks.items():
            self[name].copy_(mask)
            self._slots[name].gone = gone[name]
        self.apply_()

    def _unpack(self, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Masks, and numbers of weights removed physically, of a saved state that fits this model."""
        if not isinstance(state, Mapping) or state.get("schema") != _SCHEMA:
            raise ValueError(f"not a mask state of schema {_SCHEMA}")
        bits = state.get("bits")
        if not isinstance(bits, Mapping) or list(bits) != self.names:
            found = list(bits) if isinstance(bits, Mapping) else []
            odd = [n for n in found if n not in self._slots] + [n for n in self.names if n not in found]
            raise ValueError(f"the mask state is of another model: {', '.join(map(str, odd[:5])) or 'another order'}")
        checksums, removed = state.get("crc32"), state.get("gone", {})
        masks, gone = {}, {}
        for name, slot in self._slots.items():
            shape, size = list(slot.mask.shape), slot.mask.numel()
            given = state.get("shapes", {}).get(name)
            if given is None or list(given) != shape:
                raise ValueError(f"{name}: the mask state has shape {given}, not {shape}")
            packed = bits[name]
            if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.shape != ((size + 7) // 8,):
                raise ValueError(f"{name}: damaged mask state")
            array = np.ascontiguousarray(packed.cpu().numpy())
            if checksums is not None and zlib.crc32(array.data) != checksums.get(name):
                raise ValueError(f"{name}: damaged mask state, its checksum is wrong: use an earlier one")
            masks[name] = torch.from_numpy(np.unpackbits(array, count=size).astype(bool)).view(shape)
            gone[name] = removed.get(name, 0)
            if type(gone[name]) is not int or gone[name] < 0:
                raise ValueError(f"{name}: damaged mask state, {gone[name]!r} weights removed")
        return masks, gone

    def from_torch_prune_(self) -> int:
        """Takes over what torch.nn.utils.prune's `weight_mask` buffers say is dead; returns how many went."""
        dead = {}
        for name, slot in self._slots.items():
            buffer = slot.torch_prune_mask()
            if buffer is not None:
                dead[name] = buffer == 0
        return self.remove(dead)

    def _slot(self, name: str) -> Slot:
        try:
            return self._slots[name]
        except KeyError:
            raise KeyError(f"no mask named {name!r}{close_names(name, self._slots)}") from None

    def _transposed(self) -> dict[str, int]:
        """How many groups each transposed convolution has: the first axis of its weight is its input."""
        slots = ((name, slot.module()) for name, slot in self._slots.items() if slot.attribute == "weight")
        return {name: module.groups for name, module in slots if isinstance(module, _ConvNd) and module.transposed}

    def _check_scores(self, scores: Mapping[str, Tensor]) -> None:
        given = set(scores)
        for name in self._slots:
            if name not in given:
                raise ValueError(f"{name}: no score given")
        for name in scores:
            if name not in self._slots:
                raise ValueError(f"a score for {name!r}, which has no mask{close_names(name, self._slots)}")

    def _above_floor(
        self, scores: Mapping[str, Tensor], eligible: Mapping[str, Tensor], alive: Mapping[str, int], k: int
    ) -> dict[str, Tensor]:
        room = {name: max(0, n - self.floor) for name, n in alive.items()}
        if k > sum(room.values()):
            raise ValueError(
                f"cannot remove {k}: with at least {self.floor} kept in every layer {sum(room.values())} may go"
            )
        return {name: lowest({name: scores[name]}, {name: eligible[name]}, room[name])[name] for name in eligible}


def _how_many(alive: int, amount: float | None, count: int | None) -> int:
    if (amount is None) == (count is None):
        raise ValueError("give either amount or count")
    if count is not None:
        return check_count(count, alive)
    return check_share(amount, "amount", alive)


def check_count(count: Any, alive: int) -> int:
    """Validates a number of weights to remove.

    >>> check_count(2, 11)
    2
    """
    if not isinstance(count, (int, np.integer)) or isinstance(count, bool):
        raise ValueError(f"count must be a whole number, not {count!r}")
    if not 0 <= count <= alive:
        raise ValueError(f"count must be between 0 and the {alive} weights that are alive, not {count}")
    return int(count)


def check_share(share: Any, what: str, of: int) -> int:
    """Validates a share in (0, 1) and returns round(share × of).

    >>> check_share(0.2, "amount", 11)
    2
    """
    if isinstance(share, bool) or not isinstance(share, (int, float, np.floating, np.integer)) or not 0 < share < 1:
        raise ValueError(f"{what} is a share of what is alive, in (0, 1), not {share!r}")
    return round(float(share) * of)


def _choose(
    scores: Mapping[str, Tensor],
    eligible: Mapping[str, Tensor],
    k: int,
    scope: str,
    group: int,
    transposed: Mapping[str, int],
) -> Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]:
    if scope == "global":
        return select_lowest(scores, eligible, k)
    if scope == "layer":
        shares = apportion(k, [count_true(mask) for mask in eligible.values()])
        return {
            name: lowest({name: scores[name]}, {name: mask}, int(share))[name]
            for (name, mask), share in zip(eligible.items(), shares, strict=True)
        }
    if scope not in ("row", "group"):
        raise ValueError(
            f"scope must be one of {', '.join(get_args(Scope))}, not {scope!r}{close_names(scope, get_args(Scope))}"
        )
    ordinary = {name: _other_way_round(mask, transposed.get(name, 0)) for name, mask in eligible.items()}
    tables = {name: _table(mask, name, scope, group) for name, mask in ordinary.items()}
    sizes = [table.sum(1).cpu().numpy() for table in tables.values()]
    shares = apportion(k, np.concatenate(sizes))
    dead, at = {}, 0
    for name, table in tables.items():
        quotas = torch.from_numpy(shares[at : at + len(table)]).to(table.device)
        at += len(table)
        score = scores[name].detach()
        if score.shape != eligible[name].shape:
            shapes = list(score.shape), list(eligible[name].shape)
            raise ValueError(f"{name}: scores of shape {shapes[0]} for weights of shape {shapes[1]}")
        if not score.dtype.is_floating_point:
            raise TypeError(f"{name}: scores must be floating point, not {score.dtype}")
        try:
            score = _other_way_round(score, transposed.get(name, 0))
            rows = lowest_per_row(_table(score, name, scope, group), table, quotas)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        dead[name] = _other_way_round(_untable(rows, ordinary[name].shape, scope), transposed.get(name, 0))
    return dead


def _other_way_round(values: Tensor, groups: int) -> Tensor:
    """A transposed convolution's [C_in, C_out / groups, ...] as an ordinary one's [C_out, C_in / groups, ...], or back.

    Layers that are not transposed have 0 groups here, and stay as they are.
    """
    if not groups:
        return values
    rows, columns = values.shape[:2]
    apart = values.reshape(groups, rows // groups, columns, *values.shape[2:])
    return apart.transpose(1, 2).reshape(groups * columns, rows // groups, *values.shape[2:])


def _table(values: Tensor, name: str, scope: str, group: int) -> Tensor:
    """[rows, columns]: an output row each, or a group of neighbours along the input axis (axis 1) each."""
    if scope == "row":
        return values.reshape(len(values), values[0].numel()) if len(values) else values.reshape(0, 1)
    if group < 1 or values.dim() < 2 or values.shape[1] % group:
        raise ValueError(
            f"{name}: its input axis of shape {list(values.shape)} is not a multiple of the group of {group}"
        )
    return values.movedim(1, -1).reshape(-1, group)


def _untable(rows: Tensor, shape: torch.Size, scope: str) -> Tensor:
    if scope == "row":
        return rows.view(shape)
    return rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
