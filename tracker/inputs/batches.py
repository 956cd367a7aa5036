"""Which part of a batch the model takes: read from its forward signature and its example calls, never guessed."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tracker.errors import StructureError, SurgeryError
from tracker.inputs.calls import Arguments, Call, arguments, short
from tracker.inputs.forward_pass import copy_without_hooks, forward_once
from tracker.inputs.signature import Kind, Signature
from tracker.utils.argument_checks import fits
from tracker.utils.nested import replaced, tensors_in
from tracker.utils.progress import bar

A_BATCH, EXAMPLE = "a batch", "the example inputs"  # what a pass failed with, for people
log = logging.getLogger("tracker")
Inputs = Callable[[Any], Any]  # a batch → what the model takes of it


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of data.

    Attributes:
        call: How the model is called with it.
        given: The whole of it, targets too, on the model's device: what a loss is given.
        what: What it is, for messages.
    """

    call: Arguments | Call
    given: Any
    what: str = A_BATCH


class BatchReader:
    """Turns batches, as data loaders and tokenizers give them, into calls of one model.

    A tensor, or any other single object, is the one argument; a `Call` is itself. Of a dict the keys that `forward`
    names are passed (all, if it takes `**kwargs`). Of a tuple or list the first k entries are passed, where `forward`
    and the example calls leave one k only; the others are targets. A nested pair, ((a, b), targets) or
    ({"input_ids": …}, targets), is read by its first entry.

    Args:
        model: That is called. It is not kept alive.
        examples: Calls that were seen before, which tell how many arguments of which kind it takes.
        inputs: What the model takes of a batch, as the user says: nothing is read from signatures then.
        targets: There is a loss, which reads targets: the first entry of a tuple is the model's input, where its
            forward does not say otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Call],
        inputs: Inputs | None = None,
        *,
        targets: bool = False,
    ) -> None:
        self._model = weakref.ref(model)
        self._name, self._inputs, self._targets = type(model).__name__, inputs, targets
        self._takes = Signature(model.forward)
        plain = [call for call in examples if call.method == "forward"]
        self._examples = [self._takes.kinds(call) for call in plain]
        lone = [c.args[0] for c in plain if len(c.args) == 1 and not c.kwargs]
        self._takes_mapping = any(isinstance(a, Mapping) for a in lone)
        self._lists = [(type(a), set(map(Kind.of, a))) for a in lone if type(a) in (tuple, list)]
        self._chosen: dict[Any, int | None] = {}  # kinds of a tuple's entries → how many are taken
        self.told: str | None = None  # what was taken of the first batch, for people

    def read(self, batch: Any) -> Batch:
        """How the model is called with a batch.

        Raises:
            SurgeryError: Several parts of it could be what the model takes, or none.
        """
        given = self._moved(batch)
        if self._inputs is not None:
            try:
                taken = self._inputs(given)
            except Exception as error:
                raise SurgeryError(
                    f"inputs(batch) failed ({type(error).__name__}: {error}): it takes a batch as it comes, and gives "
                    "what the model takes of it."
                ) from error
            call = taken if isinstance(taken, Call) else arguments(taken)
            told = f"{_shown(call)}, by `inputs`"
        else:
            call, left = self._of(given, self._targets)
            told = _shown(call) + (f", not {left}" if left else "")
        if self.told is None and not isinstance(batch, Call | Arguments):
            self.told = f"of each batch the model takes {told}"
            log.info("%s: %s", self._name, self.told)
        return Batch(call, given)

    def notes(self) -> list[str]:
        """What was taken of the first batch, if there was one."""
        return [] if self.told is None else [self.told]

    def batches(self, batches: Iterable[Any]) -> Iterable[Any]:
        """The batches of what was passed as such: of one batch by itself, a list of it."""
        if isinstance(batches, Mapping | Call | Arguments):
            return [batches]
        if isinstance(batches, Tensor):
            own = self._examples[0] if self._examples else {}
            ranks = {kind.ndim for kind in own.values() if kind.ndim is not None}
            if batches.ndim in ranks:
                return [batches]
        if not fits(batches, Iterable[Any]):
            raise SurgeryError(
                f"Batches are a DataLoader, a list, or another iterable of batches, not {short(batches)}."
            )
        return batches

    def _moved(self, batch: Any) -> Any:
        """The batch on the device of the model, if all of that is on one, and the batch is not."""
        model = self._model()
        if model is None:
            return batch
        devices = {p.device for p in model.parameters()}
        if len(devices) != 1 or (device := devices.pop()).type == "meta":
            return batch
        if all(t.device in (device, torch.device("meta")) for t in tensors_in(batch)):
            return batch
        if isinstance(batch, Call):
            return batch.given(*replaced((batch.args, batch.kwargs), lambda t: t.to(device)))
        return replaced(batch, lambda t: t.to(device))

    def _of(self, batch: Any, targets: bool) -> tuple[Arguments | Call, str]:
        """The call, and what is left of the batch, for people."""
        if isinstance(batch, Call | Arguments):
            return batch, ""
        if isinstance(batch, Mapping) and not self._takes_mapping:
            return self._of_mapping(batch)
        if type(batch) not in (tuple, list) or self._is_the_list(batch):
            return Arguments((batch,), {}), ""
        count = self._count(batch, targets)
        if count is None:
            inner, left = self._of(batch[0], targets=False)
            own = left and f"{left} in it"
            return inner, " and ".join(part for part in (own, _entries(batch, 1)) if part)
        return Arguments(tuple(batch[:count]), {}), _entries(batch, count)

    def _of_mapping(self, batch: Mapping[Any, Any]) -> tuple[Arguments | Call, str]:
        taken = {k: v for k, v in batch.items() if self._takes.has(k)}
        missing = [name for name in self._takes.required if name not in taken]
        if missing or not taken:
            wanted = ", ".join(missing) or "none of them"
            first = next((k for k, v in batch.items() if self._is_like_the_first(v)), None)
            key = first if first is not None else next(iter(batch), "key")
            raise SurgeryError(
                f"A batch has the keys {', '.join(map(str, batch))}, and {self._name}.forward takes "
                f"{self._takes.text}: {'nothing names ' if missing else 'it names '}{wanted}. Say what the model "
                f"takes, inputs=lambda batch: batch[{key!r}], or pass batches whose keys are names of its arguments."
            )
        left = [str(k) for k in batch if k not in taken]
        return Arguments((), taken), ", ".join(left)

    def _is_the_list(self, batch: Sequence[Any]) -> bool:
        """Whether the model's one argument is such a list."""
        kinds = set(map(Kind.of, batch))
        return any(type(batch) is own and kinds <= known for own, known in self._lists)

    def _is_like_the_first(self, value: Any) -> bool:
        return any(kind == Kind.of(value) for own in self._examples for kind in own.values())

    def _count(self, batch: Sequence[Any], targets: bool) -> int | None:
        """How many of the first entries are arguments; None: the first entry holds them all."""
        kinds = tuple(map(Kind.of, batch))
        if kinds not in self._chosen:
            self._chosen[kinds] = self._decided(batch, kinds, targets)
        return self._chosen[kinds]

    def _decided(self, batch: Sequence[Any], kinds: Sequence[Kind], targets: bool) -> int | None:
        able = [k for k in range(1, len(batch) + 1) if self._fits(kinds[:k])]
        exact = [k for k in able if self._fits(kinds[:k], exactly=True)]
        nested = self._reads_alone(batch[0]) if batch else False
        some = [k for k in exact if k < len(batch)]
        if targets and len(some) == 1:
            return some[0]
        if targets and (1 in able or nested):
            return 1 if 1 in able else None
        if able and not (nested and not exact):
            if max(able) in exact:
                return max(able)
            if len(able) > 1:  # the model itself tells what it cannot be called with
                able = [k for k in able if self._runs(batch[:k])]
            if len(able) == 1 or (able and max(able) in exact):
                return max(able)
        elif nested and not able:
            return None
        raise self._unclear(batch, able)

    def _fits(self, kinds: Sequence[Kind], *, exactly: bool = False) -> bool:
        """Whether forward can be called with such arguments, or `exactly`: as in one of the examples."""
        names = self._takes.names(len(kinds))
        if names is None or any(name not in names for name in self._takes.required):
            return False
        given = dict(zip(names, kinds, strict=True))
        if exactly:
            return any(own == given for own in self._examples)
        if any(k.tensor and self._takes.is_setting(n) for n, k in given.items()):
            return False
        return not self._examples or any(
            all(own[name].may_be(kind) for name, kind in given.items() if name in own)
            for own in self._examples
        )

    def _reads_alone(self, first: Any) -> bool:
        """Whether a first entry holds all that the model takes."""
        if isinstance(first, Call):
            return True
        if isinstance(first, Mapping):
            return all(n in first for n in self._takes.required) and any(
                map(self._takes.has, first)
            )
        return type(first) in (tuple, list) and self._fits([Kind.of(part) for part in first])

    def _runs(self, args: Sequence[Any]) -> bool:
        model = self._model()
        if model is None:
            return False
        try:
            forward_once(copy_without_hooks(model), Arguments(tuple(args), {}))
        except StructureError:
            return False
        return True

    def _unclear(self, batch: Sequence[Any], able: Sequence[int]) -> SurgeryError:
        what = f"A batch is ({', '.join(map(short, batch))}), and {self._name}.forward takes {self._takes.text}"
        examples = " or ".join(", ".join(map(str, own.values())) for own in self._examples)
        if able:
            several = " or ".join(f"the first {k}" if k > 1 else "the first entry" for k in able)
            why = f"{several} could be what it takes"
        else:
            why = f"no first entries of it are what it takes (as an example it was called with {examples})"
        like = next((i for i, v in enumerate(batch) if self._is_like_the_first(v)), 0)
        return SurgeryError(
            f"{what}: {why}. Say which: inputs=lambda batch: batch[{like}] for one argument, or inputs=lambda batch: "
            f"tuple(batch) for all of them; or pass batches that are tracker.Call(...)s."
        )


def each(
    reader: BatchReader,
    batches: Iterable[Any],
    text: str,
    progress: bool | None = None,
    limit: int | None = None,
) -> Iterator[Any]:
    """All batches (or the first `limit`) as they come, one pass, with a bar on terminals and in notebooks.

    Raises:
        SurgeryError: There is none: a generator, say, that was gone through before; or `limit` is less than 1.
    """
    none = True
    if limit is not None and limit < 1:
        raise SurgeryError(f"limit is a number of batches, 1 or more, not {limit!r}.")
    items = reader.batches(batches)
    for batch in bar(
        items if limit is None else islice(items, min(limit, sys.maxsize)), text, "batch", progress
    ):
        none = False
        yield batch
    if none:
        raise SurgeryError(
            f"{text}: there is no batch. A generator can be gone through once only; pass a DataLoader or a list."
        )


def samples_of(call: Arguments | Call, batch_dim: int) -> int:
    """How many samples its first tensor counts; 1 where it has no such dimension, 0 without a tensor."""
    first = next(iter(tensors_in((call.args, call.kwargs))), None)
    if first is None:
        return 0
    return first.shape[batch_dim] if first.ndim > batch_dim else 1


def _shown(call: Arguments | Call) -> str:
    if isinstance(call, Call):
        return str(call)
    parts = [*map(short, call.args), *(f"{k}={short(v)}" for k, v in call.kwargs.items())]
    return f"({', '.join(parts)})"


def _entries(batch: Sequence[Any], start: int) -> str:
    return ", ".join(f"[{i}] {short(v)}" for i, v in enumerate(batch) if i >= start)
