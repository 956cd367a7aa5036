"""One model through the library, in a process of its own: traced, cut, compared, trained for a step."""

from __future__ import annotations

import copy
import random
import re
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from _families import Built, build
from _masks import difference, masked, masked_with_norms, randomize_constants, tensors_of
from torch import Tensor, nn

from tracker import NeuronEngine
from tracker.errors import StructureError, SurgeryError, TrackerError, VerificationError
from tracker.structure import Structure, UnitGroup, trace_structure
from tracker.surgery.apply import apply
from tracker.surgery.plan import plan_removal

SHARE = 0.3  # of each group's units
TOLERANCE = 1e-6  # relative, in float64
SINGLE_TOLERANCE = 1e-3  # where the model runs in float32 only
LARGE = 100e6  # parameters, from which on the model stays in float32: its copies must fit in memory
Send = Callable[[dict[str, Any]], None]
# tensor → dimension → original indices of what is left
Alive = dict[str, dict[int, list[int]]]
clock = time.process_time  # of one thread: what else runs on the machine matters little


def brief(error: BaseException | str) -> str:
    """In one line, without the directories of this machine, and numbers of a comparison rounded to a decade."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    text = re.sub(r"(?:/[\w.+@-]+)+/(?=[\w.+-])", "", " ".join(text.split()))
    return text if len(text) <= 400 else text[:399] + "…"


def place(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"({Path(frame.filename).name}:{frame.lineno})"


class Subject:
    """A model that is ready to be measured, and what to feed it."""

    def __init__(self, family: str, name: str) -> None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        self.seed = zlib.crc32(f"{family}/{name}".encode())
        torch.manual_seed(self.seed)
        built: Built = build(family, name)
        self.model, self.args, self.kwargs = built.model.eval(), built.args, built.kwargs
        self.watch, self.blocks, self.taught = built.watch, built.blocks, built.taught or built.args
        self.parameters = sum(p.numel() for p in self.model.parameters())
        randomize_constants(self.model, torch.Generator().manual_seed(self.seed))
        self.tolerance = SINGLE_TOLERANCE
        if self.parameters < LARGE:
            self._to_double()

    def _to_double(self) -> None:
        def cast(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.double() if value.is_floating_point() else value
            if isinstance(value, dict):
                return {k: cast(v) for k, v in value.items()}
            return type(value)(map(cast, value)) if isinstance(value, list | tuple) else value

        single = self.args, self.kwargs, self.taught
        self.args, self.kwargs, self.taught = map(cast, single)
        self.model.double()
        try:
            self.outputs(self.model)
        except Exception:  # some kernels have no float64
            self.model.float()
            self.args, self.kwargs, self.taught = single
            return
        self.tolerance = TOLERANCE

    @property
    def inputs(self) -> Any:
        """As a user gives them to `track_model`."""
        return self.kwargs or self.args

    def run(self, model: nn.Module) -> Any:
        torch.manual_seed(self.seed)  # some draw at random in every pass
        random.seed(self.seed)
        return model(*(self.taught if model.training else self.args), **self.kwargs)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Of the model, and of what is watched inside it (heads of a detector, before its boxes are sorted)."""
        inner: list[Tensor] = []
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _m, _i, out: inner.extend(tensors_of(out))
            )
            for name in self.watch
        ]
        model.eval()
        with torch.no_grad():
            out = tensors_of(self.run(model))
        for handle in handles:
            handle.remove()
        return out + inner

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, training: bool) -> bool:
        """One step of training, in train mode or as one fine-tunes in eval mode; whether all stayed finite."""
        model.train(training)
        parts = [t for t in tensors_of(self.run(model)) if t.requires_grad and t.numel()]
        optimizer.zero_grad()
        if parts:
            loss = sum(t.square().mean() for t in parts)
            loss.backward()
        optimizer.step()
        return all(bool(p.isfinite().all()) for p in model.parameters())


def measure(family: str, name: str, send: Send) -> None:
    """Send what is found of one model, bit by bit: what was sent stands if the process dies."""

    def say(**values: Any) -> None:
        send(values)

    say(stage="build", status="not built")
    warm_up()
    try:
        subject = Subject(family, name)
    except Exception as error:
        return say(note=f"{brief(error)} {place(error)}")
    say(parameters=subject.parameters, dtype=str(next(subject.model.parameters()).dtype)[6:])
    model, generator = subject.model, random.Random(subject.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    modes, unable = [], []
    for training in (True, False):
        start_state = copy.deepcopy(model.state_dict())
        mode = "train" if training else "eval"
        try:
            finite = subject.step(model, optimizer, training)
        except Exception as error:
            unable.append(f"a step of training in {mode} mode: {brief(error)} {place(error)}")
            model.load_state_dict(start_state)
            continue
        if not finite:
            return say(note="not finite after a step of training, before anything was cut")
        modes.append(training)
    if not modes:
        return say(note="; ".join(unable))
    say(modes=["train" if m else "eval" for m in modes], unable=unable)
    subject.outputs(model)  # some keep states of the last call, which with a graph cannot be copied
    original = copy.deepcopy(model)
    expected = subject.outputs(original)

    say(stage="trace", status="trace failed")
    engine = NeuronEngine()
    engine.track_model(model, "m", example_inputs=subject.inputs)
    engine.attach_optimizer(optimizer)
    start = clock()
    try:
        structure = engine.structure
    except Exception as error:
        kind = "" if isinstance(error, StructureError) else "not a StructureError: "
        return say(note=f"{kind}{brief(error)} {place(error)}")
    say(
        trace_seconds=clock() - start,
        groups=len(structure.groups),
        prunable=sum(g.prunable for g in structure.groups),
        share=structure.coverage,
        refused=dict(Counter(brief(g.reason) for g in structure.groups if not g.prunable)),
        frozen=dict(Counter(brief(f.reason) for f in structure.frozen)),
    )
    if differs := changed(model, original):
        return say(status="wrong", note=f"tracing changed {differs}")

    with suppress(Exception):  # for its time alone
        say(bare_seconds=cut_alone(model, subject.inputs, structure, subject.seed))
    alive: Alive = {}
    refusals, seconds, cut_any = [], 0.0, False
    for exact in (True, False):
        call = "exact" if exact else "inexact"
        say(stage=f"{call} groups", status="crashed")
        before = original if exact else {k: v.clone() for k, v in model.state_dict().items()}
        start = clock()
        try:
            choice = choose([g for g in engine.structure.groups if g.exact is exact], generator)
            receipt = prune(engine, choice) if choice else None
        except Exception as error:
            note = f"{call} groups: {brief(error)} {place(error)}"
            if differs := changed(model, before):
                return say(note=f"{note}; torn: {differs} was changed")
            refused = isinstance(error, SurgeryError | VerificationError)
            if not refused and isinstance(error, TrackerError):
                note = f"neither SurgeryError nor VerificationError: {note}"
            if not refused:
                return say(note=f"{note}; nothing was touched, but this is no clear error")
            refusals.append(note)
            continue
        finally:
            seconds += clock() - start
            say(prune_seconds=seconds)
        if receipt is None:
            continue
        cut_any = True
        say(**{f"{call}_groups": len(choice), "parameters_after": receipt.parameters_after})
        lost = slices(choice, lambda _, __: True)
        bury(lost, alive, original)
        try:
            found = subject.outputs(model)
        except Exception as error:
            return say(note=f"forward after {call} groups: {brief(error)} {place(error)}")
        if exact:
            by_role = candidates(choice)
            gap = closest(subject, original, by_role, found)
            say(difference=gap, effect=moved_by(subject, original, lost, expected))
            if gap > subject.tolerance:
                names = ", ".join(culprits(subject, original, choice))
                note = f"differs by {gap:.1e} from the masked original; alone, these do: {names}"
                return say(status="wrong", note=note)
        else:
            if [t.shape for t in found] != [t.shape for t in expected]:
                return say(status="wrong", note="inexact groups: the output changed its shape")
            with suppress(Exception):  # for information: no promise of the library
                reference = masked_with_norms(original, dead(alive, original), model)
                say(norm_difference=difference(found, subject.outputs(reference)))
    say(stage="training step")
    for training in modes if cut_any else ():
        mode = "train" if training else "eval"
        try:
            finite = subject.step(model, optimizer, training)
        except Exception as error:
            note = f"torn: a step of training in {mode} mode: {brief(error)} {place(error)}"
            return say(status="crashed", note=note)
        if not finite:
            return say(status="wrong", note=f"not finite after a step of training in {mode} mode")
    if refusals:
        return say(status="refused", note="; ".join(refusals))
    if not cut_any:
        return say(status="refused", note="no group is prunable")
    return say(status="correct", stage="done")


def warm_up() -> None:
    """What is imported and compiled at the first call is not the model's time."""
    model, engine = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), NeuronEngine()
    engine.track_model(model, "small", example_inputs=torch.randn(2, 4))
    engine.prune_units({engine.structure.groups[0].name: [0]})


def prune(engine: NeuronEngine, choice: Sequence[tuple[UnitGroup, list[int]]]) -> Any:
    return engine.prune_units({g.name: units for g, units in choice}, verify=True)


def cut_alone(model: nn.Module, inputs: Any, known: Structure, seed: int) -> float:
    """Seconds of what Torch-Pruning does, and no more: a graph, and 30% of each exact group cut, unchecked."""
    model = copy.deepcopy(model)
    choice = choose([g for g in known.groups if g.exact], random.Random(seed))
    units = {g.name: chosen for g, chosen in choice}
    start = clock()
    structure = trace_structure(model, inputs, trial=False)
    if units:
        apply(plan_removal(model, structure, units, {}), [model], [])
    return clock() - start


def choose(
    groups: Sequence[UnitGroup], generator: random.Random
) -> list[tuple[UnitGroup, list[int]]]:
    """30% of each prunable group, at random; of groups that lie in the same places one, at random."""
    order = [g for g in groups if g.prunable and g.size > 1]
    generator.shuffle(order)
    taken: dict[tuple[str, int], set[int]] = {}
    choice = []
    for group in order:
        spread = {(s.tensor, s.dim): set(s.indices) for s in group.slices(range(group.size))}
        if any(taken.get(where, set()) & indices for where, indices in spread.items()):
            continue
        count = min(max(1, round(SHARE * group.size)), group.size - 1)
        step = max(1, group.multiple_of)
        count = max(count - count % step, step)
        if count >= group.size:
            continue
        for where, indices in spread.items():
            taken.setdefault(where, set()).update(indices)
        choice.append((group, sorted(generator.sample(range(group.size), count))))
    return choice


def changed(model: nn.Module, before: nn.Module | dict[str, Tensor]) -> str:
    """The first tensor that is no longer what it was, or ""."""
    known = before.state_dict() if isinstance(before, nn.Module) else before
    now = model.state_dict()
    if list(now) != list(known):
        return "the list of tensors"
    # NaN is equal to NaN here.
    return next((k for k, v in now.items() if not same(v, known[k])), "")


def same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


# Slices: of what goes, which are zeroed


def slices(
    choice: Sequence[tuple[UnitGroup, list[int]]], wanted: Callable[[UnitGroup, str], bool]
) -> dict[str, dict[int, set[int]]]:
    found: dict[str, dict[int, set[int]]] = {}
    for group, units in choice:
        for part in group.slices(units):
            if wanted(group, part.role):
                found.setdefault(part.tensor, {}).setdefault(part.dim, set()).update(part.indices)
    return found


def candidates(
    choice: Sequence[tuple[UnitGroup, list[int]]],
) -> list[dict[str, dict[int, set[int]]]]:
    """Zero where the units are read; or everywhere (queries and keys are read by each other, not by weights)."""
    reading = {g.name for g, _ in choice if "reads" in g.roles.values()}
    return [
        slices(choice, lambda _, role: role == "reads"),
        slices(choice, lambda _, __: True),
        slices(choice, lambda g, role: role == "reads" or g.name not in reading),
    ]


def closest(
    subject: Subject, original: nn.Module, masks: Sequence[Any], found: list[Tensor]
) -> float:
    gap = float("inf")
    for mask in masks:
        if gap > subject.tolerance:
            gap = min(gap, difference(found, subject.outputs(masked(original, mask))))
    return gap


def moved_by(subject: Subject, original: nn.Module, lost: Any, expected: list[Tensor]) -> float:
    """How far masking moves the output: next to nothing would mean that the comparison saw nothing."""
    return difference(subject.outputs(masked(original, lost)), expected)


def culprits(
    subject: Subject, original: nn.Module, choice: Sequence[tuple[UnitGroup, list[int]]]
) -> list[str]:
    """Groups that are wrong alone, without the library's own check: for the report."""
    found = []
    for group, units in choice[:40]:
        model, engine = copy.deepcopy(original), NeuronEngine()
        engine.track_model(model, "alone", example_inputs=subject.inputs)
        try:
            engine.prune_units({group.name: units}, verify=False)
            gap = closest(subject, original, candidates([(group, units)]), subject.outputs(model))
        except Exception:
            gap = float("inf")
        if gap > subject.tolerance:
            found.append(f"{group.name} ({gap:.1e})")
    return found or ["none"]


def bury(lost: Mapping[str, Mapping[int, set[int]]], alive: Alive, original: nn.Module) -> None:
    """Take what a call removed (indices of before that call) from what is left (indices of the original)."""
    tensors = original.state_dict()
    for name, dims in lost.items():
        for dim, gone in dims.items():
            left = alive.setdefault(name, {}).get(dim, range(tensors[name].shape[dim]))
            alive[name][dim] = [v for i, v in enumerate(left) if i not in gone]


def dead(alive: Alive, original: nn.Module) -> dict[str, dict[int, set[int]]]:
    """What all calls together removed."""
    tensors = original.state_dict()
    return {
        name: {d: set(range(tensors[name].shape[d])) - set(left) for d, left in dims.items()}
        for name, dims in alive.items()
    }
