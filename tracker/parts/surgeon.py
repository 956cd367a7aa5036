"""The changes: each draws a plan, and has it carried out. No arithmetic here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

from torch import Tensor

from tracker.analyzer import Analyzer
from tracker.errors import SurgeryError
from tracker.inputs.batches import Inputs, each
from tracker.inputs.calls import Arguments, arguments
from tracker.modules.names import ByLayer, LayerOrName, names_in
from tracker.observation.neuron_ids import layer_named
from tracker.parts.calibrator import Calibrator
from tracker.parts.changer import Changer, Neurons
from tracker.structure import Structure
from tracker.surgery import Receipt
from tracker.surgery.calibration.loss import Loss, Objective
from tracker.surgery.operations.depth import plan_insertion, plan_layer_removal
from tracker.surgery.operations.growth import gradient_directions, plan_expansion, plan_recycling
from tracker.surgery.operations.merge_pairs import default_pairs, require_tolerance
from tracker.surgery.operations.merging import plan_merge
from tracker.surgery.operations.removal import plan_pruning
from tracker.surgery.operations.uniform_widths import Key, plan_width, widths_to_equalize
from tracker.surgery.plan import Plan, units_of
from tracker.surgery.prices.protection import Protected, protection
from tracker.surgery.recommended_changes import requests
from tracker.surgery.transaction import refuse_inside_a_pass
from tracker.tracker import ActivationTracker


class Surgeon:
    """All calls that change a model: each draws a plan, and has it carried out.

    Args:
        tracker: Holds models, ids and structure.
        changer: Carries out changes.
        calibrator: Tells what changes are computed and priced from.
        analyzer: Tells the correlation from which on two neurons are redundant.
    """

    def __init__(
        self,
        tracker: ActivationTracker,
        changer: Changer,
        calibrator: Calibrator,
        analyzer: Analyzer,
    ) -> None:
        self._tracker = tracker
        self._changer = changer
        self._calibrator = calibrator
        self._analyzer = analyzer

    @property
    def structure(self) -> Structure:
        """What of the current model lives and dies together; see `Changer.structure`."""
        return self._changer.structure

    @property
    def correlation_threshold(self) -> float:
        """|Pearson correlation| from which on two neurons are redundant."""
        return self._analyzer.correlation_threshold

    def undo(self) -> Receipt:
        """Take the current model's last change back; see `Changer.undo`."""
        return self._changer.undo()

    def prune_units(
        self,
        units: ByLayer[Sequence[int]],
        compensate: bool = False,
        *,
        protect: Protected = (),
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
        inputs: Inputs | None = None,
        progress: bool | None = None,
        dry_run: bool = False,
        verify: bool = True,
    ) -> Receipt:
        """Remove units in place: {group name: unit indices}, groups as in `structure`. See docs/surgery.md.

        Args:
            units: What goes.
            compensate: The consumers take over what the other units explain of those that go, in least squares over
                what was observed: by `calibrate`, else in a window with correlation, else on the example inputs. Else
                they see zero in their place.
            protect: What stays though it is among them, told in the receipt's `skipped`: names or patterns
                ("encoder.*") of layers, modules or groups, and neuron ids; or {name or pattern: share of the units that
                stays}. A name that matches nothing is an error.
            batches: Calibration data, as for `calibrate`, of which each fourth is held back to measure the loss on;
                without them, what was observed before.
            loss: As for `calibrate`, of `batches`.
            inputs: As for `calibrate`, of `batches`.
            progress: Whether a bar is shown; None: on terminals and in notebooks.
            dry_run: Only tell what would happen.
            verify: Compare with what is promised, on a copy in float64 and after the change.

        Raises:
            SurgeryError: Refused, nothing was touched; the message says what stands in the way.
            VerificationError: The result would not have been (or was not) as promised; everything is as before.

        Examples:
            >>> [group.name for group in engine.structure.groups]
            ['0', '2']
            >>> engine.prune_units({"0": [1, 2]}).promise  # as if the consumers read zero in their place
            'masked'
        """
        with self._calibrator.calibrating(dry_run=dry_run):
            if batches is not None:
                self._calibrator.calibrate_by(batches, loss, inputs, progress)
            new = batches is not None
            named = names_in(self._tracker.current.model, units)
            return self._prune(lambda: named, compensate, protect, new, dry_run, verify)

    def _prune(
        self,
        asked: Callable[[], Mapping[str, Sequence[int]]],
        compensate: bool,
        protect: Protected,
        measured: bool,
        dry_run: bool,
        verify: bool,
    ) -> Receipt:
        skipped: list[str] = []

        def plan() -> tuple[Plan, list[str]]:
            protected = protection(self._tracker, protect)
            units, skipped[:] = protected.allowed(self.structure, asked())
            drawn = plan_pruning(self._tracker, units, compensate)
            return self._calibrator.measured(*drawn) if measured else drawn

        return self._changer.change(plan, dry_run=dry_run, verify=verify, skipped=skipped)

    def prune_neurons(
        self,
        neurons: Neurons,
        compensate: bool = True,
        *,
        protect: Protected = (),
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
        inputs: Inputs | None = None,
        progress: bool | None = None,
        dry_run: bool = False,
        verify: bool = True,
    ) -> Receipt:
        """Remove neurons in place: ids, or {layer name: [ids or local indices]}. Arguments as for `prune_units`.

        In such a mapping ids are those that an engine's call returned; plain ints are local indices.

        Args:
            neurons: Ids, or {layer name: [local indices]}.
            compensate: Whether the others take over what they can of those that go, as for `prune_units`.
            protect: What stays, as for `prune_units`.
            batches: Calibration data, as for `calibrate`; without them, what was observed before.
            loss: As for `calibrate`, of `batches`.
            inputs: As for `calibrate`, of `batches`.
            progress: Whether a bar is shown; None: on terminals and in notebooks.
            dry_run: Only tell what would happen; nothing is touched.
            verify: Compare with what is promised, on a copy in float64 and after the change.

        Raises:
            UnknownNeuronError: No neuron has such an id.
            SurgeryError: Refused, nothing was touched; the message says what stands in the way.

        Examples:
            >>> engine.calibrate(x.split(16)) > 0
            True
            >>> receipt = engine.prune_neurons([1, 2, 9])  # ids, or {"0": [1, 2], "2": [1]}; the others take over
            >>> model[0].out_features, model[2].out_features
            (6, 5)
        """

        def units() -> Mapping[str, Sequence[int]]:
            return units_of(self.structure, self._changer.places(neurons))

        with self._calibrator.calibrating(dry_run=dry_run):
            if batches is not None:
                self._calibrator.calibrate_by(batches, loss, inputs, progress)
            new = batches is not None
            return self._prune(units, compensate, protect, new, dry_run, verify)

    def merge_neurons(
        self,
        pairs: Iterable[tuple[int, int]] | None = None,
        *,
        tolerance: float = 1e-3,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
        inputs: Inputs | None = None,
        progress: bool | None = None,
        dry_run: bool = False,
        verify: bool = True,
    ) -> Receipt:
        """Fold neurons into others: [(keep id, drop id), ...], each by the affine map that fits best.

        The receipt tells the loss before and after, on calibration data that were held back: each fourth batch of
        `batches` (after `calibrate`, they are of those that it saw).

        Args:
            pairs: None for those that correlate by the engine's `correlation_threshold` or more, no neuron in two of
                them, in each group those first that cost its consumers least. Call `calibrate` before.
            tolerance: Of such pairs, the relative squared error of what a group's consumers compute (what their output
                varies by, predicted) up to which they are folded.
            batches: Calibration data, as for `calibrate`; without them, what was observed before.
            loss: As for `calibrate`, of `batches`.
            inputs: As for `calibrate`, of `batches`.
            progress: Whether a bar is shown; None: on terminals and in notebooks.
            dry_run: Only tell what would happen.
            verify: Compare with what is promised, on a copy in float64 and after the change.

        Raises:
            UnknownNeuronError: No neuron has such an id.
            SurgeryError: Refused, nothing was touched; the message says what stands in the way.

        Examples:
            >>> receipt = engine.merge_neurons([(0, 1)])  # the neuron that stays, and the one that it takes in
            >>> receipt.removed_ids
            [1]
        """
        require_tolerance(tolerance)

        def plan() -> tuple[Plan, list[str]]:
            if pairs is None:
                chosen = default_pairs(self._tracker, self.correlation_threshold, tolerance)
                return self._calibrator.measured(*plan_merge(self._tracker, chosen))
            try:
                asked = [(keep, drop) for keep, drop in pairs]
            except (TypeError, ValueError) as error:
                raise SurgeryError(
                    f"Pairs are [(keep id, drop id), ...], not {pairs!r}."
                ) from error
            places = self._changer.places([n for pair in asked for n in pair])
            named = list(zip(places[::2], places[1::2], strict=True))
            return self._calibrator.measured(*plan_merge(self._tracker, named))

        with self._calibrator.calibrating(dry_run=dry_run):
            if batches is not None:
                self._calibrator.calibrate_by(batches, loss, inputs, progress)
            return self._changer.change(plan, dry_run=dry_run, verify=verify)

    def expand_layer(
        self,
        layer_name: LayerOrName,
        count: int,
        *,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
        inputs: Inputs | None = None,
        directions: Tensor | None = None,
        seed: int = 0,
        progress: bool | None = None,
        dry_run: bool = False,
        verify: bool = True,
    ) -> Receipt:
        """Add neurons to a layer; the model's function stays. Their ids are in the receipt's `added_ids`.

        They are read with weights of zero at first. Their own weights are random directions or, where `batches` and
        `loss` are given (as for `calibrate`), those by which the loss falls fastest; or `directions` that are given,
        (1 or more, incoming features), best first.

        Args:
            layer_name: The layer that becomes wider, or its name.
            count: New neurons.
            batches: Calibration data, as for `calibrate`; without them, what was observed before.
            loss: As for `calibrate`, of `batches`.
            inputs: As for `calibrate`, of `batches`.
            directions: (new neurons, inputs): what the new ones look for; None: where the loss falls fastest, if
                `calibrate` took gradients, else random.
            seed: Of the random numbers: the same seed gives the same weights.
            progress: Whether a bar is shown; None: on terminals and in notebooks.
            dry_run: Only tell what would happen; nothing is touched.
            verify: Compare with what is promised, on a copy in float64 and after the change.

        Raises:
            SurgeryError: Refused, nothing was touched; the message says what stands in the way.

        Examples:
            >>> before = model(x)
            >>> receipt = engine.expand_layer("0", 4)
            >>> receipt.added_ids, torch.allclose(model(x), before, atol=1e-6)
            ([17, 18, 19, 20], True)
        """
        name = names_in(self._tracker.current.model, layer_name)

        def plan() -> tuple[Plan, list[str]]:
            layer_named(list(self._tracker.current.layers), name)
            best, notes = directions, list[str]()
            if batches is not None and loss is not None:
                reader = self._calibrator.reader(inputs, loss=loss)
                some = map(reader.read, each(reader, batches, "Gradients", progress))
                best = gradient_directions(self._tracker, name, some, Objective(loss))
                notes = reader.notes()
            elif batches is not None:
                notes = ["without a loss, `batches` say nothing of where new neurons should look"]
            return plan_expansion(self._tracker, name, count, best, seed), notes

        return self._changer.change(plan, dry_run=dry_run, verify=verify)

    def expand_layers(
        self,
        counts: ByLayer[int],
        *,
        directions: ByLayer[Tensor] | None = None,
        seed: int = 0,
        dry_run: bool = False,
        verify: bool = True,
    ) -> Receipt:
        """Add neurons to several layers ({layer name: count}) as one change; see `expand_layer`.

        Args:
            counts: {layer, or its name: new neurons}.
            directions: By layer, as for `expand_layer`.
            seed: Of the random numbers: the same seed gives the same weights.
            dry_run: Only tell what would happen; nothing is touched.
            verify: Compare with what is promised, on a copy in float64 and after the change.

        Raises:
            SurgeryError: None of them can grow. Of several, those that can do; the receipt's `skipped` has the others.

        Examples:
            >>> receipt = engine.expand_layers({"0": 4, "2": 2})
            >>> engine.get_summary()["layers"]
            {'0': 12, '2': 8, '4': 3}
        """
        wanted: Mapping[str, int] = names_in(self._tracker.current.model, counts)
        best: Mapping[str, Tensor] = names_in(self._tracker.current.model, directions or {})
        names = list(wanted)
        if other := sorted(best.keys() - wanted.keys()):
            raise SurgeryError(f"Directions are given for {other[0]!r}, which is not to grow.")
        if best:  # from the last: what one layer reads must not grow before it does
            order = list(self._tracker.current.layers)
            names.sort(key=lambda n: -order.index(n) if n in order else 0)
        steps = [
            partial(
                self.expand_layer, n, wanted[n], directions=best.get(n), seed=seed, verify=verify
            )
            for n in names
        ]
        return self._changer.change_all("expand_layer", steps, [], dry_run=dry_run)

    def uniform_widths(
        self, *, shrink: bool = False, seed: int = 0, dry_run: bool = False, verify: bool = True
    ) -> Receipt | None:
        """Make groups of one kind in repeated blocks (the MLPs of all decoder layers, say) equally wide, as one change.

        All become as wide as the widest, by units that nothing reads yet: the model's function stays. With `shrink`
        as narrow as the narrowest, what matters least going and the consumers taking over. Of one kind are groups whose
        tensors have the same names but for numbers, and the same shapes but for the units.

        Args:
            shrink: Down to the narrowest of a kind, instead of up to the widest.
            seed: Of the random numbers: the same seed gives the same weights.
            dry_run: Only tell what would happen; nothing is touched.
            verify: Compare with what is promised, on a copy in float64 and after the change.

        Returns:
            None where they are equally wide already.

        Raises:
            SurgeryError: One of them cannot change, nothing was touched; the message says which, and why.

        Examples:
            >>> engine.uniform_widths() is None  # no two layers are of a kind
            True
        """
        with self._changer.together("uniform_widths"):
            refuse_inside_a_pass(self._tracker)
            wanted = widths_to_equalize(
                self.structure, self._tracker.current.model(), widest=not shrink
            )
        return self.to_widths(wanted, "uniform_widths", seed=seed, dry_run=dry_run, verify=verify)

    def to_widths(
        self,
        wanted: Mapping[Key, int],
        what: str,
        *,
        seed: int = 0,
        dry_run: bool = False,
        verify: bool = True,
    ) -> Receipt | None:
        """Give groups these widths, all or none."""
        if not wanted:
            return None

        steps = [
            partial(
                self._changer.change,
                partial(plan_width, self._tracker, key, units, seed),
                dry_run=False,
                verify=verify,
            )
            for key, units in wanted.items()
        ]
        return self._changer.change_all(what, steps, [], dry_run=dry_run, each=True)

    def recycle_neurons(
        self,
        neurons: Neurons = (),
        *,
        seed: int = 0,
        dry_run: bool = False,
        verify: bool = True,
        neuron_ids: Neurons | None = None,
    ) -> Receipt:
        """Give neurons a new start in their places: fresh weights, read with zero; others take over what they did.

        The function stays where they are dead or constant. The new neurons have new ids. `neuron_ids` is the former
        name of `neurons`.

        Args:
            neurons: Ids, or {layer name: [local indices]}; none: the dead ones.
            seed: Of the random numbers: the same seed gives the same weights.
            dry_run: Only tell what would happen; nothing is touched.
            verify: Compare with what is promised, on a copy in float64 and after the change.
            neuron_ids: Older name of `neurons`.

        Raises:
            UnknownNeuronError: No neuron has such an id.
            SurgeryError: Refused, nothing was touched; the message says what stands in the way.

        Examples:
            >>> receipt = engine.recycle_neurons({"0": [5]})  # a new start in the same place, under a new id
            >>> receipt.removed_ids, receipt.added_ids
            ([5], [17])
        """

        def plan() -> tuple[Plan, list[str]]:
            units = units_of(
                self.structure, self._changer.places(neurons if neuron_ids is None else neuron_ids)
            )
            return plan_recycling(self._tracker, units, seed)

        return self._changer.change(plan, dry_run=dry_run, verify=verify)

    def insert_layer(
        self, after: LayerOrName, *, dry_run: bool = False, verify: bool = True
    ) -> Receipt:
        """Insert a layer of the same width behind the layer `after`; the model's function stays.

        The identity where a ReLU reads the layer, a residual block of zero output elsewhere. Behind a residual block
        (of a transformer, say) a copy of it, whose last layers are zero: it passes on what it is given until it
        learns (Wu et al., 2024, LLaMA Pro, 3.2). It is a child of `after`, named "inserted".

        Args:
            after: The layer or block that it stands behind, or its name.
            dry_run: Only tell what would happen; nothing is touched.
            verify: Compare with what is promised, on a copy in float64 and after the change.

        Raises:
            SurgeryError: Refused, nothing was touched; the message says what stands in the way.

        Examples:
            >>> receipt = engine.insert_layer(after="0")
            >>> model[0].inserted
            ReluIdentity(
              (linear): Linear(in_features=8, out_features=8, bias=True)
            )
        """
        name = names_in(self._tracker.current.model, after)
        return self._changer.change(
            lambda: (plan_insertion(self._tracker, name), []), dry_run=dry_run, verify=verify
        )

    def remove_layer(
        self,
        layer_name: LayerOrName,
        *,
        batches: Iterable[Any] | None = None,
        inputs: Inputs | None = None,
        force: bool = False,
        progress: bool | None = None,
        dry_run: bool = False,
        verify: bool = True,
    ) -> Receipt:
        """Remove a hidden layer of a chain, a residual block, or an activation; what is left is refitted.

        The least-squares fit is over `batches` (as for `calibrate`), by default the example inputs. The receipt's
        notes tell how much of what the layer did is explained, on every fourth batch (of few: sample), which the fit
        that is judged did not see; too little is refused, unless forced. What reads an activation is refitted where
        only linear layers do; else the multiple of its input plus a constant that comes nearest stands in its place.

        Args:
            layer_name: The layer or block that goes, or its name.
            batches: Calibration data, as for `calibrate`; without them, what was observed before.
            inputs: As for `calibrate`, of `batches`.
            force: Also where the outputs change much.
            progress: Whether a bar is shown; None: on terminals and in notebooks.
            dry_run: Only tell what would happen; nothing is touched.
            verify: Compare with what is promised, on a copy in float64 and after the change.

        Raises:
            SurgeryError: Refused, nothing was touched; the message says what stands in the way.

        Examples:
            >>> receipt = engine.remove_layer("2", force=True)
            >>> model[2]
            Bypass()
        """
        observer, name = (
            self._tracker.current.observer,
            names_in(self._tracker.current.model, layer_name),
        )

        def plan() -> tuple[Plan, list[str]]:
            if observer.inputs is None:
                _ = self.structure  # tells what is missing
            assert observer.inputs is not None
            reader = self._calibrator.reader(inputs)
            calls = [Arguments(*observer.inputs)]
            if batches is not None:
                some = each(reader, batches, "Refitting", progress)
                calls = [arguments(reader.read(batch).call) for batch in some]
            plan, notes = plan_layer_removal(self._tracker, name, calls, force)
            return self._calibrator.measured(plan, [*notes, *reader.notes()])

        return self._changer.change(plan, dry_run=dry_run, verify=verify)

    def apply_recommendations(
        self,
        recommendations: Mapping[str, Any] | str | PathLike[str],
        *,
        dry_run: bool = False,
        verify: bool = True,
    ) -> Receipt:
        """Do what recommendations say, as one change: merge, then prune, then expand.

        They are a dict as `generate_optimization_recommendations` returns, or the path of its JSON file. What cannot be
        done is in the receipt's `skipped`, with the reason.

        Args:
            recommendations: The dict, or the path of its JSON file.
            dry_run: Only tell what would happen; nothing is touched.
            verify: Compare with what is promised, on a copy in float64 and after the change.

        Raises:
            SurgeryError: They are no recommendations or for another model, or nothing of them can be done; nothing was
                touched.

        Examples:
            >>> advice = engine.generate_optimization_recommendations(pruning_threshold=0.3)
            >>> receipt = engine.apply_recommendations(advice, dry_run=True)
            >>> len(receipt.removed_ids) > 0
            True
        """
        with self._changer.together("apply_recommendations"):
            refuse_inside_a_pass(self._tracker)
            asked = requests(self._tracker, recommendations)
        steps: list[Callable[[], Receipt]] = []
        if asked.merge:
            steps.append(lambda: self.merge_neurons(asked.merge, verify=verify))
        if asked.prune:
            steps.append(lambda: self.prune_neurons(asked.prune, verify=verify))
        for layer, count in asked.expand.items():
            steps.append(lambda n=layer, c=count: self.expand_layer(n, c, verify=verify))  # type: ignore[misc]
        return self._changer.change_all(
            "apply_recommendations",
            steps,
            asked.skipped,
            dry_run=dry_run,
            measuring=self._calibrator.measuring,
        )
