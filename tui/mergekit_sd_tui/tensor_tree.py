"""The tree of a model's tensors: parts, blocks, tensors. Branches grow when they are opened.

Owns nodes and their words. Must not read files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from rich.text import Text
from textual import on
from textual.widgets import Tree
from textual.widgets.tree import TreeNode

from mergekit_sd.text import count, shown, size
from mergekit_sd_tui.leaves import PARTS, Leaf, common_start
from mergekit_sd_tui.list_keys import list_keys

MOST_OPENED = 300  # tensors that a filter leaves for all branches to be opened


@dataclass(frozen=True, slots=True)
class Branch:
    """A part or a block of a model, with its tensors. `depth`: 0 for a part, 1 for a block."""

    name: str
    leaves: tuple[Leaf, ...]
    depth: int

    def split(self) -> dict[str, list[Leaf]]:
        """The tensors of a part by block."""
        found: dict[str, list[Leaf]] = {}
        for leaf in self.leaves:
            found.setdefault(leaf.block, []).append(leaf)
        return found


Data: TypeAlias = Branch | Leaf


class TensorTree(Tree[Data], inherit_bindings=False):
    """The tree; what is under its cursor is a Branch or a Leaf."""

    BINDINGS: ClassVar = list_keys("scroll_home", "scroll_end")

    def __init__(self) -> None:
        super().__init__(Text(""), id="tensors", classes="main")
        self.show_root = False
        self.guide_depth = 2

    def show_leaves(self, leaves: Sequence[Leaf], *, opened: bool) -> None:
        """Put these tensors into the tree; `opened`: every branch at once, unless they are too many."""
        self.clear()
        for part, members in _by_part(leaves).items():
            branch = Branch(PARTS.get(part, part), tuple(members), 0)
            node = self.root.add(_branch_words(branch), branch)
            if opened and len(leaves) <= MOST_OPENED:
                node.expand_all()
                self._grow_all(node)
        self.root.expand()
        self.call_after_refresh(self._to_the_top)

    def _to_the_top(self) -> None:
        if self.cursor_line < 0 and self.root.children:
            self.cursor_line = 0

    def _grow_all(self, node: TreeNode[Data]) -> None:
        _grow(node)
        for child in node.children:
            if isinstance(child.data, Branch):
                child.expand()
                _grow(child)

    @property
    def under_cursor(self) -> Data | None:
        """The branch or tensor under the cursor."""
        return self.cursor_node.data if self.cursor_node else None

    @on(Tree.NodeExpanded)
    def _opened(self, event: Tree.NodeExpanded[Data]) -> None:
        _grow(event.node)


def _grow(node: TreeNode[Data]) -> None:
    """Give an opened branch its children, once."""
    branch = node.data
    if not isinstance(branch, Branch) or node.children:
        return
    blocks = branch.split() if branch.depth == 0 else {}
    for name, members in blocks.items():
        if len(members) == 1:  # a block of one tensor would only be one more key to press
            _add_leaf(node, members[0], members[0].name.partition(name)[0])
        else:
            block = Branch(name, tuple(members), 1)
            node.add(_branch_words(block), block)
    if branch.depth == 1:
        start = common_start([leaf.name for leaf in branch.leaves])
        for leaf in branch.leaves:
            _add_leaf(node, leaf, start)


def _add_leaf(node: TreeNode[Data], leaf: Leaf, start: str) -> None:
    words = Text(shown(leaf.name.removeprefix(start)), no_wrap=True)
    words.append(f"  {leaf.dimensions} {leaf.dtype.lower()}", style="dim")
    node.add_leaf(words, leaf)


def _branch_words(branch: Branch) -> Text:
    nbytes = sum(leaf.nbytes for leaf in branch.leaves)
    words = Text(shown(branch.name), no_wrap=True)
    words.append(f"  {count(len(branch.leaves), 'tensor')}, {size(nbytes)}", style="dim")
    return words


def _by_part(leaves: Iterable[Leaf]) -> dict[str, list[Leaf]]:
    found: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        found.setdefault(leaf.part, []).append(leaf)
    return found
