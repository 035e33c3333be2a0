"""The plan: programs over registers, what is known without reading weights, and which targets are refused."""

from __future__ import annotations

import os

import models
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import recipe

import mergekit_sd as mk
from mergekit_sd.errors import MissingInput, OutputIsInput, RecipeError, UsageError
from mergekit_sd.formats.dtypes import F16
from mergekit_sd.formats.tensor import TensorInfo
from mergekit_sd.operations import OPERATIONS
from mergekit_sd.planning.expression import Apply, FirstChannels, Read, RestChannels, compile_expression, reads_of

# --- programs ----------------------------------------------------------------------------------------------

SHAPE = (4,)


def leaf(number, shape=SHAPE):
    return Read(number, TensorInfo(f"t{number}", F16, shape, 0, 2 * int(np.prod(shape))))


def apply(name, *operands, **parameters):
    return Apply(OPERATIONS[name], operands, tuple(parameters.items()), SHAPE, F16)


@st.composite
def graphs(draw):
    """A random graph whose nodes may be used many times."""
    nodes = [leaf(number) for number in range(draw(st.integers(1, 4)))]
    for _ in range(draw(st.integers(0, 25))):
        name = draw(st.sampled_from(["weighted_sum", "add_difference", "triple_sum", "scale"]))
        operation = OPERATIONS[name]
        operands = [nodes[draw(st.integers(0, len(nodes) - 1))] for _ in operation.operands]
        nodes.append(apply(name, *operands, **{each.name: 0.5 for each in operation.parameters}))
    return nodes[-1]


def nodes_of(node):
    return {node}.union(*(nodes_of(operand) for operand in getattr(node, "operands", ())))


def interpret(program):
    """Run a program on names of values, as a machine with registers would."""
    registers = {}
    for step in program.instructions:
        assert step.target not in step.sources, "out may overlap no operand"
        assert step.target < program.registers
        if isinstance(step.node, Read):
            registers[step.target] = step.node
        else:
            found = tuple(registers[source] for source in step.sources)
            assert found == step.node.operands, "an operand was overwritten"
            registers[step.target] = step.node
    return registers[program.result]


@given(graphs())
def test_programs_compute_the_graph(graph):
    program = compile_expression(graph)
    assert interpret(program) is graph
    assert len(program.instructions) == len(nodes_of(graph)), "every node once"
    assert set(program.reads) == set(reads_of(graph))
    assert not program.whole


@pytest.mark.parametrize("side", [0, 1, 2])
def test_long_chains_need_few_registers(side):
    """Whichever operand the chain hangs on; no recursion."""
    node = leaf(0)
    for number in range(3000):
        operands = [leaf(number), leaf(number), leaf(number)]
        operands[side] = node
        node = apply("add_difference", *operands, alpha=0.5)
    program = compile_expression(node)
    assert program.registers == 4
    assert len(program.instructions) == 3 * 3000 + 1


def test_balanced_tree_needs_its_depth():
    level = [leaf(number) for number in range(64)]
    while len(level) > 1:
        level = [apply("weighted_sum", *pair, alpha=0.5) for pair in zip(level[::2], level[1::2], strict=True)]
    assert compile_expression(level[0]).registers <= 8


def test_what_needs_whole_tensors():
    first = FirstChannels(leaf(0, (2, 9)), 4, F16)
    assert first.shape == (2, 4)
    assert compile_expression(RestChannels(first, leaf(0, (2, 9)), (2, 9), F16)).whole
    assert compile_expression(apply("scale", apply("slerp", leaf(0), leaf(1), alpha=0.5), alpha=2.0)).whole


# --- what a plan says ------------------------------------------------------------------------------------------


def test_plan_says_what_will_happen(room):
    names = {"a": "sd1-a.safetensors", "b": "sd1-b.safetensors"}
    table = {"default": 0.5, "vae": 0, "OUT03": 1}
    where = recipe(room, names, {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": table}})
    plan = mk.plan(where)
    a = models.read(room / "sd1-a.safetensors")
    folded = sum(key.startswith((models.VAE, models.UNET + "output_blocks.3.")) for key in a)
    carried = sum(models.is_carried(key) for key in a)
    (step,) = plan.steps
    assert (step.folded, step.carried, step.merged) == (folded, carried, len(a) - folded - carried)
    assert step.weights["alpha"]["OUT03"] == (1.0, 1.0)
    assert step.weights["alpha"]["IN00"] == (0.5, 0.5)
    (output,) = plan.outputs
    assert sum(output.counted().values()) == len(a)
    report = mk.plan_as_json(plan)
    mk.run(where)
    assert report["write_bytes"] == (room / "out.safetensors").stat().st_size
    assert report["outputs"][0]["tensors"]["merged"] == step.merged
    assert report["inputs"][0]["architecture"] == "sd1"


def test_planning_reads_no_weights(tmp_path, monkeypatch):
    """The header, and at most 64 KiB of glances."""
    models.write(tmp_path / "a.safetensors", models.checkpoint("sd1", 1, width=12))
    read = []
    from mergekit_sd.formats.reading import InputFile

    original = InputFile.read_into
    monkeypatch.setattr(InputFile, "read_into", lambda *a: (read.append(len(a[1])), original(*a))[1])
    mk.plan(recipe(tmp_path, {"a": "a.safetensors"}))
    size = (tmp_path / "a.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    assert sum(read) <= header + 64 * 1024 < size


def test_no_outputs(room):
    where = recipe(room, {"a": "sd1-a.safetensors"}, None, {})
    with pytest.raises(RecipeError, match="nothing to make") as caught:
        mk.plan(where)
    assert caught.value.exit_code == 2


# --- targets (row 23) ----------------------------------------------------------------------------------------


def refused(folder, error, file, **options):
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors") if path.is_file()}
    where = recipe(folder, {"a": "sd1-a.safetensors"}, None, {"out": {"model": "a", "file": str(file)}})
    with pytest.raises(error) as caught:
        mk.run(where, force=True, **options)
    assert caught.value.exit_code == 2
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors") if path.is_file()} == before
    assert models.left_overs(folder) == []
    assert not (folder / "r.lock").exists()
    return caught.value


@pytest.mark.parametrize("kind", ["name", "dot", "symlink", "hard link", "folder link", "up and down"])
def test_output_is_an_input(room, kind):
    (room / "sub").mkdir()
    (room / "soft.safetensors").symlink_to("sd1-a.safetensors")
    os.link(room / "sd1-a.safetensors", room / "hard.safetensors")
    (room / "linked").symlink_to(".")
    file = {
        "name": "sd1-a.safetensors",
        "dot": "./sd1-a.safetensors",
        "symlink": "soft.safetensors",
        "hard link": "hard.safetensors",
        "folder link": "linked/sd1-a.safetensors",
        "up and down": "sub/../sd1-a.safetensors",
    }[kind]
    error = refused(room, OutputIsInput, file)
    assert error.key == "outputs.out.file"
    assert error.line
    assert '"a"' in error.message


@pytest.mark.parametrize(("file", "what"), [("r.toml", "recipe"), ("r.lock", "lock"), ("./r.toml", "recipe")])
def test_output_is_the_recipe_or_its_lock(room, file, what):
    assert what in refused(room, OutputIsInput, file).message


@pytest.mark.parametrize("file", ["/tmp/out.safetensors", "../out.safetensors", "sub/../../out.safetensors", "far/x"])
def test_output_outside_the_allowed_folders(room, tmp_path_factory, file):
    (room / "sub").mkdir()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (room / "far").symlink_to(elsewhere)
    error = refused(room, RecipeError, file)
    assert error.key == "outputs.out.file"
    assert "--output-root" in error.hint
    assert list(elsewhere.iterdir()) == []


def test_output_root_is_allowed(room, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    mk.run(recipe(room, {"a": "sd1-a.safetensors"}), output_root=root)
    assert (root / "out.safetensors").exists()
    assert not (room / "out.safetensors").exists()


@pytest.mark.parametrize("kind", ["name", "dot", "symlink", "hard link"])
def test_two_outputs_into_one_file(room, kind):
    (room / "x.safetensors").write_bytes(b"old")
    (room / "soft.safetensors").symlink_to("x.safetensors")
    os.link(room / "x.safetensors", room / "hard.safetensors")
    files = {"name": "x", "dot": "./x", "symlink": "soft", "hard link": "hard"}
    outputs = {
        "one": {"model": "a", "file": "x.safetensors"},
        "two": {"model": "a", "file": f"{files[kind]}.safetensors"},
    }
    with pytest.raises(RecipeError, match="write one file") as caught:
        mk.run(recipe(room, {"a": "sd1-a.safetensors"}, None, outputs), force=True)
    assert (caught.value.exit_code, caught.value.key) == (2, "outputs.two.file")
    assert '"one"' in caught.value.message
    assert (room / "x.safetensors").read_bytes() == b"old"


def test_output_is_a_folder(room):
    (room / "sub").mkdir()
    assert "folder" in refused(room, UsageError, "sub").message


def test_a_symlinked_target_is_followed(room):
    (room / "sub").mkdir()
    (room / "out.safetensors").symlink_to("sub/real.safetensors")
    mk.run(recipe(room, {"a": "sd1-a.safetensors"}))
    assert (room / "out.safetensors").is_symlink()
    assert models.read(room / "sub" / "real.safetensors")


# --- where models lie --------------------------------------------------------------------------------------


def test_unregistered_root_is_named(room):
    with pytest.raises(MissingInput, match=r'no root called "webui" to look for "x\.safetensors" in') as caught:
        mk.plan(recipe(room, {"a": "webui:x.safetensors"}))
    assert caught.value.exit_code == 3
    assert caught.value.hint == "mergekit-sd roots add webui DIR"


def test_misspelt_root_is_guessed(room):
    mk.add_root("webui", room)
    with pytest.raises(MissingInput) as caught:
        mk.plan(recipe(room, {"a": "webiu:x.safetensors"}))
    assert caught.value.hint == 'did you mean "webui"?'


def test_verify_looks_past_a_root_that_is_not_there(room, tmp_path_factory):
    """The file's recipe says `webui:…`; where no such root is registered, --models finds the file by its name."""
    elsewhere = tmp_path_factory.mktemp("models")
    os.link(room / "sd1-a.safetensors", elsewhere / "x.safetensors")
    mk.add_root("gone", elsewhere)
    mk.run(recipe(room, {"a": "gone:x.safetensors"}))
    roots = mk.roots_file()
    roots.unlink()
    assert mk.verify(room / "out.safetensors", models=elsewhere).same
