"""The Mix screen's lists: models, steps and outputs, and what a step is made of.

Owns the questions that they ask. Must not know how a recipe's text is written (`drafting`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text
from textual import on
from textual.widgets import OptionList

import mergekit_sd as mk
from mergekit_sd.errors import UsageError
from mergekit_sd_tui import drafting, messages, rows, weights
from mergekit_sd_tui.operands import Kind
from mergekit_sd_tui.screens.mix_desk import Desk
from mergekit_sd_tui.screens.pick import Item

FILE = "\0file"  # no name: another file is asked for
NONE = "\0none"


class FieldActions(Desk):
    """What is done to models, steps, operands and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self._then: Callable[[Path], None] | None = None

    # --- the two lists ---

    @on(OptionList.OptionSelected, "#graph")
    def _graph_chosen(self, event: OptionList.OptionSelected) -> None:
        what, _, name = (event.option.id or "").partition(":")
        if what == "model":
            self._ask_file(lambda path: self._set(drafting.set_model, name, path, self._base))
        elif what == "output":
            self._ask_output(name)
        else:
            self.query_one("#fields", OptionList).focus()

    @on(OptionList.OptionSelected, "#fields")
    def _field_chosen(self, event: OptionList.OptionSelected) -> None:
        what, _, name = (event.option.id or "").partition(":")
        if what == "method":
            self.action_method()
        elif what == "operand":
            self._ask_operand(name)
        elif what == "extrapolate":
            self._toggle_extrapolate()
        elif what == "seed":
            self._ask_seed()
        else:
            self._ask_parameter(name)

    def action_change(self) -> None:
        """On the bars: type a number. The lists have their own Enter."""
        self.ask_value()

    def ask_value(self, begun: str = "") -> None:
        """Type the number of a block."""
        raise NotImplementedError

    @property
    def _base(self) -> Path:
        return self.workbench.workspace.draft.folder

    def _set(self, make: Callable[..., str], *arguments: Any) -> None:
        self.change(lambda text: make(text, *arguments))

    # --- operands and models ---

    def _sources(self, without: str | None) -> list[Item]:
        recipe = self.recipe
        if recipe is None:
            return []
        steps = [Item(name, f"{name}  (step)") for name in recipe.steps if name != without]
        models = [Item(name, f"{name}  {ref.file}") for name, ref in recipe.models.items()]
        return [*models, *steps]

    def _ask_operand(self, label: str) -> None:
        step = self.step_name or ""
        operand = next(each for each in self.step.operation.operands if each.name == label.partition(".")[0])
        items = [*self._sources(step), Item(FILE, "another file …")]
        if operand.optional:
            items.append(Item(NONE, "none"))

        def answered(name: str) -> None:
            if name == FILE:
                self._ask_file(lambda path: self._new_operand(step, label, path))
            else:
                self._set(drafting.set_operand, step, label, None if name == NONE else name)

        self.ask(f"{label} of {step}:", items, answered, at=self.step.operands.get(label))

    def _new_operand(self, step: str, label: str, path: Path) -> None:
        folder = self._base

        def make(text: str) -> str:
            added = drafting.add_models(text, [path], folder)
            name = next(reversed(mk.parse_recipe(added, folder).models))
            return drafting.set_operand(added, step, label, name)

        self.change(make)

    def _ask_file(self, then: Callable[[Path], None]) -> None:
        self._then = then
        self.tell("Looking into the library …")
        self.start("Looking into the library", lambda post: post(messages.ModelsListed(tuple(mk.list_library()))))

    @on(messages.ModelsListed)
    def _models_listed(self, message: messages.ModelsListed) -> None:
        then, self._then = self._then, None
        if then is None:
            return
        marked = self.workbench.workspace.marked
        entries = sorted(
            (entry for entry in message.entries if not entry.error),
            key=lambda entry: (entry.path not in marked, entry.path.name.casefold()),
        )
        self.tell(f"{len(entries):,} models in the library")
        if not entries:
            self.workbench.say(f"There are no models in the library: {self.workbench.keys_of('app.library')} scans.")
            return
        items = [
            Item(str(index), f"{'*' if entry.path in marked else ' '} {entry.path.name}", _searched(entry))
            for index, entry in enumerate(entries)
        ]
        self.ask(
            "Which model? Marked ones (*) come first.",
            items,
            lambda answer: then(entries[int(answer)].path),
            preview=lambda answer: rows.details(entries[int(answer)], None),
        )

    def action_add(self) -> None:
        """The marked models into the draft; one that is chosen where none is marked."""
        marked = self.workbench.workspace.marked
        if self.recipe is None and not self.workbench.workspace.draft.text.strip():
            if marked:
                self.workbench.mix(marked)
            else:
                self._ask_file(lambda path: self.workbench.mix([path]))
            return
        known = {str(self._path(ref.file)) for ref in self.recipe.models.values()} if self.recipe else set()
        new = [path for path in marked if str(path) not in known]
        if new:
            self._set(drafting.add_models, new, self._base)
        else:
            self._ask_file(lambda path: self._set(drafting.add_models, [path], self._base))

    def _path(self, file: str) -> Path:
        return Path(mk.input_path(file, self._base, mk.load_roots())).absolute()

    # --- steps and outputs ---

    def action_method(self) -> None:
        """Choose how a step computes."""
        step = self.step_name
        if self.recipe is None:
            return
        if step is None:
            self.action_step()
            return
        self._ask_method(f"Method of {step}:", lambda op: self._set(drafting.set_method, step, op))

    def _ask_method(self, question: str, answered: Callable[[str], object]) -> None:
        items = [
            Item(name, f"{name:<26} {each.summary}", f"{each.formula} {' '.join(each.also)} {each.purpose}")
            for name, each in mk.OPERATIONS.items()
        ]

        def preview(name: str) -> Text:
            told = mk.describe_operation(mk.OPERATIONS[name])
            return Text("\n".join(each for each in (told["formula"], told["summary"], told["notes"]) if each))

        at = self.step.operation.name if self.step else None
        self.ask(question, items, answered, preview=preview, at=at)

    def action_step(self) -> None:
        """A step that goes on from the one that is worked on."""
        recipe = self.recipe
        if recipe is None:
            self.workbench.say("There is nothing to add a step to.")
            return
        first = self.step_name or next(iter(recipe.models), None)
        used = set(self.step.operands.values()) if self.step else {first}
        others = [name for name in recipe.models if name not in used] + [name for name in recipe.models if name in used]
        operands = [name for name in (first, *others) if name is not None]

        def answered(op: str) -> None:
            wanted = [operand for operand in mk.OPERATIONS[op].operands if not operand.optional]
            names = list(dict.fromkeys(operands))[: max(len(wanted), 2 if any(each.many for each in wanted) else 1)]

            def make(text: str) -> str:
                made, self.step_name = drafting.add_step(text, op, names)
                return made

            before = self.step_name
            if not self.change(make):
                self.step_name = before

        self._ask_method("Method of the new step:", answered)

    def action_remove(self) -> None:
        """Leave out the model, step or member of a list under the cursor."""
        graph, fields = self.query_one("#graph", OptionList), self.query_one("#fields", OptionList)
        listed = fields if fields.has_focus else graph
        option = listed.highlighted_option
        what, _, name = (option.id if option and option.id else "").partition(":")
        if not listed.has_focus:
            self.workbench.say("Go to a model, a step or an operand of a list first (Tab).")
        elif what == "model":
            self._set(drafting.remove_model, name)
        elif what == "step":
            self._set(drafting.remove_step, name)
        elif what == "operand":
            self._set(drafting.set_operand, self.step_name, name, None)
        else:
            self.workbench.say("This cannot be left out.")

    def _ask_output(self, name: str) -> None:
        output = self.recipe.outputs[name] if self.recipe else None
        if output is None:
            return
        items = [
            Item("file", f"file   {output.file}"),
            Item("model", f"model  {output.model}"),
            Item("vae", f"vae    {output.vae or 'its own'}"),
            Item("dtype", f"dtype  {', '.join(output.dtype.values())}"),
        ]

        def answered(key: str) -> None:
            put = partial(self._set_output, name, key)
            if key == "file":
                self.ask_text("Write to, beside the recipe or under a root:", output.file, put)
            elif key == "dtype":
                self.ask("dtype:", [Item(each, each) for each in mk.OUTPUT_DTYPES], put, at=output.dtype["default"])
            else:
                self.ask(f"{key} of {name}:", self._sources(None), put, at=output.model)

        self.ask(f"Output {name}:", items, answered)

    def _set_output(self, name: str, key: str, value: str) -> None:
        self._set(drafting.set_output, name, key, value)

    # --- parameters that are no bars ---

    def _ask_parameter(self, name: str) -> None:
        step = self.step_name or ""
        parameter = next(each for each in self.step.operation.parameters if each.name == name.partition(".")[0])
        kind = Kind.of(parameter)
        put = partial(self._set, drafting.set_parameter, step, name)
        value = drafting.value_in(self.table, name)
        if kind is Kind.BLOCKS:
            self.parameter = name
            self.show_step()
            self.bars.focus()
        elif kind is Kind.CHOICE:
            options = {str(option): option for option in parameter.kind.options}
            items = [Item(option, option) for option in options]
            self.ask(f"{name}:", items, lambda answer: put(options[answer]), at=str(value))
        elif kind is Kind.FORMULA:
            self.ask_text(mk.parameter_forms(parameter), value, put)
        elif kind is Kind.NUMBERS:
            words = ", ".join(f"{each:g}" for each in value)
            self.ask_text(mk.parameter_forms(parameter), words, lambda text: put(_numbers(text)), _numbers)
        else:
            read = partial(_number, whole=parameter.kind.whole)
            self.ask_text(f"{name}: {mk.parameter_forms(parameter)}", f"{value:g}", lambda text: put(read(text)), read)

    def _toggle_extrapolate(self) -> None:
        step = self.step_name or ""
        if self.step.extrapolate:
            self._set(drafting.unset, step, "extrapolate")
        else:
            self._set(drafting.set_parameter, step, "extrapolate", True)

    def _ask_seed(self) -> None:
        step = self.step_name or ""

        def answered(text: str) -> None:
            if text.strip():
                self._set(drafting.set_parameter, step, "seed", _number(text, whole=True))
            else:
                self._set(drafting.unset, step, "seed")

        now = "" if self.step.seed is None else str(self.step.seed)
        check: Callable[[str], object] = lambda text: text.strip() and _number(text, whole=True)  # noqa: E731
        self.ask_text("Seed of this step; nothing for the recipe's:", now, answered, check)

    def action_back(self) -> None:
        """Out of a list to the bars; from the bars to the library."""
        if self.bars.has_focus:
            if self.bars.pinned is None:
                self.workbench.action_show_screen("library")
            self.bars.pinned = None
        else:
            self.bars.focus()


def _searched(entry: mk.LibraryEntry) -> str:
    return " ".join((str(entry.path), entry.kind, entry.architecture or "", entry.title or ""))


def _numbers(text: str) -> list[float]:
    return [weights.number_in(item) for item in text.replace(";", ",").split(",") if item.strip()]


def _number(text: str, *, whole: bool) -> float | int:
    number = weights.number_in(text)
    if whole and number != int(number):
        raise UsageError(f"{number:g} is not whole.", hint="write a number such as 32")
    return int(number) if whole else number
