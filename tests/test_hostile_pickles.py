"""Pickles that would do harm: nothing in them runs, and the refusal names what they call.

Each is made here by code; no function that they name is ever imported for it. The names are those of
the test suites of picklescan and fickling, and of the advisories against them.
"""

import copyreg
import os
import pickle
import subprocess

import pickle_files as made
import pytest
from pickle_files import ONE, call, dictionary, name, stack_name, text
from witness import nothing_happens, refuse

from mergekit_sd.errors import MalformedFile, WrongFormat
from mergekit_sd.formats.open import open_model
from mergekit_sd.inspection import identify

# --- nothing runs ---------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """What the payloads would create or call."""

    def shriek(*args, **kwargs):
        raise AssertionError(f"called with {args}")

    for module, of in ((os, "system"), (os, "popen"), (subprocess, "Popen"), (pickle, "loads"), (pickle, "load")):
        monkeypatch.setattr(module, of, shriek)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "canary"


def test_the_witness_sees(tmp_path):
    with pytest.raises(AssertionError), nothing_happens():
        pickle.loads(name("os", "getcwd") + b")R.")
    with pytest.raises(AssertionError), nothing_happens():
        exec("1")


# --- calls ----------------------------------------------------------------------------------------

CALLED = [
    *(f"os {each}" for each in ("system", "popen", "execv", "remove", "spawnl", "putenv")),
    *("posix system", "nt system", "os.path join", "shutil rmtree", "sys exit", "sys settrace"),
    *(f"subprocess {each}" for each in ("Popen", "call", "run", "check_output", "getoutput")),
    *(
        f"builtins {each}"
        for each in ("eval", "exec", "compile", "open", "getattr", "setattr", "globals", "breakpoint")
    ),
    *(f"builtins {each}" for each in ("__import__", "apply", "map", "filter", "type", "vars", "print", "delattr")),
    *("__builtin__ eval", "__builtin__ execfile", "__builtin__ getattr", "commands getoutput"),
    *("torch load", "torch.serialization load", "torch.jit load", "torch.hub load", "torch.storage _load_from_bytes"),
    *("torch.load __call__", "torch._utils _import_dotted_name", "torch.utils.cpp_extension load_inline"),
    *("torch._inductor.codecache compile_file", "torch.utils.collect_env run", "torch.ops load_library"),
    *("torch.utils.collect_env run_and_read_all", "torch.utils.bottleneck.__main__ run_cprofile"),
    *("torch.utils.bottleneck.__main__ run_autograd_prof", "torch._dynamo.guards GuardBuilder.get"),
    *("torch.fx.experimental.symbolic_shapes ShapeEnv.evaluate_guards_expression", "torch._C._jit import_ir_module"),
    *("torch.utils.data.datapipes.utils.decoder basichandlers", "torch.jit.unsupported_tensor_ops execWrapper"),
    *("torch.utils._config_module ConfigModule.load_config", "torch.package PackageImporter", "torch classes"),
    *("numpy load", "numpy.testing._private.utils runstring", "numpy.f2py.crackfortran getlincoef"),
    *("numpy.f2py.crackfortran _eval_length", "numpy.ctypeslib load_library", "numpy.core.multiarray fromfile"),
    *("pickle loads", "_pickle loads", "pickle Unpickler", "cloudpickle loads", "dill loads", "joblib load"),
    *("marshal loads", "types FunctionType", "types CodeType", "shelve open", "pandas read_pickle"),
    *("runpy run_path", "runpy run_module", "runpy _run_code", "importlib import_module", "importlib.util find_spec"),
    *("pkgutil get_loader", "zipimport zipimporter", "code InteractiveInterpreter", "code InteractiveConsole"),
    *(
        "code InteractiveInterpreter.runcode",
        "codeop compile_command",
        "bdb Bdb.run",
        "pdb run",
        "doctest debug_script",
    ),
    *("cProfile run", "cProfile runctx", "profile Profile.run", "profile Profile.runctx", "trace Trace.run"),
    *("trace Trace.runctx", "timeit timeit", "pydoc locate", "pydoc pipepager", "venv create", "ensurepip _run_pip"),
    *("pip main", "webbrowser open", "pty spawn", "ctypes CDLL", "ctypes.util find_library", "_ctypes dlopen"),
    *("operator attrgetter", "operator methodcaller", "operator itemgetter", "functools partial", "functools reduce"),
    *("itertools starmap", "_operator methodcaller", "weakref finalize", "atexit register", "signal signal"),
    *("socket create_connection", "socket socket", "ssl get_server_certificate", "http.client HTTPSConnection"),
    *("httplib HTTPSConnection", "urllib.request urlopen", "requests.api get", "aiohttp.client ClientSession"),
    *("smtplib SMTP", "ftplib FTP", "asyncio create_subprocess_shell", "multiprocessing.util spawnv_passfds"),
    *("asyncio.unix_events _UnixSubprocessTransport._start", "threading Timer", "io FileIO", "io open", "_io FileIO"),
    *(
        "pathlib Path.write_text",
        "pathlib Path.unlink",
        "tempfile mkstemp",
        "linecache getline",
        "logging.config listen",
    ),
    *("distutils.file_util write_file", "lib2to3.pgen2.grammar Grammar.loads", "idlelib.run Executive.runcode"),
    *("lib2to3.pgen2.pgen ParserGenerator.make_label", "idlelib.debugobj ObjectTreeItem.SetText"),
    *(
        "idlelib.autocomplete AutoComplete.get_entity",
        "idlelib.calltip get_entity",
        "idlelib.calltip Calltip.fetch_tip",
    ),
    *("idlelib.pyshell ModifiedInterpreter.runcommand", "tkinter Tcl", "sqlite3 connect", "uuid UUID", "enum Enum"),
    *("collections namedtuple", "copyreg add_extension", "copyreg _extension_registry.clear", "test.support run_code"),
    # What is allowed, but under another roof, or reached through what is allowed.
    *("torch._utils _rebuild_tensor_v2.__globals__.get", "collections OrderedDict.fromkeys", "_codecs decode"),
    *("codecs encode", "mine _rebuild_tensor_v2", "torch", "torch.serialization os.system", "collections.OrderedDict "),
    *("numpy.core.multiarray.scalar __call__", "numpy.dtype mro", "omegaconfig load", "argparse ArgumentParser"),
]


# Modules of Python 2 that Python 3 reads under other names.
RENAMED = {"__builtin__": "builtins", "commands": "subprocess", "httplib": "http.client"}


def payload(called):
    module, _, of = called.partition(" ")
    return module, of, f"{RENAMED.get(module, module)}.{of}"


@pytest.mark.parametrize("called", CALLED)
def test_a_call_is_refused_by_name_in_every_form(canary, called):
    """GLOBAL and STACK_GLOBAL with REDUCE, INST, OBJ; in both containers."""
    module, of, shown = payload(called)
    argument = text("touch canary")
    forms = [
        call(name(module, of), argument),
        call(stack_name(module, of), argument),
        b"(" + argument + f"i{module}\n{of}\n".encode(),
        b"(" + name(module, of) + argument + b"o",
    ]
    for number, form in enumerate(forms):
        old = made.legacy(made.MAGIC, made.PROTOCOL, made.SYSTEM, dictionary(b=form))
        for content in (made.zipped(dictionary(a=ONE, b=form)), old):
            path = canary.with_name(f"{number}.ckpt")
            path.write_bytes(content)
            assert f" calls {shown}, " in refuse(path).message
    assert not canary.exists()


def test_there_are_enough_of_them():
    assert len(set(CALLED)) == len(CALLED) > 100


class Payload:
    def __reduce__(self):
        return os.system, ("touch canary",)


class Started:
    def __reduce__(self):
        return subprocess.Popen, (["touch", "canary"],)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(("harm", "shown"), [(Payload, f"{os.name}.system"), (Started, "subprocess.Popen")])
def test_what_python_itself_pickles(tmp_path, harm, shown, protocol):
    path = tmp_path / "model.pt"
    for value in (harm(), {"state_dict": {"a": harm()}}, {"optimizer": [(), {"x": harm()}]}, {harm(): 1}):
        path.write_bytes(made.zipped(pickle.dumps(value, protocol)))
        assert f" calls {shown}, " in refuse(path).message
        if protocol >= 2:  # without any container: the first thing in the file
            path.write_bytes(pickle.dumps(value, protocol))
            assert f" calls {shown}, " in refuse(path).message


@pytest.mark.parametrize("part", range(5))
def test_every_part_of_an_old_file_is_a_pickle(canary, part):
    parts = [made.MAGIC, made.PROTOCOL, made.SYSTEM, pickle.dumps({}, 2), made.KEYS]
    path = canary.with_name("old.pt")
    harm = call(name("os", "system"), text("touch canary"))
    for data in (b"\x80\x02" + harm + b".", b"\x80\x02" + harm + b"0" + parts[part][2:]):
        path.write_bytes(made.legacy(*parts[:part], data))
        assert " calls os.system, " in refuse(path).message
    assert not canary.exists()


HARM = call(name("os", "system"), text("touch canary"))
TRICKS = {
    "the result thrown away": (HARM + b"0N", "os.system"),
    "thrown away with its mark": (b"(" + HARM + b"1N", "os.system"),
    "texts noted in another order": (
        b"Vsystem\np3\n0Vos\np2\n0Vtorch\np0\n0VLongStorage\np1\n0g2\ng3\n\x93(Vx\ntR",
        "os.system",
    ),
    "texts of Python 2": (b"S'o\\x73'\nS'system'\n\x93S'ls'\n\x85R", "os.system"),
    "texts with other opcodes": (b"\x8c\x02osU\x06system\x93" + b")R", "os.system"),
    "a name noted and called later": (name("os", "system") + b"q\x070" + b"h\x07" + text("x") + b"\x85R", "os.system"),
    "getattr of an import": (
        call(name("builtins", "getattr"), call(name("builtins", "__import__"), text("os")), text("system")),
        "builtins.__import__",
    ),
    "getattr of an allowed class": (
        call(name("builtins", "getattr"), name("collections", "OrderedDict"), text("__init__")),
        "builtins.getattr",
    ),
    "methodcaller of a module": (
        call(call(name("operator", "methodcaller"), text("system")), call(name("pydoc", "locate"), text("os"))),
        "operator.methodcaller",
    ),
    "a call within the tensor's own function": (
        call(name("torch._tensor", "_rebuild_from_type_v2"), name("os", "system"), name("torch", "Tensor"), b"(tN"),
        "os.system",
    ),
    "the same twice over": (
        call(
            name("torch._tensor", "_rebuild_from_type_v2"),
            name("torch._tensor", "_rebuild_from_type_v2"),
            name("torch", "Tensor"),
            b"(" + name("builtins", "eval") + b"N(tNt",
            b"N",
        ),
        "builtins.eval",
    ),
    "an object that is called": (name("functools", "partial") + b")\x81" + b")R", "an object of functools.partial"),
    "an allowed object that is called": (call(name("numpy", "dtype"), text("f4")) + b")R", "an object of numpy.dtype"),
    "an object with a state that is called": (name("x", "Y") + b")\x81}b)R", "an object of x.Y"),
    "a text that is called": (text("os.system") + b")R", "a value of its own making"),
    "nothing that is called": (b"N)R", "a value of its own making"),
    "a number as class": (b"(K\x01o", "a value of its own making"),
    "a storage that is called": (made.storage("0", 1) + b")R", "a value of its own making"),
    "a storage class that is called": (call(name("torch", "FloatStorage"), b"K\x01"), "torch.FloatStorage"),
    "a tensor class that is called": (call(name("torch", "Tensor"), b"K\x01"), "torch.Tensor"),
    "before the pickle breaks": (HARM + b"0\x8c\x02os\x94h\x03h\x00\x93", "os.system"),
    "before a name that is none": (HARM + b"0K\x2a\x94" + text("os") + b"\x93", "os.system"),
    "in the id of a storage": (b"(" + text("storage") + HARM + text("0") + text("cpu") + b"K\x01tQ", "os.system"),
    "a class whose attributes change": (name("collections", "OrderedDict") + b"}b", "collections.OrderedDict"),
    "a module whose attributes change": (name("sys", "modules") + b"}b", "sys.modules"),
    "a pickle in a pickle": (
        call(name("pickle", "loads"), b"C\x05" + b"cx\ny."),
        "pickle.loads",
    ),
    "a pickle in a storage": (call(name("torch.storage", "_load_from_bytes"), b"C\x02N."), "_load_from_bytes"),
    "control characters in the name": (call(name("\x1b[31mo", "s\r")), "\\x1b[31mo.s\\r"),
    "a name in other letters": (call(name("оs", "system")), "оs.system"),
    "a name without end": (call(name("x" * 5000, "y")), "x" * 150),
    "no name": (call(name("", "")), " calls ., "),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks(canary, trick):
    data, shown = TRICKS[trick]
    path = canary.with_name("model.ckpt")
    path.write_bytes(made.zipped(dictionary(a=ONE, b=data), {"0": bytes(4)}))
    message = refuse(path).message
    assert shown in message
    assert message.isprintable()
    assert len(message) < 400
    assert not canary.exists()


@pytest.mark.parametrize("opcode", [b"\x82\x07", b"\x83\x07\x00", b"\x84\x07\x00\x00\x00"])
def test_the_registry_of_extensions_is_not_asked(canary, opcode):
    copyreg.add_extension("os", "system", 7)
    try:
        path = canary.with_name("model.ckpt")
        path.write_bytes(made.zipped(dictionary(a=ONE, b=opcode + text("touch canary") + b"\x85R")))
        assert "copyreg's extension 7" in refuse(path).message
    finally:
        copyreg.remove_extension("os", "system", 7)
    assert not canary.exists()


# --- what is only described -----------------------------------------------------------------------

DESCRIBED = {
    "only named": name("os", "system"),
    "named twice": name("os", "system") + b"0" + name("os", "system"),
    "built without a call": name("os", "system") + text("touch canary") + b"\x85\x81",
    "built with keywords": name("os", "system") + b")" + b"}" + text("a") + b"Ns" + b"\x92",
    "given a state": name("os", "system") + b")\x81}" + text("__setstate__") + name("os", "system") + b"sb",
    "given items": name("os", "system") + b")\x81" + text("a") + b"Ns",
    "given parts": name("os", "system") + b")\x81" + b"Na",
    "made by the oldest protocol": call(
        name("copy_reg", "_reconstructor"), name("os", "system"), name("__builtin__", "object"), b"N"
    ),
    "as the default of a dictionary": call(name("collections", "defaultdict"), name("os", "system")),
    "as the class of an array": call(name("numpy.core.multiarray", "_reconstruct"), name("os", "system"), b")", b"N"),
    "as the class of a tensor": call(
        name("torch._tensor", "_rebuild_from_type_v2"),
        name("torch._utils", "_rebuild_tensor_v2"),
        name("os", "system"),
        b"(" + made.storage("0", 1) + b"K\x00K\x01\x85K\x01\x85\x89Nt",
        b"}",
    ),
    "as a key": b"}" + name("os", "system") + b"Ns",
}


@pytest.mark.parametrize("way", DESCRIBED)
def test_what_is_only_described_is_reported(canary, way):
    path = canary.with_name("model.ckpt")
    path.write_bytes(made.zipped(b"\x80\x02}(" + text("a") + ONE + text("b") + DESCRIBED[way] + b"u.", {"0": bytes(4)}))
    with nothing_happens():
        model = open_model(path)
    assert "a" in model.tensors
    assert any("os.system" in note for note in model.notes)
    assert not canary.exists()


def test_a_hostile_file_still_has_its_file_hashes(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(made.zipped(dictionary(a=HARM)))
    found = identify(path)
    assert found.content is None
    assert "os.system" in found.no_content
    assert len(found.file.sha256) == 64


# --- other pickles in the file --------------------------------------------------------------------


def test_pickles_behind_and_beside_the_pickle(canary):
    path = canary.with_name("model.ckpt")
    good, bad = dictionary(a=ONE), dictionary(b=HARM)
    path.write_bytes(made.zipped(good + bad, {"0": bytes(4)}))
    assert "no part of it" in refuse(path, MalformedFile).message
    path.write_bytes(made.zipped(good, {"0": bytes(4)}, more={"archive/x/data.pkl": bad}))
    assert "2 pickles" in refuse(path, MalformedFile).message
    path.write_bytes(made.legacy(made.MAGIC, made.PROTOCOL, made.SYSTEM, pickle.dumps({}), made.KEYS, bad))
    assert f"{len(bad)} bytes" in refuse(path, MalformedFile).message
    path.write_bytes(made.zipped(good, {"0": bytes(4)}, more={"archive/other.pkl": bad, "archive/code/x.py": b"1"}))
    with nothing_happens():
        assert list(open_model(path).tensors) == ["a"]  # nothing ever looks at it
    assert not canary.exists()


def test_a_program_is_told_apart(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(made.zipped(dictionary(a=ONE), {"0": bytes(4)}, more={"archive/constants.pkl": b"N."}))
    assert "TorchScript" in refuse(path, WrongFormat).message
    path.write_bytes(made.zipped(b"\x80\x02" + name("my.model", "Net") + b")\x81}b."))
    assert "an object of my.model.Net" in refuse(path, WrongFormat).message
    for other in (pickle.dumps([1, 2]), pickle.dumps({"a": 1}, 2), pickle.dumps(5)):
        path.write_bytes(other)
        assert "not one of PyTorch's" in refuse(path, WrongFormat).message
