"""Every action of the UI, once: its id, keys and words. Bindings, footer, help and palette are made from this.

Owns the table. Must not know what an action does: the method `action_NAME` of the screen, or of the app,
is the second part of the id. Users give actions other keys by these ids. ctrl+m, ctrl+i, ctrl+h and ctrl+j are
other keys to a terminal: they are not to be used. On every screen ctrl+x stops what is under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from textual.binding import Binding, BindingType

APP = "app"


@dataclass(frozen=True, slots=True)
class Action:
    """`id` is "place.name"; `keys` as Textual writes them, with commas; `label` stands in footer and palette.

    `help` is a sentence. `footer`: whether it is worth a place there. `of`: the ids of the widgets that it is about,
    where that is not the screen's main one.
    """

    id: str
    keys: str
    label: str
    help: str
    footer: bool = True
    of: str = ""

    @property
    def place(self) -> str:
        """The screen that it works on; "app": on all of them."""
        return self.id.partition(".")[0]

    @property
    def widgets(self) -> Sequence[str]:
        """The ids of the widgets that it is about."""
        return (self.of or MAIN.get(self.place, "")).split()

    @property
    def call(self) -> str:
        """The action as Textual calls it."""
        name = self.id.partition(".")[2]
        if self.place == APP and name in SCREENS:
            return f"app.show_screen('{name}')"
        return f"app.{name}" if self.place == APP else f"screen.{name}"


# In the order of their keys, from 1 on.
SCREENS = {
    "library": "Library",
    "inspector": "Inspector",
    "mix": "Mix",
    "recipe": "Recipe",
    "jobs": "Jobs",
    "gallery": "Gallery",
    "diff": "Diff",
}

# The widget that a screen is for, by its id: what its actions are about.
MAIN = {
    "library": "models",
    "inspector": "tensors",
    "jobs": "jobs",
    "gallery": "pictures",
    "diff": "differences",
}
BARS, LISTS, BOTH = "bars", "graph fields", "bars graph fields"

ACTIONS = (
    Action("app.library", "1", "Library", "The models of this machine.", footer=False),
    Action("app.inspector", "2", "Inspector", "What is in the chosen model.", footer=False),
    Action("app.mix", "3", "Mix", "Operands, method, block weights.", footer=False),
    Action("app.recipe", "4", "Recipe", "The recipe's text.", footer=False),
    Action("app.jobs", "5", "Jobs", "What is under way, queued and done.", footer=False),
    Action("app.gallery", "6", "Gallery", "Pictures of models by seeds.", footer=False),
    Action("app.diff", "7", "Diff", "Two models, block by block.", footer=False),
    Action("app.help", "question_mark,f1", "Help", "All keys of this screen."),
    Action("app.command_palette", "ctrl+p", "Menu", "Find an action by its name."),
    Action("app.undo", "z", "Undo", "Take the last change of marks or recipe back.", footer=False),
    Action("app.redo", "Z", "Redo", "Do again what was undone.", footer=False),
    Action("app.quit", "ctrl+q", "Quit", "Leave; what is under way is stopped first."),
    Action("library.inspect", "enter", "Inspect", "Look into the model under the cursor."),
    Action("library.mark", "space", "Mark", "Mark the model under the cursor, or no longer."),
    Action("library.mix", "m", "Merge", "Begin a recipe that merges the marked models."),
    Action("library.diff", "d", "Diff", "Compare the two marked models, block by block."),
    Action("library.filter", "slash", "Filter", "Show only models with these words in path, kind, family or title."),
    Action("library.prune", "p", "Prune", "Write a copy of this model without EMA and junk, as a job.", footer=False),
    Action(
        "library.extract",
        "x",
        "LoRA",
        "Make a LoRA of what one of the two marked models has over the other.",
        footer=False,
    ),
    Action("library.sort", "s", "Sort", "Sort by the next column; a click on a header sorts by it.", footer=False),
    Action("library.rescan", "r", "Scan", "Look for new and changed models in all known folders.", footer=False),
    Action("library.hash", "h", "Hash", "Hash the marked models, or the one under the cursor.", footer=False),
    Action(
        "library.hash_all", "H", "Hash all", "Hash every tensor of every model that has no hashes yet.", footer=False
    ),
    Action(
        "library.duplicates",
        "u",
        "Twice",
        "Group what is there more than once, by the hashes made so far.",
        footer=False,
    ),
    Action("library.stop", "ctrl+x", "Stop", "Stop the scan or the hashing.", footer=False),
    Action("library.back", "escape", "Back", "Leave the filter or the groups.", footer=False),
    Action("inspector.open", "enter,space", "Open", "Open or close the branch under the cursor."),
    Action("inspector.filter", "slash", "Filter", "Show only tensors with all these words in their names."),
    Action("inspector.statistics", "t", "Numbers", "Minimum, maximum, mean, deviation and NaN of this tensor."),
    Action("inspector.fix", "f", "Fix", "Write a copy with mended position_ids."),
    Action("inspector.prune", "p", "Prune", "Write a copy without EMA and junk."),
    Action("inspector.stop", "ctrl+x", "Stop", "Stop the writing; nothing is left behind.", footer=False),
    Action("inspector.back", "escape", "Back", "Leave the filter, or go back to the library.", footer=False),
    Action("mix.change", "enter", "Set", "Type this block's number; on a list: change it.", of=BOTH),
    Action("mix.preset", "p", "Preset", "Choose a preset by its shape; the base stays.", of=BARS),
    Action("mix.curve", "c", "Curve", "From the mark to the cursor, or all of the UNet.", footer=False, of=BARS),
    Action("mix.method", "o", "Method", "Choose the method of the step by its formula.", footer=False),
    Action("mix.step", "n", "Step", "Add a step that goes on from this one."),
    Action("mix.add", "a", "Add", "Add the marked models, or one of the library.", footer=False),
    Action("mix.sample", "s", "Sample", "Draw with the step as it is, unwritten."),
    Action("mix.plan", "f5", "Plan", "What a run would read, compute and write."),
    Action("mix.run", "f6", "Run", "Write the outputs, as a job."),
    Action(
        "mix.left",
        "left",
        "Left",
        "A block to the left; the left one of the lists.",
        footer=False,
        of=BOTH,
    ),
    Action(
        "mix.right",
        "right",
        "Right",
        "A block to the right; the right one of the lists.",
        footer=False,
        of=BOTH,
    ),
    Action("mix.up", "up", "More", "0.05 more; 0 and . begin a typed number.", footer=False, of=BARS),
    Action("mix.down", "down", "Less", "0.05 less.", footer=False, of=BARS),
    Action("mix.finer_up", "shift+up,plus", "A bit more", "0.01 more.", footer=False, of=BARS),
    Action("mix.finer_down", "shift+down,underscore", "A bit less", "0.01 less.", footer=False, of=BARS),
    Action("mix.first", "home", "First", "The first block.", footer=False, of=BARS),
    Action("mix.last", "end", "Last", "The last block.", footer=False, of=BARS),
    Action("mix.most", "pageup", "Most", "1 for this block.", footer=False, of=BARS),
    Action("mix.least", "pagedown", "Least", "0 for this block.", footer=False, of=BARS),
    Action("mix.pin", "space", "Mark", "Begin a range that goes from here to the cursor.", footer=False, of=BARS),
    Action("mix.invert", "i", "Invert", "1 less each number: the marked blocks', or all.", footer=False, of=BARS),
    Action("mix.scale", "x", "Scale", "Multiply the marked blocks, or all.", footer=False, of=BARS),
    Action("mix.copy", "y", "Copy", "The numbers as the WebUI takes them, base first.", footer=False, of=BARS),
    Action("mix.paste", "v", "Paste", "The WebUI's numbers, a preset's name, a number.", footer=False, of=BARS),
    Action(
        "mix.remove", "delete,backspace", "Remove", "Leave out this model, step or operand.", footer=False, of=LISTS
    ),
    Action("mix.back", "escape", "Back", "Back to the bars, then to the library.", footer=False),
    Action("recipe.save", "ctrl+s", "Save", "Write the recipe's file."),
    Action("recipe.plan", "f5", "Plan", "Tell what a run would do, from headers alone."),
    Action("recipe.run", "f6", "Run", "Save the recipe and run it as a job."),
    Action("recipe.back", "escape", "Keys", "Leave the text, so that keys are keys again."),
    Action(
        "recipe.write",
        "enter,e",
        "Write",
        "Type in the text; there, ctrl+z takes back what was typed.",
    ),
    Action("recipe.open", "ctrl+o", "Open", "Open a recipe's file."),
    Action("jobs.open", "enter", "Open", "Look into the file that the job made."),
    Action("jobs.cancel", "ctrl+x,x,c", "Cancel", "Stop the job; nothing of what it had begun is left."),
    Action("jobs.retry", "r", "Retry", "Run the same once more."),
    Action("jobs.remove", "delete,d", "Remove", "Take the job from the list; its files stay."),
    Action("jobs.pictures", "p", "Pictures", "Show the pictures that the job drew."),
    Action("gallery.enlarge", "enter", "Large", "The picture under the cursor alone; again: all pictures."),
    Action("gallery.choose", "space", "A/B", "Take this picture as one of two to compare."),
    Action("gallery.compare", "c", "Compare", "The two chosen in one place; each press shows the other."),
    Action("gallery.flicker", "t", "Flicker", "The two chosen in turn; again: stand still.", footer=False),
    Action("gallery.favourite", "f", "Keep", "Make this picture a favourite, or no longer."),
    Action("gallery.report", "o", "Report", "Open the report in the browser."),
    Action("gallery.next", "n", "Next folder", "The next of the folders of samples that were found.", footer=False),
    Action("gallery.folder", "g", "Folder", "Open another folder of samples.", footer=False),
    Action("gallery.left", "left,h", "Left", "The model before.", footer=False),
    Action("gallery.right", "right,l", "Right", "The next model.", footer=False),
    Action("gallery.up", "up,k", "Up", "The seed before.", footer=False),
    Action("gallery.down", "down,j", "Down", "The next seed.", footer=False),
    Action("gallery.back", "escape", "Back", "All pictures again.", footer=False),
    Action("diff.open", "enter", "Tensors", "The tensors of the block under the cursor."),
    Action("diff.mark", "space", "Mark", "Mark this block to be taken from B, or no longer."),
    Action("diff.blocks", "b", "Merge", "A recipe with the marked blocks of B and all else of A."),
    Action("diff.lora", "l", "LoRA", "Make a LoRA of what B has over A."),
    Action("diff.swap", "w", "Swap", "A becomes B, and B becomes A."),
    Action("diff.sort", "s", "Sort", "The most changed first, or in the order of the model.", footer=False),
    Action("diff.renew", "r", "Again", "Compare the two marked in the library, else the same again.", footer=False),
    Action("diff.stop", "ctrl+x", "Stop", "Stop the comparison.", footer=False),
    Action("diff.back", "escape", "Back", "All blocks again, or back to the library.", footer=False),
)


def actions_of(place: str) -> list[Action]:
    """The actions of a screen, and those that work everywhere."""
    return [action for action in ACTIONS if action.place == place] + [a for a in ACTIONS if a.place == APP]


def bindings(place: str) -> list[BindingType]:
    """The bindings of one place alone."""
    return [
        Binding(action.keys, action.call, action.label, show=action.footer, tooltip=action.help, id=action.id)
        for action in ACTIONS
        if action.place == place
    ]
