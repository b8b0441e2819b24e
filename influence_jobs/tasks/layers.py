"""The layers of a model, in forward order, their numbers, and what words for them mean."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from influence_jobs.errors import InflError, ModelError, SpecError
from influence_jobs.gradients import GradNorms
from influence_jobs.gradients.fallback import slow_lines
from influence_jobs.gradients.rules import nearest_rule
from influence_jobs.gradients.transforms import differentiable_kernels
from influence_jobs.gradients.weights import (
    all_parameters,
    first_names,
    full_name,
    name_of,
    weight_named,
    weights_of,
    with_parametrizations,
)
from influence_jobs.tasks.base import Draw, Task
from influence_jobs.tasks.own_code import described
from influence_jobs.tasks.placement import (
    built_model,
    converted,
    device_of,
    dtype_of,
    out_of_half,
    to_device,
)
from influence_jobs.terms import Precision

Say = Callable[[str], None]
LISTED = 4  # names in a line
ITSELF = "the model itself"  # its name as a module is empty


def weight_layers(task: Task, model: nn.Module) -> list[str]:
    """Module names of the numbered layers, in forward order; `--layer 1` is the first.

    A layer has a number if the `LayerRule` of its type, or of a type it inherits from, says so. One
    sample is passed through the model to find the order, which may differ from the order of
    registration.

    Raises:
        ModelError: The losses of that sample fail.
    """
    order: list[str] = []

    def note(name: str) -> None:
        if name not in order:
            order.append(name)

    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: note(name))
        for name, module in model.named_modules()
        if (rule := nearest_rule(module)) is not None and rule.numbered
    ]
    training = model.training
    try:
        with torch.no_grad(), differentiable_kernels(model):
            sample = task.batch(torch.tensor([0]), Draw(seed=0))
            sample = out_of_half(to_device(sample, device_of(model)), model)
            task.losses(model.eval(), sample)
    except InflError:
        raise
    except Exception as error:
        raise ModelError(
            f"losses() of {type(task).__name__} fails for sample 0: {described(error)}"
        ) from error
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return order


def resolve_weights(wanted: Sequence[str | int], task: Task, say: Say) -> tuple[str, ...]:
    """The weights that a user means, for gradient norms: names as `weight_named` takes them.

    They come in forward order; those of layers without a number follow, as the model lists them.
    One that is shared comes once: as it was named or, if it was named twice, by its first owner.

    Raises:
        SpecError: A word means nothing, or a layer that has no weight or whose weight is frozen.
        ModelError: A layer has an option that no per-sample gradient can follow.
    """
    words = _Words(task, say)
    model = words.model

    def weights(part: str) -> dict[str, str]:
        """By name the parameter of each weight of a module, or of a parameter."""
        named = [name_of(model, part)] if part in words.parameters else weights_of(model, part)
        return {name: weight_named(model, name).parameter for name in named}

    names: dict[str, str] = {}  # by parameter
    for part in words.meant(wanted, lambda part: [*weights(part).values()]):
        found = weights(part)
        if not found:
            raise words.empty(part, "weight")
        if not words.trained & {*found.values()}:
            raise words.frozen(part)
        for name, parameter in found.items():
            if parameter in words.trained:
                again = names.get(parameter, name) != name
                names[parameter] = name_of(model, parameter) if again else name
    return words.ordered(names.values())


def resolve_layers(wanted: Sequence[str | int], task: Task, say: Say) -> tuple[str, ...]:
    """The modules, and parameters, that a user means: what `ParameterSpace` takes.

    All trained parameters of a module count, biases too. They come in the order of
    `resolve_weights`; a module that only shares parameters of another one is left to that.

    Raises:
        SpecError: A word means nothing, or what is frozen or has no parameters.
    """
    words = _Words(task, say)
    entries: set[str] = set()
    for part in words.meant(wanted, words.own):
        if not words.own(part):
            raise words.empty(part, "parameters")
        if not words.trained & {*words.own(part)}:
            raise words.frozen(part)
        inside = [part] if part in words.parameters else with_parametrizations(words.model, part)
        entries |= {entry for entry in inside if words.trained & {*words.own(entry, alone=True)}}
    kept: list[str] = []
    counted: set[str] = set()
    for entry in sorted(entries, key=[*words.modules, *words.parameters].index):
        own = words.trained & {*words.own(entry, alone=True)}
        if not own <= counted:
            kept.append(entry)
            counted |= own
    return words.ordered(kept)


def layers_of_run(word: str, names: Sequence[str], task: Task) -> list[str]:
    """Those of a run's layers that a word means; none if it has no such layer.

    Args:
        word: As `resolve_weights` takes it.
        names: Of the run's layers.
        task: The run's.
    """
    named = word.removeprefix("module:")
    if word == "all":
        return list(names)
    if re.fullmatch(r"\d+", word):
        order = weight_layers(task, task.model())
        named = order[int(word) - 1] if 1 <= int(word) <= len(order) else ""
    elif re.search(r"[*?[]", named):
        return [name for name in names if fnmatchcase(name, named)]
    if named in names:
        return [named]
    model = task.model()
    first, modules = first_names(model), dict(model.named_modules(remove_duplicate=False))

    def parameters(name: str) -> set[str]:
        if name in first:
            return {first[name]}
        weights = weights_of(model, name) if name in modules else []
        return {weight_named(model, weight).parameter for weight in weights}

    return [name for name in names if parameters(name) & parameters(named)]


def say_slow_layers(layers: Sequence[str], task: Task, say: Say) -> None:
    """Tell which weights no rule serves, and what their gradients cost, as two samples show.

    Raises:
        ModelError: As `GradNorms` and `converted`.
    """
    model, fitting = converted(task, torch.device("cpu"))
    batch = fitting(task.batch(torch.arange(min(2, len(task.train_data()))), Draw(seed=0)))
    precision: Precision = "float64" if dtype_of(model) == torch.float64 else "float32"
    with GradNorms(model, layers, task.losses, reduction="layer", precision=precision) as engine:
        for line in slow_lines(engine.slow_layers(batch)):
            say(line)


def trained_modules(model: nn.Module) -> tuple[str, ...]:
    """The modules with trained parameters; a shared one is of its first owner."""
    owners = dict.fromkeys(
        name.rpartition(".")[0] for name, value in model.named_parameters() if value.requires_grad
    )
    return tuple(owners)


def left_out(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """Names of the other modules with trained parameters that none of some modules has too."""
    taken = {p for name in modules for p in model.get_submodule(name).parameters(recurse=False)}
    return [
        name
        for name, module in model.named_modules()
        if any(p.requires_grad and p not in taken for p in module.parameters(recurse=False))
    ]


def by_type(model: nn.Module, names: Iterable[str]) -> str:
    """Names of modules or parameters in words, by type: "LSTM rnn; LayerNorm norm1, norm2"."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, list[str]] = {}
    for name in names:
        kind = type(modules[name]).__name__ if name in modules else "Parameter"
        found.setdefault(kind, []).append(name or ITSELF)
    return "; ".join(f"{kind} {_listed(of)}" for kind, of in found.items())


class _Words:
    """What words for layers mean in the model of a task."""

    def __init__(self, task: Task, say: Say) -> None:
        self.model = model = built_model(task)
        self._say = say
        self.order = weight_layers(task, model)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = all_parameters(model)
        self.first = first_names(model)
        self.trained = {name for name, value in model.named_parameters() if value.requires_grad}

    def meant(
        self, wanted: Sequence[str | int], counts: Callable[[str], list[str]]
    ) -> Iterator[str]:
        """Names of modules, and of parameters, that words stand for.

        Args:
            counts: The parameters that are taken of a module, by their first names; `all` and
                patterns leave out where none is trained.

        Raises:
            SpecError: A word means nothing.
        """
        for word in map(str, wanted):
            named = word.removeprefix("module:")
            if word == "all":
                yield from self._all(counts)
            elif re.fullmatch(r"-?\d+", word):
                yield self._numbered(word)
            elif named and (named in self.modules or named in self.parameters):
                yield named
            elif re.search(r"[*?[]", named):
                yield from self._matching(named, counts)
            else:
                raise self._unknown(f"layer {word!r}")

    def own(self, part: str, *, alone: bool = False) -> list[str]:
        """By their first names a parameter, or a module's own with those that they are made of.

        Args:
            alone: Of the module itself only.
        """
        if part in self.parameters:
            return [self.first[part]]
        return [
            self.first[full_name(module, name)]
            for module in ([part] if alone else with_parametrizations(self.model, part))
            for name, value in self.modules[module]._parameters.items()
            if value is not None
        ]

    def ordered(self, names: Iterable[str]) -> tuple[str, ...]:
        """Names in forward order, as far as they have a number, then as the model lists them."""
        number = {name: i for i, name in enumerate(self.order)}
        listed = {name: i for i, name in enumerate([*self.modules, *self.parameters])}

        def place(name: str) -> tuple[int, int, int]:
            owner = name if name in self.modules else name.rpartition(".")[0]
            return number.get(owner, len(number)), listed[owner], listed[name]

        return tuple(sorted(names, key=place))

    def empty(self, part: str, what: str) -> SpecError:
        """The refusal of a module that owns nothing that could be taken."""
        inside = any(True for _ in self.modules[part].parameters())
        cure = f"name what is inside, '{part}.*'" if inside else "leave it out"
        kind = type(self.modules[part]).__name__
        return SpecError(f"layer '{part}' ({kind}) has no {what} of its own: {cure}")

    def frozen(self, part: str) -> SpecError:
        """The refusal of what is not trained."""
        return SpecError(
            f"layer '{part}' is frozen (requires_grad=False), and only trained parameters count: "
            "leave it out, or let the task's model() train it"
        )

    def _all(self, counts: Callable[[str], list[str]]) -> list[str]:
        taken = [name for name in self.order if self.trained & {*counts(name)}]
        frozen = [name for name in self.order if name not in taken]
        known = {name for module in taken for name in counts(module)}
        unnumbered = [
            name
            for name in self.modules
            if name not in self.order and not self.trained & {*counts(name)} <= known
        ]
        left = by_type(self.model, unnumbered)
        others = f"; these have no number and must be named: {left}" if left else ""
        others += f"; frozen: {_listed(frozen)}" if frozen else ""
        if not taken:
            raise SpecError(
                "--layer all takes the trained layers that have a number, and there are "
                f"none{others}"
            )
        self._say(
            f"--layer all: {len(taken)} of {len(self.order)} numbered layers: "
            f"{_listed(taken)}{others}"
        )
        return taken

    def _numbered(self, word: str) -> str:
        number, other = int(word), word in self.modules
        if not 1 <= number <= len(self.order):
            hint = f"; the module named {word} is module:{word}" if other else ""
            raise self._unknown(f"layer {number}", hint)
        name = self.order[number - 1]
        if other and word != name:
            self._say(f"layer {word} is {name}; the module named {word} would be module:{word}")
        return name

    def _matching(self, pattern: str, counts: Callable[[str], list[str]]) -> list[str]:
        """Modules whose name matches, else parameters; of them those that have a trained one."""
        found = [
            name
            for name in (*self.modules, *self.parameters)
            if name and fnmatchcase(name, pattern) and self.trained & {*counts(name)}
        ]
        if modules := [name for name in found if name in self.modules]:
            return modules
        if found:
            return found
        if any(fnmatchcase(name, pattern) for name in (*self.modules, *self.parameters)):
            raise self.frozen(pattern)
        raise self._unknown(f"layer {pattern!r}")

    def _unknown(self, what: str, hint: str = "") -> SpecError:
        numbered = (f"{i} ({name or ITSELF})" for i, name in enumerate(self.order, start=1))
        return SpecError(f"{what} does not exist: the layers are {', '.join(numbered)}{hint}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(name or ITSELF for name in names[:LISTED]) + more
