"""A run inside a state dict: what it needs to go on, as one tensor of bytes, so that frameworks save and load it.

A change that awaits its verdict is part of it: what undoing it gives back is saved too.
"""

from __future__ import annotations

import json
import operator
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tracker.checkpoint.run_state import laid_out, reads_tables, restore_seen
from tracker.errors import CheckpointError
from tracker.inputs.serialized import calls_from, gather_calls, gather_inputs, inputs_from
from tracker.parts.session import Session
from tracker.structure.code_sizes.attributes import tensors
from tracker.surgery import Receipt
from tracker.surgery.optimizer_state.moments import unwrapped
from tracker.surgery.undo import put_back
from tracker.training.loop import SelfModification
from tracker.training.verdict import Verdict
from tracker.utils.safetensors_tables import bytes_of, table_of

FACTS = "facts"  # key of the plain data among the tensors
TENSOR, STATE = "before.tensor/", "before.state/"  # of a change that awaits its verdict
MOST_IDS = 2**48
UNREADABLE = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError)


@dataclass(frozen=True, slots=True)
class CarriedRun:
    """A run as a state dict carries it.

    Attributes:
        facts: Plain data.
        tables: Tensors by key.
    """

    facts: dict[str, Any]
    tables: dict[str, Tensor]

    @property
    def entries(self) -> int | None:
        """Length of the journal before the change that awaits its verdict; None where none does."""
        verdict = self.facts["verdict"]
        return None if verdict is None else operator.index(verdict["entries"])

    @property
    def policy(self) -> Any:
        """Plain data of the policy."""
        return self.facts["run"]["policy"]

    @property
    def receipt(self) -> Receipt:
        """Of the change that awaits its verdict.

        Raises:
            CheckpointError: It is none.
        """
        data = self.facts["verdict"]["receipt"]
        if not isinstance(data, dict) or set(data) != {f.name for f in fields(Receipt)}:
            raise CheckpointError("The change that awaits its verdict has no receipt.")
        return Receipt(**data)

    def resume(self, session: Session, run: SelfModification) -> None:
        """Have a run that just began go on where this one was packed, on the model that came with it.

        Raises:
            CheckpointError: It is no run of this model.
        """
        entry = session.entry
        observer, model = entry.observer, entry.model()
        with _readable():
            inputs = inputs_from(self.tables, self.facts["inputs"])
            if inputs is not None:
                observer.inputs = inputs
                observer.given = calls_from(self.tables, self.facts["calls"], inputs, model)
                entry.structure, entry.traced = None, False
                if not entry.hooked:
                    entry.detach()  # nothing has to be waited for at the model's door
            seen = {k: t for k, t in self.tables.items() if k.startswith("run/")}
            look = {k: t for k, t in self.tables.items() if k.startswith("look.")}
            run.restore_state(self.facts["run"], restore_seen(session.tracker, seen), look)
            session.tracker.registry.skip_to(min(operator.index(self.facts["next_id"]), MOST_IDS))
            _place_states(session, self.facts["optimizers"])
            _place_verdict(session, run, self)


def pack_run(session: Session) -> Tensor:
    """The run of a session as bytes: (n,) of uint8."""
    run: SelfModification = session.run
    model, observer = session.entry.model(), session.entry.observer
    data, reads, tables = run.dump_state()
    inputs, places = gather_inputs(observer.inputs)
    calls = None if places is None else gather_calls(observer.given, model, inputs)
    optimizers = unwrapped(session.optimizers)
    names = {id(p): name for name, p in model.named_parameters()}
    verdict, before = _before(session, optimizers)
    facts = {
        "run": data,
        "inputs": places,
        "calls": calls,
        "optimizers": [_groups(o, names) for o in optimizers],
        "verdict": verdict,
        "next_id": session.tracker.registry.next_id,
    }
    every = {**tables, **reads_tables("run", reads), **inputs, **before}
    every[FACTS] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    return torch.frombuffer(bytearray(b"".join(bytes_of(every))), dtype=torch.uint8)


def unpack_run(packed: Any) -> CarriedRun:
    """The run of a tensor of bytes.

    Raises:
        CheckpointError: It is none.
    """
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.ndim != 1:
        raise CheckpointError("The state dict's run is no tensor of bytes.")
    with _readable():
        tables = table_of(bytearray(packed.cpu().numpy().tobytes()))
        facts = json.loads(bytes(tables.pop(FACTS).numpy()))
        if set(facts) != {"run", "inputs", "calls", "optimizers", "verdict", "next_id"}:
            raise ValueError("it is no run")
        return CarriedRun(facts, tables)


def _groups(optimizer: Optimizer, names: Mapping[int, str]) -> list[list[str | None]]:
    return [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]


def _before(
    session: Session, optimizers: Sequence[Optimizer]
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The change that awaits its verdict, and what undoing it gives back."""
    run: SelfModification = session.run
    verdict, last = run.verdict, session.last
    if verdict is None or last is None or last.receipt is None:
        return None, {}
    model, before = session.entry.model(), last.log.before
    names = {id(t): name for name, t in reversed(list(tensors(model).items()))}
    found: dict[str, Tensor] = {}
    for owner, path, module in before.modules.values():
        if owner is model and module is not None:
            for name, tensor in tensors(module).items():
                names.setdefault(id(tensor), f"{path}.{name}")
                found[TENSOR + f"{path}.{name}"] = tensor.detach()
    for key, (_, content) in before.tensors.items():
        if key in names:
            found[TENSOR + names[key]] = content
    numbers: list[dict[str, dict[str, Any]]] = [{} for _ in optimizers]
    place = {id(o): i for i, o in enumerate(optimizers)}
    for (owner_id, key), (_, _, state) in before.states.items():
        if owner_id in place and key in names and state is not None:
            plain = numbers[place[owner_id]].setdefault(names[key], {})
            for what, value in state.items():
                if isinstance(value, Tensor):
                    found[f"{STATE}{place[owner_id]}/{names[key]}/{what}"] = value
                else:
                    plain[what] = value
    groups = [
        [
            [names.get(id(p)) for p in before.groups.get(id(g), (g, g["params"]))[1]]
            for g in o.param_groups
        ]
        for o in optimizers
    ]
    return {
        "step": verdict.step,
        "loss": verdict.loss,
        "groups": list(verdict.groups),
        "entries": verdict.entries,
        "error": verdict.error,
        "rise": verdict.rise,
        "receipt": last.receipt.to_dict(),
        "numbers": numbers,
        "parameters": groups,
        "strides": {n: list(t.stride()) for n, t in found.items() if not t.is_contiguous()},
    }, found


def _place_states(session: Session, saved: Sequence[Any]) -> None:
    """Give each parameter the optimizer's state that was its own.

    Frameworks load such states by position. Where they build the optimizer after the model was loaded, parameters of
    inserted layers stand elsewhere in its groups than when they were saved.
    """
    named = dict(session.entry.model().named_parameters())
    optimizers = unwrapped(session.optimizers)
    if len(saved) != len(optimizers):
        return
    for optimizer, groups in zip(optimizers, saved, strict=True):
        now = [group["params"] for group in optimizer.param_groups]
        if any(name not in named for names in groups for name in names):
            continue  # it holds others, too
        wanted = [[named[name] for name in names] for names in groups]
        if [{id(p) for p in part} for part in now] != [{id(p) for p in part} for part in wanted]:
            continue  # it was built over other parameters than the one that was saved
        pairs = [pair for a, b in zip(now, wanted, strict=True) for pair in zip(a, b, strict=True)]
        states: dict[Tensor, Any] = {
            owner: optimizer.state[at] for at, owner in pairs if at in optimizer.state
        }
        optimizer.state.update(states)
        for parameter in [p for p in optimizer.state if p not in states]:
            del optimizer.state[parameter]
        for group, part in zip(optimizer.param_groups, wanted, strict=True):
            group["params"] = part


def _place_verdict(session: Session, run: SelfModification, carried: CarriedRun) -> None:
    """Have the last change be one that can be undone, and that is judged."""
    facts, last = carried.facts["verdict"], session.last
    if facts is None or last is None:
        return
    verdict = Verdict(
        operator.index(facts["step"]),
        float(facts["loss"]),
        tuple(map(str, facts["groups"])),
        weakref.ref(last),
        operator.index(facts["entries"]),
        float(facts.get("error", 0.0)),
        None if facts.get("rise") is None else float(facts["rise"]),
    )
    strides = {str(name): tuple(map(operator.index, s)) for name, s in facts["strides"].items()}
    tables = {
        key: laid_out(value, strides[key]) if key in strides else value
        for key, value in carried.tables.items()
        if key.startswith((TENSOR, STATE))
    }
    optimizers, model = unwrapped(session.optimizers), weakref.ref(session.entry.model())
    numbers, groups = facts["numbers"], facts["parameters"]

    def give_back() -> None:
        changed = model()
        if changed is None:
            return
        held = tensors(changed)
        for key, value in tables.items():
            name = key.removeprefix(TENSOR)
            if name != key and name in held:
                put_back(held[name], value.to(held[name].device, copy=True))
        named = dict(changed.named_parameters())
        for number, optimizer in enumerate(optimizers[: len(groups)]):
            _give_back_states(optimizer, number, tables, numbers[number], named)
            _give_back_groups(optimizer, groups[number], named)

    last.log.add_last(give_back)
    run.await_verdict(verdict)


def _give_back_states(
    optimizer: Optimizer,
    number: int,
    tables: Mapping[str, Tensor],
    numbers: Mapping[str, Mapping[str, Any]],
    named: Mapping[str, nn.Parameter],
) -> None:
    states: dict[str, dict[str, Any]] = {name: dict(plain) for name, plain in numbers.items()}
    for key, value in tables.items():
        place = key.removeprefix(f"{STATE}{number}/")
        if place == key:
            continue
        name, _, what = place.rpartition("/")
        if name in named:
            parameter = named[name]
            stays = value.ndim == 0 and not (optimizer.defaults.get("fused") and parameter.is_cuda)
            states.setdefault(name, {})[what] = value if stays else value.to(parameter.device)
    for name, state in states.items():
        if name in named and state:
            optimizer.state[named[name]] = state
        elif name in named:
            optimizer.state.pop(named[name], None)


def _give_back_groups(
    optimizer: Optimizer, groups: Sequence[Sequence[str]], named: Mapping[str, nn.Parameter]
) -> None:
    wanted = [[named[name] for name in names if name in named] for names in groups]
    if len(wanted) != len(optimizer.param_groups) or any(None in names for names in groups):
        return
    for group, part in zip(optimizer.param_groups, wanted, strict=True):
        group["params"] = part
    held = {id(p) for part in wanted for p in part}
    for parameter in [p for p in optimizer.state if id(p) not in held]:
        del optimizer.state[parameter]


@contextmanager
def _readable() -> Iterator[None]:
    """Whatever a file from elsewhere makes fail inside is a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"The run of the state dict cannot be read: {error}") from error
