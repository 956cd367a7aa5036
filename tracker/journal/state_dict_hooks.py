"""A model's own `state_dict` carries the journal, and loading one replays it: so the ways of other frameworks work.

Without this library such a state dict has one unexpected key, and tensors of other shapes than the model's code makes.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tracker.errors import CheckpointError
from tracker.journal.entries import Entry, Journal
from tracker.journal.replay import meta_model_after, persistent_tensors
from tracker.structure.code_sizes.attributes import tensors
from tracker.utils.safetensors_tables import bytes_of, table_of

KEY = "_tracker_journal"
RUN = "_tracker_run"
BUFFERS = "_tracker_buffers"
CARRIED = KEY, RUN, BUFFERS
CHANGES = "tracker_changes"  # in the metadata, which not every copy of a state dict keeps
LARGEST = 2**28  # bytes of a journal


class Carrier(Protocol):
    """What knows a model whose state dict carries its journal."""

    @property
    def journal(self) -> Journal:
        """Of the model, now."""

    def run(self) -> Tensor | None:
        """The run, now, as bytes; None where there is none to carry."""

    def before_changes(self) -> nn.Module:
        """A copy without values of the model as it was before its journal began.

        Raises:
            CheckpointError: How it was is not known.
        """

    def replay(self, found: Found) -> None:
        """Change the model, and what knows it; all or nothing."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a state dict carries.

    Attributes:
        entries: Changes that are to be made.
        back: Whether they begin at what the model was at first, and not at what it is.
        run: As bytes; None: none.
        buffers: Contents of buffers that are in no state dict.
    """

    entries: Sequence[Entry]
    back: bool
    run: Tensor | None
    buffers: Mapping[str, Tensor]


def carry(model: nn.Module, carrier: Carrier) -> None:
    """Put both hooks on a model, once.

    Args:
        model: Whose state dict is to carry its journal.
        carrier: Knows it.
    """
    model.register_state_dict_post_hook(Saving(carrier))
    model.register_load_state_dict_pre_hook(Loading(model, carrier))


class Saving:
    """Adds journal and run to a state dict; a model that was never changed has no journal."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier

    def __deepcopy__(self, memo: object) -> InertCallable:
        return InertCallable()

    def __reduce__(self) -> tuple[type[InertCallable], tuple[()]]:
        return InertCallable, ()

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        """Hook of `state_dict`."""
        journal = self._carrier.journal
        metadata[CHANGES] = len(journal)
        if len(journal):
            state[prefix + KEY] = _bytes(json.dumps(journal.to_dict()).encode())
            kept, held = persistent_tensors(module), tensors(module)
            moved = held.keys() & {n for entry in journal for n in entry.slots} - kept.keys()
            if moved:
                table = {name: held[name] for name in sorted(moved)}
                state[prefix + BUFFERS] = _bytes(b"".join(bytes_of(table)))
        run = self._carrier.run()
        if run is not None:
            state[prefix + RUN] = run


class Loading:
    """Changes the model as the journal of a state dict says, before its tensors are loaded."""

    def __init__(self, model: nn.Module, carrier: Carrier) -> None:
        self._model, self._carrier = weakref.ref(model), carrier

    def __deepcopy__(self, memo: object) -> InertCallable:
        return InertCallable()

    def __reduce__(self) -> tuple[type[InertCallable], tuple[()]]:
        return InertCallable, ()

    def __call__(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: Mapping[str, Any],
        *rest: object,
    ) -> None:
        """Hook of `load_state_dict`.

        Raises:
            CheckpointError: The journal cannot be read, or the model cannot become what it leads to; the model is as it
                was.
        """
        model = self._model()
        if model is None:
            return
        known = self._carrier.journal.entries
        told = prefix + RUN in state or prefix + KEY in state
        differs = bool(known) and _differs(model, state, prefix)
        marked = bool(known) and metadata.get(CHANGES) == 0
        if not (told or differs or marked):
            return
        run, packed = state.pop(prefix + RUN, None), state.pop(prefix + BUFFERS, None)
        entries = read(state.pop(prefix + KEY)).entries if prefix + KEY in state else []
        back = entries[: len(known)] != known
        more = entries if back else entries[len(known) :]
        buffers: dict[str, Tensor] = {}
        try:
            if more or back:
                begin = self._carrier.before_changes() if back else model
                held = sum(t.numel() for t in state.values() if isinstance(t, Tensor))
                meta_model = meta_model_after(begin, more, held)
                _require_whole(meta_model, state, prefix)
                buffers = _buffers(packed, meta_model, more)
        except CheckpointError as error:
            if told:
                raise
            _refuse_misfits(model, state, prefix, str(error))
            return  # it may be a part of a state dict that fits
        if more or back or run is not None:
            self._carrier.replay(Found(more, back, run, buffers))


def _differs(model: nn.Module, state: Mapping[str, Any], prefix: str) -> bool:
    """Whether a state dict has tensors of other names or shapes than the model."""
    own = {prefix + name: tensor.shape for name, tensor in persistent_tensors(model).items()}
    return any(
        name not in own or (isinstance(value, Tensor) and value.shape != own[name])
        for name, value in state.items()
        if name.startswith(prefix)
    )


def _refuse_misfits(
    model: nn.Module, state: Mapping[str, Any], prefix: str, why_not_first: str
) -> None:
    """Refuse shapes that torch would refuse only once it has copied the other tensors.

    Raises:
        CheckpointError: There are such.
    """
    for name, tensor in persistent_tensors(model).items():
        value = state.get(prefix + name)
        if isinstance(value, Tensor) and value.shape != tensor.shape:
            raise CheckpointError(
                f"The state dict carries no journal. Its {name} is {tuple(value.shape)}, that of the model, which was "
                f"changed, is {tuple(tensor.shape)}. Nor can it be loaded as one of before the changes: {why_not_first}"
            )


def _buffers(packed: Any, meta_model: nn.Module, entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Contents of buffers that no state dict has, and that changes moved.

    Raises:
        CheckpointError: They do not fit the changed model, or are needed and not there.
    """
    kept = persistent_tensors(meta_model)
    held = {name: t for name, t in tensors(meta_model).items() if name not in kept}
    try:
        found = {} if packed is None else table_of(bytearray(packed.cpu().numpy().tobytes()))
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{BUFFERS} of the state dict are no tensors: {error}") from error
    for name, value in found.items():
        if name not in held or (value.shape, value.dtype) != (held[name].shape, held[name].dtype):
            raise CheckpointError(
                f"{BUFFERS} of the state dict hold {name!r}, which does not fit the model."
            )
    born = {
        name
        for entry in entries
        for name, dims in entry.slots.items()
        if any(None in runs.slots().source for runs in dims.values())
    }
    for name in sorted((born & held.keys()) - found.keys()):
        raise CheckpointError(
            f"{name} is a buffer that no state dict holds, it grew, and this state dict was saved without its content. "
            "Save it once more with this version, or use save_checkpoint."
        )
    return found


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _require_whole(meta_model: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """All that the changed model has is there and fits, and nothing else: what follows only copies."""
    wanted = meta_model.state_dict(keep_vars=True)
    given = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    there = {id(wanted[name]) for name in given if name in wanted}
    # Of tied weights some frameworks save one.
    given |= {name for name, tensor in wanted.items() if id(tensor) in there}
    odd = sorted(given ^ set(wanted))
    if odd:
        raise CheckpointError(
            f"{odd[0]!r} is only in one of the two, the state dict and the model that its journal leads to "
            f"({len(odd)} such names). To load a part of it, remove {prefix + KEY!r} first."
        )
    for name, tensor in wanted.items():
        saved = state.get(prefix + name)
        if not isinstance(tensor, Tensor) or prefix + name not in state:
            continue  # an extra state, or a tied weight
        if not isinstance(saved, Tensor) or saved.layout is not torch.strided or saved.is_meta:
            raise CheckpointError(f"The state dict's {name} is no tensor with values.")
        if saved.shape != tensor.shape:
            raise CheckpointError(
                f"The state dict's {name} is {tuple(saved.shape)}, and {tuple(tensor.shape)} by its journal."
            )


class InertCallable:
    """What the hooks become when their model is copied: nothing."""

    _from_public_api = True  # torch then asks for no return value

    def __call__(self, *args: object) -> None:
        """Do nothing."""


def read(table: Any) -> Journal:
    """The journal of a tensor of bytes.

    Raises:
        CheckpointError: It is none.
    """
    if not isinstance(table, Tensor) or table.dtype != torch.uint8 or table.ndim != 1:
        raise CheckpointError(f"{KEY} of the state dict is no journal.")
    if table.numel() > LARGEST:
        raise CheckpointError(f"{KEY} of the state dict is larger than {LARGEST} bytes.")
    try:
        return Journal.from_dict(json.loads(bytes(table.cpu().numpy())))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{KEY} of the state dict is no journal: {error}") from error


def weights_of(model: nn.Module) -> dict[str, Any]:
    """Its state dict without what it carries for this library, as other libraries take it."""
    state = model.state_dict()
    return {name: value for name, value in state.items() if name.rpartition(".")[2] not in CARRIED}
