"""The facade: an engine composes the parts, and each of its calls is one of theirs."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from tracker.analysis.epoch_history import TrainingHistory
from tracker.analyzer import Analyzer
from tracker.checkpoint.recorder import PathLike, Recorder, load_engine
from tracker.errors import CheckpointError, StatisticsError, SurgeryError, UnknownNeuronError
from tracker.journal import Journal
from tracker.parts.attachments import Attachments
from tracker.parts.calibrator import Calibrator
from tracker.parts.changer import Changer
from tracker.parts.compressor import Compressor
from tracker.parts.sessions import Sessions
from tracker.parts.surgeon import Surgeon
from tracker.parts.watcher import Watcher
from tracker.reporter import Reporter
from tracker.structure import Structure
from tracker.surgery.prices.predictions import add_predictions
from tracker.surgery.transaction import count
from tracker.tracker import ActivationTracker
from tracker.training import Decision
from tracker.training.trainer import Trainer
from tracker.utils.argument_checks import checked
from tracker.utils.delegation import call
from tracker.utils.notebook import as_html
from tracker.utils.text import short

if TYPE_CHECKING:
    from typing_extensions import Self
# Calls of the recorder that speak of what was observed.
HISTORY = (
    "log_epoch_statistics",
    "save_training_history",
    "load_training_history",
    "get_neuron_evolution",
)


def _public(*parts: type) -> list[str]:
    """Names of the calls that these parts answer."""
    return [name for part in parts for name in vars(part) if not name.startswith("_")]


@checked(
    SurgeryError,
    itself=(
        "model",
        "loss",
        "policy",
        "epoch",
        "train_loss",
        "train_acc",
        "passes",
        "neurons",
        "neuron_ids",
        "pairs",
        "tolerance",
        "count",
        "keep",
        "batches",
        "protect",
        "floor",
        "round_to",
        "assume_unread",
    ),
    **dict.fromkeys(_public(Watcher, Analyzer, Reporter), StatisticsError),
    **dict.fromkeys(HISTORY, StatisticsError),
    __init__=StatisticsError,
    neuron_id=UnknownNeuronError,
    save_checkpoint=CheckpointError,
    load_checkpoint=CheckpointError,
)
class NeuronEngine:
    """Watches every neuron of a model, tells which ones matter, and removes them in place.

    Calls speak of the current model: the last one that was tracked, or whose hooks were registered. Calls that begin
    with `print_`, and the two reports `generate_neuron_report` and `generate_pruning_recommendations`, print; all
    others are silent and return records.

    Each call below names the part that answers it: what it does is written there.

    Args:
        activation_threshold: A neuron fires where |activation| is larger.
        correlation_threshold: |Pearson correlation| from which on two neurons are redundant.
        observe: "reads": a neuron is observed where its consumers read it, behind its nonlinearity (where structure
            cannot tell, at its layer's output); "output": each layer's own output.

    Raises:
        StatisticsError: One of them is out of its range.

    Examples:
        Those of the calls go on from here.

        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> engine = NeuronEngine()
        >>> engine.track_model(model, "small", example_inputs=x[:8])["2"]
        [8, 9, 10, 11, 12, 13]
        >>> engine.attach_optimizer(optimizer)
        >>> engine.start_tracking(enable_correlation_analysis=True)
        >>> _ = model(x)
        >>> engine.stop_tracking()
        >>> engine
        NeuronEngine: 'small', a Sequential of 115 parameters; 17 neurons in 3 layers; 64 samples observed; 0 changes
    """

    def __init__(
        self,
        activation_threshold: float = 0.01,
        correlation_threshold: float = 0.9,
        *,
        observe: str = "reads",
    ) -> None:
        self.tracker = ActivationTracker(activation_threshold, observe)
        self.sessions = Sessions(self.tracker, activation_threshold)
        self.analyzer = Analyzer(self.tracker, correlation_threshold)
        self.watcher = Watcher(self.tracker, self.sessions, self.analyzer)
        self.reporter = Reporter(
            self.analyzer, self.sessions, partial(add_predictions, self.tracker)
        )
        self.attachments = Attachments(self.tracker, self.sessions)
        self.changer = Changer(self.tracker, self.sessions)
        self.calibrator = Calibrator(self.tracker, self.sessions, self.changer)
        self.compressor = Compressor(self.tracker, self.sessions, self.changer, self.calibrator)
        self.surgeon = Surgeon(self.tracker, self.changer, self.calibrator, self.analyzer)
        self.trainer = Trainer(self.tracker, self.sessions, self.surgeon)
        self.recorder = Recorder(self.tracker, self.sessions, self.analyzer)

    def __repr__(self) -> str:
        session = self.sessions.present
        model = None if session is None else session.entry.observer.model()
        if session is None or model is None:
            return "NeuronEngine: no model is tracked"
        layers = session.entry.layers
        neurons = sum(len(layer.ids) for layer in layers.values())
        changes = len(session.journal)
        return (
            f"NeuronEngine: {short(session.entry.name)!r}, a {type(model).__name__} of {count(model):,} parameters; "
            f"{neurons:,} neurons in {len(layers)} layers; "
            f"{sum(session.entry.observer.samples.values()):,} samples observed; {changes} change{'s' * (changes != 1)}"
        )

    def _repr_html_(self) -> str:
        """What notebooks show: what is tracked, and the layers with their neurons."""
        session = self.sessions.present
        if session is None or session.entry.observer.model() is None:
            return as_html(repr(self))
        layers = session.entry.layers.items()
        rows = [f"  {short(name, 40):<40} {len(layer.ids):>9,}" for name, layer in layers]
        more = [f"  and {len(rows) - 20:,} layers more"] if len(rows) > 20 else []
        return as_html("\n".join([repr(self), *rows[:20], *more]))

    @property
    def activation_threshold(self) -> float:
        """A neuron fires where |activation| is larger. What was counted cannot be counted anew: fixed for life.

        Examples:
            >>> engine.activation_threshold
            0.01
        """
        return self.tracker.threshold

    @property
    def correlation_threshold(self) -> float:
        """|Pearson correlation| from which on two neurons are redundant, in (0, 1].

        Examples:
            >>> engine.correlation_threshold = 0.95
        """
        return self.analyzer.correlation_threshold

    @correlation_threshold.setter
    def correlation_threshold(self, threshold: float) -> None:
        self.analyzer.correlation_threshold = threshold

    # Observe

    track_model = call("watcher", Watcher.track_model)
    get_neuron_info = call("watcher", Watcher.get_neuron_info)
    get_summary = call("watcher", Watcher.get_summary)
    register_activation_hooks = call("watcher", Watcher.register_activation_hooks)
    clear_hooks = call("watcher", Watcher.clear_hooks)
    start_tracking = call("watcher", Watcher.start_tracking)
    stop_tracking = call("watcher", Watcher.stop_tracking)
    padding_mask = call("watcher", Watcher.padding_mask)

    # Analyse

    get_neuron_stats = call("analyzer", Analyzer.get_neuron_stats)
    get_dataset_statistics = call("analyzer", Analyzer.get_dataset_statistics)
    get_layer_summary = call("analyzer", Analyzer.get_layer_summary)
    get_dead_neurons = call("analyzer", Analyzer.get_dead_neurons)
    find_redundant_neurons = call("analyzer", Analyzer.find_redundant_neurons)
    get_redundancy_summary = call("analyzer", Analyzer.get_redundancy_summary)
    get_explained_shares = call("analyzer", Analyzer.get_explained_shares)
    get_plasticity_summary = call("analyzer", Analyzer.get_plasticity_summary)

    # Recommend and report

    generate_optimization_recommendations = call(
        "reporter", Reporter.generate_optimization_recommendations
    )
    save_optimization_recommendations = call("reporter", Reporter.save_optimization_recommendations)
    print_optimization_recommendations = call(
        "reporter", Reporter.print_optimization_recommendations
    )
    generate_pruning_recommendations = call("reporter", Reporter.generate_pruning_recommendations)
    print_activation_summary = call("reporter", Reporter.print_activation_summary)
    print_dataset_summary = call("reporter", Reporter.print_dataset_summary)
    print_correlation_analysis = call("reporter", Reporter.print_correlation_analysis)
    print_plasticity_report = call("reporter", Reporter.print_plasticity_report)
    generate_neuron_report = call("reporter", Reporter.generate_neuron_report)
    save_report_to_file = call("reporter", Reporter.save_report_to_file)
    plot_activity_heatmap = call("reporter", Reporter.plot_activity_heatmap)
    plot_correlation_matrix = call("reporter", Reporter.plot_correlation_matrix)
    plot_evolution = call("reporter", Reporter.plot_evolution)
    plot_life = call("reporter", Reporter.plot_life)
    save_html_report = call("reporter", Reporter.save_html_report)

    # What changes with a model

    attach_optimizer = call("attachments", Attachments.attach_optimizer)
    detach_optimizer = call("attachments", Attachments.detach_optimizer)
    attach_follower = call("attachments", Attachments.attach_follower)
    detach_follower = call("attachments", Attachments.detach_follower)
    rewind = call("attachments", Attachments.rewind)
    attach_process_group = call("attachments", Attachments.attach_process_group)
    merge_statistics = call("attachments", Attachments.merge_statistics)

    # Plan, apply, verify

    @property
    def structure(self) -> Structure:
        """What of the current model lives and dies together: traced when first asked; the model is not changed.

        Raises:
            StructureError: The model has not run yet and no example inputs were given, or it cannot be traced.

        Examples:
            >>> engine.structure.coverage, engine.structure["0"].size
            (0.97..., 8)
        """
        return self.changer.structure

    count_parameters = call("changer", Changer.count_parameters)
    measure_latency = call("changer", Changer.measure_latency)
    undo = call("changer", Changer.undo)
    calibrate = call("calibrator", Calibrator.calibrate)
    reestimate_norms = call("calibrator", Calibrator.reestimate_norms)
    prune_units = call("surgeon", Surgeon.prune_units)
    prune_neurons = call("surgeon", Surgeon.prune_neurons)
    merge_neurons = call("surgeon", Surgeon.merge_neurons)
    expand_layer = call("surgeon", Surgeon.expand_layer)
    expand_layers = call("surgeon", Surgeon.expand_layers)
    uniform_widths = call("surgeon", Surgeon.uniform_widths)
    recycle_neurons = call("surgeon", Surgeon.recycle_neurons)
    compress = call("compressor", Compressor.compress)
    insert_layer = call("surgeon", Surgeon.insert_layer)
    remove_layer = call("surgeon", Surgeon.remove_layer)
    apply_recommendations = call("surgeon", Surgeon.apply_recommendations)

    # Change while training

    @property
    def life(self) -> list[Decision]:
        """What was decided so far, and why: changes, refusals, and looks at which nothing was to be done.

        Of the current model, or of the one model that modified itself.

        Examples:
            >>> engine.start_self_modification()
            >>> [decision.what for decision in engine.life]
            ['kept']
        """
        return self.trainer.life

    start_self_modification = call("trainer", Trainer.start_self_modification)
    step = call("trainer", Trainer.step)
    stop_self_modification = call("trainer", Trainer.stop_self_modification)
    get_neuron_ages = call("trainer", Trainer.get_neuron_ages)

    # Record

    @property
    def history(self) -> TrainingHistory:
        """The logged epochs of the current model so far (or what was loaded, without one).

        Examples:
            >>> len(engine.history.epochs)
            0
        """
        return self.sessions.history.copy()

    @property
    def journal(self) -> Journal:
        """Every change of the current model so far, in order.

        Examples:
            >>> receipt = engine.prune_neurons({"0": [1]})
            >>> [entry.operation for entry in engine.journal]
            ['prune_units']
        """
        session = self.sessions.present
        return Journal() if session is None else copy.deepcopy(session.journal)

    log_epoch_statistics = call("recorder", Recorder.log_epoch_statistics)
    save_training_history = call("recorder", Recorder.save_training_history)
    load_training_history = call("recorder", Recorder.load_training_history)
    get_neuron_evolution = call("recorder", Recorder.get_neuron_evolution)
    carry_journal = call("recorder", Recorder.carry_journal)
    save_checkpoint = call("recorder", Recorder.save_checkpoint)

    @classmethod
    def load_checkpoint(
        cls, path: PathLike, fresh_model: nn.Module, optimizer: Any = None, policy: Any = None
    ) -> Self:
        """An engine that goes on where `save_checkpoint` was called.

        Args:
            path: The directory.
            fresh_model: Built by the original code, at its original sizes; it is changed in place.
            optimizer: One (or a list) of the same class over the fresh model's parameters.
            policy: That the run goes on with: a function or an object of your own, whose data no checkpoint holds, or
                other settings. None: the saved one.

        Raises:
            CheckpointError: The checkpoint is damaged or does not fit; model and optimizer are as they were.

        Examples:
            >>> receipt = engine.prune_neurons({"0": [1]})
            >>> path = engine.save_checkpoint("run")
            >>> fresh = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
            >>> resumed = NeuronEngine.load_checkpoint(path, fresh, torch.optim.Adam(fresh.parameters()))
            >>> torch.equal(fresh(x), model(x))
            True
        """
        return load_engine(cls, path, fresh_model, optimizer, policy)
