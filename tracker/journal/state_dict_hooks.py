"""A model's own `state_dict` carries the journal, and loading one replays it: so the ways of other frameworks work.

Without this library such a state dict has one unexpected key, and tensors of other shapes than the model's code makes.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracker.errors import CheckpointError
from tracker.journal.entries import Entry, Journal
from tracker.journal.replay import meta_model_after

KEY = "_tracker_journal"
RUN = "_tracker_run"
LARGEST = 2**28  # bytes of a journal


Replay = Callable[[Sequence[Entry], Tensor | None], None]


def carry(
    model: nn.Module,
    journal: Callable[[], Journal],
    run: Callable[[], Tensor | None],
    replay: Replay,
) -> None:
    """Put both hooks on a model, once.

    Args:
        model: Whose state dict is to carry them.
        journal: Of the model, now.
        run: Of the model, now, as bytes; None where there is none to carry.
        replay: Changes the model, and what knows it, by more entries, and takes in a run; all or nothing.
    """
    model.register_state_dict_post_hook(Saving(journal, run))
    model.register_load_state_dict_pre_hook(Loading(model, journal, replay))


class Saving:
    """Adds journal and run to a state dict; a model that was never changed has no journal."""

    def __init__(self, journal: Callable[[], Journal], run: Callable[[], Tensor | None]) -> None:
        self._journal, self._run = journal, run

    def __deepcopy__(self, memo: object) -> InertCallable:
        return InertCallable()

    def __reduce__(self) -> tuple[type[InertCallable], tuple[()]]:
        return InertCallable, ()

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
    ) -> None:
        """Hook of `state_dict`."""
        journal = self._journal()
        if len(journal):
            text = json.dumps(journal.to_dict()).encode()
            state[prefix + KEY] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        run = self._run()
        if run is not None:
            state[prefix + RUN] = run


class Loading:
    """Changes the model as the journal of a state dict says, before its tensors are loaded."""

    def __init__(self, model: nn.Module, journal: Callable[[], Journal], replay: Replay) -> None:
        self._model, self._journal, self._replay = weakref.ref(model), journal, replay

    def __deepcopy__(self, memo: object) -> InertCallable:
        return InertCallable()

    def __reduce__(self) -> tuple[type[InertCallable], tuple[()]]:
        return InertCallable, ()

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: object
    ) -> None:
        """Hook of `load_state_dict`.

        Raises:
            CheckpointError: The journal cannot be read or does not lead on from here; the model is as it was.
        """
        model = self._model()
        if model is None or not {prefix + KEY, prefix + RUN} & set(state):
            return
        run = state.pop(prefix + RUN, None)
        asked = read(state.pop(prefix + KEY)) if prefix + KEY in state else Journal()
        known = self._journal()
        if len(known) > len(asked) or asked.entries[: len(known)] != known.entries:
            raise CheckpointError(
                "This state dict is of a model that was changed in other ways. Load it into a freshly built one."
            )
        entries = asked.entries[len(known) :]
        if entries:
            held = sum(t.numel() for t in state.values() if isinstance(t, Tensor))
            _require_whole(meta_model_after(model, entries, held), state, prefix)
        if entries or run is not None:
            self._replay(entries, run)


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
            f"The state dict carries a journal, and {odd[0]!r} is only in one of the two, it and the model that the "
            f"journal leads to ({len(odd)} such names). To load a part of it, remove {prefix + KEY!r} first."
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
