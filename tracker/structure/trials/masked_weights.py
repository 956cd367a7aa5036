"""Masks that follow a weight to where activations meet it, whatever is computed of it on the way.

Zero in the place of columns of a *parameter* is not zero in what a consumer reads: a norm over the columns, say, is
another one then, and hides what a removal does. So a pass carries the mask of each parameter along, through views,
casts and whatever else keeps its shape. What is zero is the activation, at the product that adds up over the columns
(or the made weight, where the masked places differ from row to row: there it is the same).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tracker.structure.weight_origins import is_random
from tracker.utils.nested import tensors_in

Place = tuple[int, int]  # the id of a parameter, and a dimension of it
aten = torch.ops.aten
# Of each product the operands, and of each the dimensions that are added up over.
_CONTRACTED: Mapping[Any, tuple[tuple[int, int], ...]] = {
    aten.mm: ((0, -1), (1, -2)),
    aten.bmm: ((0, -1), (1, -2)),
    aten.addmm: ((1, -1), (2, -2)),
    aten.baddbmm: ((1, -1), (2, -2)),
    aten.mv: ((0, -1), (1, -1)),
    aten.addmv: ((1, -1), (2, -1)),
    aten.dot: ((0, -1), (1, -1)),
    aten.vdot: ((0, -1), (1, -1)),
}
_JOINED = {aten.cat, aten.stack}


class MaskedWeights(TorchDispatchMode):
    """Inside, these places of weights are zero where activations meet them.

    Args:
        reads: Parameter (by id) and dimension -> indices that are zero in products that add up over them.
        makes: The same of indices that are zero in any operation with an activation.
        inputs: What the model is given: a tensor is an activation if they have a part in it.

    Attributes:
        met: Places that an activation met.
    """

    def __init__(
        self, reads: Mapping[Place, Tensor], makes: Mapping[Place, Tensor], inputs: object
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gone, self._makes = {**makes, **reads}, makes.keys() - reads.keys()
        self.met: set[Place] = set()
        # By id, with a reference that tells whether it is still the same tensor.
        self._masks: dict[int, tuple[weakref.ref[Tensor], dict[Place, Tensor]]] = {}
        self._data: dict[int, weakref.ref[Tensor]] = {}
        for tensor in tensors_in(inputs):
            self._data[id(tensor)] = weakref.ref(tensor)

    def lent(self, key: int, value: Tensor) -> None:
        """`value` is the parameter of this id, as the pass sees it."""
        masks = {}
        for (name, dim), gone in self._gone.items():
            if name == key:
                line = torch.zeros(value.shape[dim], dtype=torch.bool, device=value.device)
                line[gone] = True
                shape = [-1 if d == dim else 1 for d in range(value.ndim)]
                masks[name, dim] = line.view(shape).expand(value.shape)
        if masks:
            self._keep(value, masks)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operation, with masked operands where an activation is among them."""
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        packet = func._overloadpacket
        with_data = any(map(self._is_data, given))
        own_args, own_kwargs = args, kwargs
        if with_data and not func.is_view and any(map(self._of, given)):
            own_args, own_kwargs = self._made(args), self._made(kwargs)
            own_args = self._masked(packet, args, own_args)
        result = func(*own_args, **own_kwargs)
        made = tensors_in(result)
        if with_data or (not given and is_random(func)):
            for tensor in made:
                self._data[id(tensor)] = weakref.ref(tensor)
        if packet in _CONTRACTED:
            if not with_data:
                self._through(_CONTRACTED[packet], args, result)
        elif packet is not aten.convolution:
            for place in dict.fromkeys(p for t in given for p in self._of(t)):
                self._follow(place, func, args, kwargs, result)
        return result

    def _masked(self, packet: Any, args: tuple[Any, ...], made: tuple[Any, ...]) -> tuple[Any, ...]:
        """Operands of a product, zero where the weights among `args` read what is masked."""
        if packet is aten.convolution:
            dims: tuple[tuple[int, int], ...] = ((0, 1), (1, 0 if args[6] else 1))
        else:
            dims = _CONTRACTED.get(packet, ())
        changed = list(made)
        for (at, dim), (to, along) in zip(dims, reversed(dims), strict=True):
            for place, mask in self._of(args[at]).items() if self._is_data(args[to]) else ():
                small = _without_repeats(mask)
                if place in self._makes or not (small.any(dim) != small.all(dim)).any():
                    continue
                self.met.add(place)
                ungrouped = packet is not aten.convolution or args[8] == 1
                if ungrouped and small.numel() == small.shape[dim]:  # the same for all that read
                    shape = [1] * args[to].ndim
                    shape[along] = -1
                    changed[to] = changed[to].masked_fill(small.view(shape), 0)
                else:
                    changed[at] = changed[at].masked_fill(mask, 0)
        return tuple(changed)

    def _made(self, value: Any) -> Any:
        """Arguments of an operation, of weights that make or carry units these zero."""
        if isinstance(value, Tensor):
            for place, mask in self._of(value).items() if not self._is_data(value) else ():
                if place in self._makes:
                    self.met.add(place)
                    value = value.masked_fill(mask, 0)
            return value
        if isinstance(value, dict):
            return {key: self._made(part) for key, part in value.items()}
        return type(value)(map(self._made, value)) if type(value) in (list, tuple) else value

    def _through(
        self, dims: tuple[tuple[int, int], ...], args: tuple[Any, ...], result: Tensor
    ) -> None:
        """In a product of weights, masked rows stay rows and masked columns columns."""
        for at, dim in dims:
            for place, mask in self._of(args[at]).items():
                small = _without_repeats(mask)
                if (small.any(dim) == small.all(dim)).all():  # not along what is added up over
                    kept = small.any(dim, keepdim=True)
                    if kept.ndim == result.ndim:
                        self._keep(result, {place: kept.expand(result.shape)})
                    elif kept.ndim == result.ndim + 1:  # times a vector
                        self._keep(result, {place: kept.squeeze(dim).expand(result.shape)})

    def _follow(
        self, place: Place, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Where the masked columns lie in the result of an operation; nowhere, if that cannot be told."""
        made = tensors_in(result)
        if func.is_view or func._overloadpacket in _JOINED:
            moved = _moved(lambda t: self._of(t).get(place), func, args, kwargs)
            for tensor, mask in zip(made, moved, strict=False):
                if mask.shape == tensor.shape:
                    self._keep(tensor, {place: mask})
            return
        masks = [m for t in tensors_in((args, kwargs)) if (m := self._of(t).get(place)) is not None]
        for tensor in made:
            own = [m for m in masks if _spreads(m, tensor)]
            if own:
                mask = own[0].expand(tensor.shape)
                for more in own[1:]:
                    mask = mask | more
                self._keep(tensor, {place: mask})

    def _keep(self, tensor: Tensor, masks: dict[Place, Tensor]) -> None:
        self._masks[id(tensor)] = weakref.ref(tensor), self._of(tensor) | masks

    def _of(self, tensor: object) -> dict[Place, Tensor]:
        ref, masks = self._masks.get(id(tensor), (None, {}))
        return masks if ref is not None and ref() is tensor else {}

    def _is_data(self, tensor: object) -> bool:
        ref = self._data.get(id(tensor))
        return ref is not None and ref() is tensor


def _without_repeats(mask: Tensor) -> Tensor:
    """The mask, of one index along dimensions in which it was expanded."""
    return mask[tuple(slice(0, 1 if step == 0 else None) for step in mask.stride())]


def _spreads(mask: Tensor, tensor: Tensor) -> bool:
    """Whether a mask is one of this tensor: of its shape, or of one that is broadcast to it."""
    if mask.ndim > tensor.ndim or not mask.ndim:
        return False
    return all(
        m in (n, 1) for m, n in zip(reversed(mask.shape), reversed(tensor.shape), strict=False)
    )


def _moved(mask_of: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Masks of the results of an operation that moves numbers about: the same done to the masks of what it is given."""

    def masks(value: Any) -> Any:
        if isinstance(value, Tensor):
            mask = mask_of(value)
            return torch.zeros_like(value, dtype=torch.bool) if mask is None else mask
        return [masks(v) for v in value] if type(value) is list else value

    if func._overloadpacket is aten.view:  # an expanded mask has other strides
        return [masks(args[0]).reshape(args[1])]
    try:
        return tensors_in(func(*map(masks, args), **kwargs))
    except RuntimeError:  # of a layout that the mask has not
        return []
