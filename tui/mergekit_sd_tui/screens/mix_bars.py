"""The Mix screen's bars: one block up and down, and many at once.

Owns what the keys of the bars do. Must not know how a value is written (`weights`, `drafting`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rich.text import Text
from textual import on
from textual.widgets import OptionList

import mergekit_sd as mk
from mergekit_sd.errors import MergekitError
from mergekit_sd_tui import drafting, weights
from mergekit_sd_tui.bars import BlockBars, bars_text
from mergekit_sd_tui.messages import Failed
from mergekit_sd_tui.screens.mix_desk import Desk
from mergekit_sd_tui.screens.pick import Item

COARSE, FINE = 0.05, 0.01
PREVIEW = (78, 9)  # cells: room for all blocks


class BarActions(Desk):
    """What is done to block weights."""

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Between which numbers the parameter lies."""
        name = (self.parameter or "").partition(".")[0]
        if self.step is None or self.step.extrapolate:
            return None, None
        kind = next(each.kind for each in self.step.operation.parameters if each.name == name)
        return kind.low, kind.high

    @property
    def numbers(self) -> weights.Numbers:
        """Each block's number."""
        return {block: number.value for block, number in self.bars.numbers.items()}

    @property
    def value(self) -> Any:
        """The parameter's value as it is written."""
        return drafting.value_in(self.table, self.parameter or "")

    def _set_blocks(self, numbers: Mapping[str, float]) -> None:
        step, parameter, family = self.step_name, self.parameter, self.family
        if step is None or parameter is None or not self.numbers:
            self.workbench.say("There are no block weights here.")
            return
        changed = {block: number for block, number in numbers.items() if number != self.numbers.get(block)}
        if changed:
            self.change(lambda text: drafting.set_block(text, step, parameter, changed, family))

    def _set_value(self, make: Callable[[], Any]) -> None:
        step, parameter = self.step_name, self.parameter
        if step is None or parameter is None:
            self.workbench.say("There are no block weights here.")
            return
        self.change(lambda text: drafting.set_parameter(text, step, parameter, make()))

    # --- the cursor ---

    def action_left(self) -> None:
        """A block to the left; of the two lists, the left one."""
        self._sideways(-1, "#graph")

    def action_right(self) -> None:
        """A block to the right; of the two lists, the right one."""
        self._sideways(1, "#fields")

    def _sideways(self, by: int, listed: str) -> None:
        if self.bars.has_focus:
            self.bars.move(by)
        else:
            self.query_one(listed, OptionList).focus()

    def action_first(self) -> None:
        """The first block."""
        self.bars.move(-len(self.numbers))

    def action_last(self) -> None:
        """The last block."""
        self.bars.move(len(self.numbers))

    def action_pin(self) -> None:
        """Begin a range at this block, or have none."""
        self.bars.pinned = None if self.bars.pinned == self.bars.block else self.bars.block

    # --- one block ---

    def action_up(self) -> None:
        """More."""
        self._nudge(COARSE)

    def action_down(self) -> None:
        """Less."""
        self._nudge(-COARSE)

    def action_finer_up(self) -> None:
        """A little more."""
        self._nudge(FINE)

    def action_finer_down(self) -> None:
        """A little less."""
        self._nudge(-FINE)

    @on(BlockBars.Nudged)
    def _wheel(self, message: BlockBars.Nudged) -> None:
        self._nudge(message.steps * COARSE)

    def _nudge(self, by: float) -> None:
        block = self.bars.block
        if block is not None:
            self._set_blocks({block: weights.within(self.numbers[block] + by, *self.bounds)})

    def action_most(self) -> None:
        """The highest number."""
        if self.bars.block is not None:
            self._set_blocks({self.bars.block: 1.0})

    def action_least(self) -> None:
        """The lowest number."""
        if self.bars.block is not None:
            self._set_blocks({self.bars.block: 0.0})

    @on(BlockBars.Typed)
    def _typed(self, message: BlockBars.Typed) -> None:
        if message.pasted:
            self._paste(message.text)
        else:
            self.ask_value(message.text)

    def ask_value(self, begun: str = "") -> None:
        """Type the number of the block under the cursor, or of the blocks from the mark to it."""
        blocks = self.bars.chosen if self.bars.pinned else [self.bars.block or ""]
        if not self.numbers:
            self.workbench.say("There are no block weights here.")
            return
        span = blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"

        def answered(text: str) -> None:
            self._set_blocks(dict.fromkeys(blocks, weights.number_in(text)))

        self.ask_text(f"{self.parameter} of {span}:", begun, answered, weights.number_in)

    # --- many blocks ---

    def action_preset(self) -> None:
        """Choose a preset by its shape."""
        if not self.numbers:
            self.workbench.say("There are no block weights here.")
            return
        value, family = self.value, self.family

        def preview(name: str) -> Text:
            return self._preview(weights.with_preset(value, name, family))

        def answered(name: str) -> None:
            self._set_value(lambda: weights.with_preset(value, name, family))

        items = [Item(name, name) for name in mk.PRESETS]
        self.ask(f"Preset for {self.parameter}; the base stays:", items, answered, preview=preview)

    def _preview(self, value: Any) -> Text:
        numbers = mk.block_weights(value, self.family)
        return bars_text(numbers, width=PREVIEW[0], height=PREVIEW[1])

    def action_curve(self) -> None:
        """A curve from the mark to the cursor; over the whole UNet without a mark."""
        numbers = self.numbers
        if not numbers:
            self.workbench.say("There are no block weights here.")
            return
        blocks = self.bars.chosen if self.bars.pinned else list(numbers)[1:]
        made = {name: weights.curve(numbers, blocks[0], blocks[-1], name) for name in weights.CURVES}

        def preview(name: str) -> Text:
            one = {block: mk.BlockNumber(each, each, each) for block, each in (numbers | made[name]).items()}
            return bars_text(one, width=PREVIEW[0], height=PREVIEW[1])

        def answered(name: str) -> None:
            self._set_blocks(made[name])

        items = [Item(name, name) for name in made]
        self.ask(f"Curve from {blocks[0]} to {blocks[-1]}:", items, answered, preview=preview)

    def _chosen(self) -> weights.Numbers:
        return {block: self.numbers[block] for block in self.bars.chosen}

    def action_invert(self) -> None:
        """1 less each number."""
        self._set_blocks(weights.inverted(self._chosen()))

    def action_scale(self) -> None:
        """Each number times a factor."""
        chosen, bounds = self._chosen(), self.bounds

        def answered(text: str) -> None:
            self._set_blocks(weights.scaled(chosen, weights.number_in(text), *bounds))

        self.ask_text("Multiply by:", "", answered, weights.number_in)

    # --- the WebUI's text ---

    def action_copy(self) -> None:
        """The numbers as the WebUI takes them."""
        if self.numbers:
            self.app.copy_to_clipboard(weights.as_text(self.numbers))
            self.tell(f"{len(self.numbers)} numbers copied, base first")

    def action_paste(self) -> None:
        """Ask for the WebUI's numbers."""
        if not self.numbers:
            self.workbench.say("There are no block weights here.")
            return
        check = partial(weights.pasted, self.value, family=self.family)
        question = "Paste the WebUI's numbers, a preset's name or a number:"
        self.ask_text(question, "", self._paste, check)

    def _paste(self, text: str) -> None:
        value, family = self.value, self.family
        try:
            made = weights.pasted(value, text, family)
        except MergekitError as error:
            self.post_message(Failed("The paste", error))
            return
        self._set_value(lambda: made)
