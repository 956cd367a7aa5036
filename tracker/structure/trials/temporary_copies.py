"""A model in float64 that owns no weights: each is made from its own at the moment it is used, and dropped.

All that a change is tried on goes this way: units taken out or masked, in float64, at the price of one weight at a
time and not of copies of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracker.errors import StructureError
from tracker.inputs.calls import Arguments, Call, arguments
from tracker.inputs.forward_pass import copy_of, forward_once, tables_kept
from tracker.inputs.repeatable import unheard
from tracker.structure.code_sizes.attributes import sync_attributes, tensors
from tracker.structure.code_sizes.size_equations import Choice
from tracker.structure.code_sizes.traced_int import Attribute
from tracker.structure.trials.float64_mode import Float64Code, double, wider
from tracker.structure.trials.masked_weights import MaskedWeights, Place
from tracker.utils.nested import tensors_in

# Zero in the units' place: where weights read them, their columns; where other activations do (queries and keys), what
# makes them.
_PLAIN = (nn.Parameter, Tensor)  # a class of its own may say what its functions are
EVERY_ROLE = ("reads", "produces", "carries")

_lending: ContextVar[bool] = ContextVar("lending", default=False)


def is_lending() -> bool:
    """Whether an operation makes a weight, and is none of the model's own."""
    return _lending.get()


def copy_sharing_storage(model: nn.Module) -> nn.Module:
    """A copy with parameters of its own that share the storage of the model's: what is set in one stays there.

    Written to in place, a parameter would be written in both: give it new data, or `set_` it. Buffers are copied.

    Raises:
        StructureError: The model cannot be copied.
    """
    own: dict[int, Any] = {}
    for p in model.parameters():
        if type(p) is nn.Parameter:
            data = p.data  # not detached: that would count what is set in the copy as a write to p
            own[id(p)] = nn.Parameter(
                data.clone() if data.is_inference() else data,
                p.requires_grad,  # can take no part
            )
        else:
            own[id(p)] = p
    copied = copy_of(model, own)
    theirs = {
        id(t)
        for t in (*model.parameters(), *model.buffers())
        if id(t) not in own or own[id(t)] is not t
    }
    for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
        if id(tensor) in theirs:
            raise StructureError(
                f"{type(model).__name__} cannot be copied: the copy of a module of it has the model's own {name}, and "
                "every change is tried on a copy first. See to its __deepcopy__."
            )
    return copied


@contextmanager
def temporary_copy(model: nn.Module) -> Iterator[nn.Module]:
    """A light copy that lets go of what it came to own at the end: what has cycles would keep it until collected."""
    trial_copy = copy_sharing_storage(model)
    try:
        yield trial_copy
    finally:
        release(trial_copy)


def release(model: nn.Module) -> None:
    """Empty a copy that is used no more."""
    for module in model.modules():
        dict.clear(module._parameters)
        module._buffers.clear()


def randomize_constants(model: nn.Module) -> nn.Module:
    """Constant vectors (norms' ones and zeros) and matrices of zeros would hide a wrong removal: make them random.

    `model` is a light copy: its parameters get new data.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=like.dtype).to(like.device)

    with torch.no_grad():
        for matrix in model.parameters():
            if (
                matrix.is_floating_point()
                and matrix.ndim > 1
                and matrix.numel()
                and not matrix.any()
            ):
                matrix.data = (2 * noise(matrix) - 1) * matrix[0].numel() ** -0.5
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1 and tensor.numel() > 1:
                some = noise(tensor)
                tensor.data = tensor.data * (0.5 + some) + 0.1 * some
    return model


class InFloat64:
    """A light copy of a model that runs in float64, whole, without some units, or with some masked.

    in_float64: False: in the dtypes that its code is written for, where it can run in no others.
    """

    def __init__(self, model: nn.Module, in_float64: bool = True) -> None:
        self.model, self.in_float64 = model, in_float64
        if _has_strays(model):  # they cannot be lent
            self.model = model = copy_of(model)
            if in_float64:
                model.double()
        self._awake = False
        self._cuts: dict[int, dict[int, Tensor]] = {}  # id → dimension → indices that stay
        self._masks: dict[int, list[tuple[int, Tensor]]] = {}  # id → dimension and indices
        # What activations are to find zero: columns that they read, and all that makes them.
        self._reads: dict[Place, Tensor] = {}
        self._makes: dict[Place, Tensor] = {}
        self._masking: MaskedWeights | None = None
        self._dtypes: dict[int, torch.dtype] = {}  # where the model's code casts a module in a pass
        doubles: dict[int, Tensor] = {}
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = doubles.setdefault(id(buffer), self._wider(buffer))
            for key, value in vars(module).items():  # a constant that is no buffer
                if type(value) is Tensor:
                    vars(module)[key] = doubles.setdefault(id(value), self._wider(value))
            vars(module)["_parameters"] = _Table(module._parameters, self._lent)
            vars(module)["_apply"] = partial(self._cast, module)
        self._recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase)]

    def run(
        self, inputs: Arguments | Call, within: AbstractContextManager[object] | None = None
    ) -> object:
        """The output for these inputs in float64, in eval mode or in that of the call, made `within` a context.

        Raises:
            StructureError: The forward pass failed.
        """
        inputs = double(inputs) if self.in_float64 else inputs
        if not (self._reads or self._makes):
            return self._run(inputs, within)
        self._masking = masking = MaskedWeights(self._reads, self._makes, tuple(arguments(inputs)))
        try:
            output = self._run(inputs, within)
        finally:
            self._masking = None
        unmet = [
            (places, place)
            for places in (self._reads, self._makes)
            for place in places.keys() - masking.met
        ]
        if not unmet:
            return output
        # Read by no activation, but by other weights: zero where they are kept.
        for places, (key, dim) in unmet:
            self._masks.setdefault(key, []).append((dim, places.pop((key, dim))))
        return self.run(inputs, within)

    def _run(
        self, inputs: Arguments | Call, within: AbstractContextManager[object] | None
    ) -> object:
        with ExitStack() as stack:
            return forward_once(self.model, inputs, within=_both(self._passing(stack), within))

    @contextmanager
    def removed(self, choice: Choice, attributes: Mapping[Attribute, int]) -> Iterator[None]:
        """Inside, the model is without these units."""
        with self._kept():
            held = tensors(self.model)
            for name, dims in _by_tensor(choice).items():
                tensor = held[name]
                cuts = self._cuts.setdefault(id(tensor), {})
                for dim, lost in dims.items():
                    stays = [i for i in range(tensor.shape[dim]) if i not in lost]
                    cuts[dim] = torch.tensor(stays, device=tensor.device)
            self._edit_buffers()
            backs: list[Callable[[], None]] = []
            try:
                sync_attributes(self.model, attributes, backs.append)
                yield
            finally:
                for back in backs:
                    back()

    @contextmanager
    def masked(self, choice: Choice, roles: Collection[str] | None = None) -> Iterator[None]:
        """Inside, these units' slices with one of these roles are zero.

        Without roles: where a group is read by weights, these; else all of it.
        """
        with self._kept():
            held = tensors(self.model)
            for group, units in choice:
                read = "reads" in group.roles.values()
                these = (("reads",) if read else EVERY_ROLE) if roles is None else roles
                for part in group.all_slices(units):
                    if part.role in these:
                        tensor = held[part.tensor]
                        gone = torch.tensor(part.indices, device=tensor.device)
                        self._mask(tensor, part.dim, gone, part.role)
            self._edit_buffers()
            yield

    def _mask(self, tensor: Tensor, dim: int, gone: Tensor, role: str) -> None:
        if not isinstance(tensor, nn.Parameter):
            self._masks.setdefault(id(tensor), []).append((dim, gone))
            return
        places = self._reads if role == "reads" else self._makes
        known = places.get((id(tensor), dim))
        places[id(tensor), dim] = gone if known is None else torch.cat((known, gone))

    def difference_from_mask(
        self,
        inputs: Arguments | Call,
        choice: Choice,
        found: object,
        within: AbstractContextManager[object] | None = None,
        *,
        tolerance: float,
    ) -> float:
        """How far an output is from the masked model's, each run of which is `within` a context.

        Relative to the largest value. Masks of all roles count where those of the reading weights are not within
        `tolerance`.
        """
        with self.masked(choice):
            expected = self.run(inputs, within)
        difference = relative_difference(found, expected)
        if difference > tolerance and is_finite(expected):
            with self.masked(choice, EVERY_ROLE):
                difference = min(difference, relative_difference(found, self.run(inputs, within)))
        return difference

    def _lent(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not (self._awake or self._cuts):
            return tensor
        token = _lending.set(True)
        try:
            with unheard() if type(tensor) in _PLAIN else nullcontext():
                value = self._edited(tensor) if self._awake else self._outline(tensor)
                lent = nn.Parameter(value, requires_grad=False)  # some code asks for the type
                if self._awake and self._masking is not None:
                    self._masking.lent(id(tensor), lent)
                return lent
        finally:
            _lending.reset(token)

    def _edited(self, tensor: Tensor) -> Tensor:
        value = tensor.detach()
        for dim, stays in self._cuts.get(id(tensor), {}).items():
            value = value.index_select(dim, stays)
        value = self._wider(value)
        for dim, gone in self._masks.get(id(tensor), []):
            value = value.clone() if value.data_ptr() == tensor.data_ptr() else value
            value.index_fill_(dim, gone, 0)
        return value.to(self._dtypes.get(id(tensor), value.dtype))

    def _cast(
        self, module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> nn.Module:
        """What `module.to(…)` calls: weights are lent so from now on, to the end of the pass."""
        for child in module.children() if recurse else ():
            self._cast(child, change)
        for tensor in dict.values(module._parameters):
            if tensor is not None and tensor.is_floating_point():
                self._dtypes[id(tensor)] = change(self._lent(tensor)).dtype  # type: ignore[arg-type]
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else change(buffer)
        return module

    def _outline(self, tensor: Tensor) -> Tensor:
        """Between passes only sizes are asked for; parametrizations compute with what they find."""
        cuts = self._cuts.get(id(tensor), {})
        sizes = [len(cuts[d]) if d in cuts else n for d, n in enumerate(tensor.shape)]
        return self._wider(tensor.detach().new_ones(())).expand(sizes)

    def _wider(self, tensor: Tensor) -> Tensor:
        return wider(tensor) if self.in_float64 else tensor

    def _edit_buffers(self) -> None:
        edited: dict[int, Tensor] = {}
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and (id(buffer) in self._cuts or id(buffer) in self._masks):
                    value = edited.setdefault(id(buffer), self._edited(buffer))
                    module._buffers[key] = value

    @contextmanager
    def _passing(self, stack: ExitStack) -> Iterator[None]:
        """Weights are lent in float64; recurrent layers keep theirs in lists of their own."""
        self._awake, self._dtypes = True, {}
        try:
            for module in self._recurrent:
                listed = module._flat_weights, module._flat_weight_refs
                stack.callback(_put_lists, module, *listed)
                module._init_flat_weights()
            if self._masking is not None:
                stack.enter_context(self._masking)
            if self.in_float64:
                stack.enter_context(Float64Code())  # type: ignore[no-untyped-call]
            yield
        finally:
            self._awake = False
            stack.close()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Whatever is changed in the modules' own tables inside is put back."""
        with tables_kept(list(self.model.modules())):
            try:
                yield
            finally:
                self._cuts, self._masks, self._reads, self._makes = {}, {}, {}, {}


class _Table(dict[str, Any]):
    """A module's parameters, each lent when it is asked for."""

    def __init__(self, table: Mapping[str, Any], lend: Callable[[Any], Any]) -> None:
        super().__init__(table)
        self._lend = lend

    def __getitem__(self, key: str) -> Any:
        return self._lend(super().__getitem__(key))

    def get(self, key: str, default: Any = None) -> Any:
        return self._lend(super().get(key, default))

    def items(self) -> Any:
        return ((key, self[key]) for key in self)

    def values(self) -> Any:
        return (self[key] for key in self)


def _put_lists(module: Any, weights: list[Any], refs: list[Any]) -> None:
    module._flat_weights, module._flat_weight_refs = weights, refs


def _has_strays(model: nn.Module) -> bool:
    """Whether modules hold parameters elsewhere than where modules do: in lists or dicts of their own."""
    known = {id(p) for p in model.parameters()}

    def holds(value: object, depth: int = 0) -> bool:
        if isinstance(value, Tensor):
            return id(value) in known
        if depth > 2 or not isinstance(value, (list, tuple, dict)):
            return False
        parts: Iterable[object] = value.values() if isinstance(value, dict) else value
        return any(holds(part, depth + 1) for part in parts)

    own = ("_parameters", "_buffers", "_modules", "_flat_weights")
    return any(
        holds(value) for m in model.modules() for name, value in vars(m).items() if name not in own
    )


@contextmanager
def _both(
    outer: AbstractContextManager[Any], inner: AbstractContextManager[Any] | None
) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(outer)
        if inner is not None:
            stack.enter_context(inner)
        yield


def _by_tensor(choice: Choice) -> Mapping[str, dict[int, set[int]]]:
    """Tensor → dimension → indices that go."""
    gone: dict[str, dict[int, set[int]]] = {}
    for group, units in choice:
        for part in group.all_slices(units):
            gone.setdefault(part.tensor, {}).setdefault(part.dim, set()).update(part.indices)
    return gone


def relative_difference(found: object, expected: object) -> float:
    """Largest difference of any two output tensors, relative to the largest expected value; inf if not comparable."""
    a, b = tensors_in(found), tensors_in(expected)
    if [t.shape for t in a] != [t.shape for t in b] or not b:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not x.is_floating_point():
            worst = max(worst, float("inf") if not torch.equal(x, y) else 0.0)
        elif x.numel():
            scale = y.abs().max().clamp(min=torch.finfo(y.dtype).tiny)
            worst = max(worst, float(((x - y).abs().max() / scale).nan_to_num(torch.inf)))
    return worst


def is_finite(output: object) -> bool:
    """Whether all values of an output are."""
    return all(bool(t.isfinite().all()) for t in tensors_in(output) if t.is_floating_point())
