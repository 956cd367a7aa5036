"""What a model's state dict carries of its session, and how the session follows when such a one is loaded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from tracker.checkpoint.carried_run import pack_run
from tracker.errors import CheckpointError
from tracker.journal.origin import LOAD_FRESH
from tracker.journal.state_dict_hooks import Found
from tracker.parts.session import Session
from tracker.tracker import ActivationTracker


class Replays(Protocol):
    """A part of an engine that changes a model as a journal says."""

    def replay(self, model: nn.Module, found: Found) -> None:
        """Do the changes again, on the model and in what is known of it."""


class CarriedSession:
    """A session, as the state dict of its model carries it. It keeps neither the engine nor the model alive.

    Args:
        recorder: Of the engine.
        session: Of the model.
    """

    def __init__(self, recorder: Replays, session: Session) -> None:
        self.journal = session.journal
        self._recorder, self._session = weakref.ref(recorder), weakref.ref(session)
        self._model = weakref.ref(session.entry.model())

    def run(self) -> Tensor | None:
        """The run, now, as bytes; None where there is none to carry."""
        session = self._session()
        if session is None or not session.carries_run or session.run is None:
            return None
        return pack_run(session)

    def before_changes(self) -> nn.Module:
        """A copy without values of the model as it was before its journal began.

        Raises:
            CheckpointError: How it was is not known.
        """
        session, model = self._session(), self._model()
        if session is None or model is None:
            raise CheckpointError(f"This model was changed, and its engine is gone. {LOAD_FRESH}")
        return session.origin.meta_model(model, self.journal.entries[0].before)

    def replay(self, found: Found) -> None:
        """Change the model, and what knows it; all or nothing.

        Args:
            found: In a state dict.

        Raises:
            CheckpointError: It does not fit what is tracked.
        """
        recorder, model = self._recorder(), self._model()
        assert model is not None
        if recorder is not None:
            recorder.replay(model, found)
            return
        # The engine is gone, and its ids with it: the model alone follows.
        self.journal.replay(model, found.entries)
        self.journal.entries += found.entries


def restore_layers(
    tracker: ActivationTracker,
    ids: Mapping[str, Sequence[int]],
    why: str,
    undo: Callable[[Callable[[], None]], None],
) -> None:
    """The current model has the layers of another time: give them the ids that they had then.

    What was observed of layers whose neurons change is forgotten.

    Args:
        tracker: Knows the model.
        ids: Of each layer that changed since, and of others.
        why: What is told of neurons that leave.
        undo: Told how to take it all back, before anything is written.
    """
    entry, registry = tracker.current, tracker.registry
    undo(registry.snapshot())

    def ids_of(layer: str, neurons: int) -> Sequence[int] | None:
        return ids[layer] if len(ids.get(layer, ())) == neurons else None

    tracker.sync_layers(why, undo, ids_of)
    points, layers = {point.name: point for point in entry.observer.points}, entry.layers
    changed = {n: own for n, own in ids.items() if n in layers and [*own] != layers[n].ids}
    before = [(points[n], points[n].neurons, points[n].windows) for n in changed]
    old_ids = {name: list(layers[name].ids) for name in changed}
    reads, structure, traced = entry.reads, entry.structure, entry.traced

    def back() -> None:
        entry.reads, entry.structure, entry.traced = reads, structure, traced
        for point, neurons, windows in before:
            point.neurons, point.windows = neurons, windows
        for name, old in old_ids.items():
            registry.restore(layers[name], old)
        entry.observer.version += 1

    undo(back)
    entry.reads, entry.structure, entry.traced = {}, None, False
    for name, own in changed.items():
        points[name].neurons, points[name].windows = len(own), {}
        registry.adopt(layers[name], own, why)
    entry.observer.version += 1
