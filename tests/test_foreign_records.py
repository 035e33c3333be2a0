"""recover: the records that A1111 and supermerger leave in a file become recipes, or are refused by name."""

from __future__ import annotations

import json
import tomllib

import models
import pytest
import story

import mergekit_sd as mk
from mergekit_sd.architectures import Role, detect
from mergekit_sd.formats.open import open_model
from mergekit_sd.recipe.load import recipe_from_data

SHA = {slot: slot * 64 for slot in "abcde"}


@pytest.fixture
def shell(capsys):
    return story.Shell(capsys)


A1111 = {
    "type": "webui",
    "primary_model_hash": SHA["a"],
    "secondary_model_hash": SHA["b"],
    "tertiary_model_hash": SHA["c"],
    "interp_method": "Weighted sum",
    "multiplier": 0.3,
    "save_as_half": True,
    "custom_name": "",
    "config_source": 0,
    "bake_in_vae": "None",
    "discard_weights": "",
    "is_inpainting": False,
    "is_instruct_pix2pix": False,
}
KNOWN = {
    SHA["a"]: {"name": "sub\\first.safetensors", "legacy_hash": "12345678", "sd_merge_recipe": None},
    SHA["b"]: {"name": "second.safetensors", "legacy_hash": "12345678", "sd_merge_recipe": None},
}
SUPERMERGER = {
    "type": "sd-webui-supermerger",
    "weights_alpha": None,
    "weights_beta": None,
    "weights_alpha_orig": None,
    "weights_beta_orig": None,
    "model_a": SHA["a"],
    "model_b": SHA["b"],
    "model_c": SHA["c"],
    "base_alpha": 0.4,
    "base_beta": 0.2,
    "mode": "Weight sum",
    "mbw": False,
    "elemental_merge": "",
    "calcmode": "normal",
    "Off": [""],
}


def short(data):
    """The data with models as text says them: the file alone where there is nothing else."""
    entries = {name: entry["file"] if list(entry) == ["file"] else entry for name, entry in data["models"].items()}
    return {**data, "models": entries}


def recovered(folder, record, known=KNOWN, small=None):
    """The recipe that a record becomes; it is sound, and its text says the same."""
    metadata = {"format": "pt", "sd_merge_recipe": json.dumps(record)}
    metadata |= {} if known is None else {"sd_merge_models": json.dumps(known)}
    path = models.write(folder / "merged.safetensors", small or {"t": models.torch.ones(2)}, metadata)
    found = mk.recover(path)
    assert tomllib.loads(mk.recipe_text(found.data, found.notes)) == short(found.data)
    return found


def test_a1111_weighted_sum(tmp_path):
    found = recovered(tmp_path, A1111)
    assert found.source == "a1111"
    assert found.notes == ()
    assert found.data == {
        "recipe": 1,
        "title": "merged",
        "models": {
            "a": {"file": "sub/first.safetensors", "sha256": SHA["a"]},
            "b": {"file": "second.safetensors", "sha256": SHA["b"]},
        },
        "steps": {"merge": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3}},
        "outputs": {"output": {"model": "merge", "file": "merged.safetensors"}},
    }


def test_a1111_add_difference_as_it_can_be(tmp_path):
    record = A1111 | {
        "interp_method": "Add difference",
        "multiplier": 1.4,
        "custom_name": "Mine",
        "save_as_half": False,
    }
    data = recovered(tmp_path, record, None).data
    assert data["title"] == "Mine"
    assert data["models"]["c"] == {"file": "cccccccccc.safetensors", "sha256": SHA["c"]}
    assert data["steps"]["merge"] == {
        **{"op": "add_difference", "a": "a", "b": "b", "c": "c"},
        **{"alpha": 1.4, "extrapolate": True},
    }
    assert data["outputs"]["output"]["dtype"] == "keep"


def test_a1111_no_interpolation_with_a_vae(tmp_path):
    record = A1111 | {
        "interp_method": "No interpolation",
        "bake_in_vae": "mse.safetensors",
        "discard_weights": "ema\x1b",
    }
    found = recovered(tmp_path, record | {"secondary_model_hash": None, "tertiary_model_hash": None})
    assert "steps" not in found.data
    assert list(found.data["models"]) == ["a", "vae"]
    assert found.data["outputs"]["output"] == {"model": "a", "file": "merged.safetensors", "vae": "vae"}
    assert found.notes == ("the WebUI left out weights that match 'ema\\x1b'; the recipe does not",)


@pytest.mark.parametrize("mode", ["Weight sum", "Add difference", "Triple sum", "sum Twice", "Weight", "Twice"])
def test_supermerger_modes(tmp_path, mode):
    found = recovered(tmp_path, SUPERMERGER | {"mode": mode})
    step = found.data["steps"]["merge"]
    operations = {"Weight": "weighted_sum", "Add": "add_difference", "Triple": "triple_sum", "Twice": "sum_twice"}
    assert step["op"] == next(operation for word, operation in operations.items() if word in mode)
    assert step["alpha"] == 0.4
    assert step.get("beta") == (0.2 if mode in ("Triple sum", "sum Twice", "Twice") else None)
    assert list(found.data["models"]) == (["a", "b"] if "Weight" in mode else ["a", "b", "c"])
    assert found.data["models"]["b"] == {"file": "second.safetensors", "sha256": SHA["b"]}
    assert found.notes


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("blocks", [models.SD_BLOCKS, [*models.XL_BLOCKS, "slot"], models.XL_BLOCKS])
def test_supermerger_block_weights(tmp_path, blocks, as_text):
    numbers = [round(index / 32, 3) for index in range(len(blocks))]
    weights = ",".join(map(str, numbers)) if as_text else numbers
    more = {"mode": "sum Twice", "mbw": True, "weights_alpha": weights, "weights_beta": weights}
    step = recovered(tmp_path, SUPERMERGER | more).data["steps"]["merge"]
    by_block = {block: number for block, number in zip(blocks, numbers, strict=True) if block != "slot"}
    assert step["alpha"] == {"base": 0.4, **by_block}
    assert step["beta"] == {"base": 0.2, **by_block}


def test_supermerger_beyond_one_and_models_by_name(tmp_path):
    record = SUPERMERGER | {"base_alpha": -0.2, "model_a": "mine.safetensors [0123456789]", "model_b": "other.ckpt"}
    data = recovered(tmp_path, record, None).data
    assert data["models"] == {"a": {"file": "mine.safetensors"}, "b": {"file": "other.ckpt"}}
    assert data["steps"]["merge"]["extrapolate"] is True


CALCULATIONS = {
    "cosineA": ("Weight sum", {"op": "cosine_a", "a": "a", "b": "b", "alpha": 0.4}),
    "cosineB": ("sum Twice", {"op": "cosine_b", "a": "a", "b": "b", "alpha": 0.4}),
    "trainDifference": ("Add", {"op": "train_difference", "a": "a", "b": "b", "c": "c", "alpha": 0.4}),
    "smoothAdd": ("Add difference", {"op": "smooth_add", "a": "a", "b": "b", "c": "c", "alpha": 0.4}),
    "smoothAdd MT": ("Add difference", {"op": "smooth_add", "a": "a", "b": "b", "c": "c", "alpha": 0.4}),
    "extract": ("Add", {"op": "similar_features", **{s: s for s in "abc"}, "alpha": 0.4, "beta": 0.2, "gamma": 0.3}),
    "tensor": ("Weight sum", {"op": "tensor_sum", "a": "a", "b": "b", "alpha": 0.4, "beta": 0.2, "dim": 0}),
    "tensor2": ("Weight sum", {"op": "tensor_sum", "a": "a", "b": "b", "alpha": 0.4, "beta": 0.2, "dim": 1}),
    "self": ("Weight sum", {"op": "scale", "a": "a", "alpha": 0.4}),
    "plus random": ("Weight sum", {"op": "random_noise", "a": "a", "alpha": 0.4}),
}


@pytest.mark.parametrize("calculation", CALCULATIONS)
def test_supermerger_calculations(tmp_path, calculation):
    mode, step = CALCULATIONS[calculation]
    found = recovered(tmp_path, SUPERMERGER | {"mode": mode, "calcmode": calculation})
    assert found.data["steps"] == {"merge": step}
    assert list(found.data["models"]) == [slot for slot in "abc" if slot in step]
    told = {"extract": "gamma", "plus random": "seed"}
    for key, word in told.items():
        assert any(word in note for note in found.notes) == (key == calculation)


@pytest.mark.parametrize("calculation", ["extract", "cosineA", "plus random"])
def test_only_parameters_that_have_block_weights_take_them(tmp_path, calculation):
    numbers = [index / 32 for index in range(25)]
    more = {"mode": CALCULATIONS[calculation][0], "calcmode": calculation, "mbw": True, "weights_beta": "0.1,0.2"}
    step = recovered(tmp_path, SUPERMERGER | more | {"weights_alpha": numbers}).data["steps"]["merge"]
    assert step["alpha"] == {"base": 0.4, **dict(zip(models.SD_BLOCKS, numbers, strict=True))}
    assert step.get("beta") == (0.2 if calculation == "extract" else None)


# --- what supermerger does to each tensor, against what the recipe does -----------------------------


@pytest.fixture(scope="session")
def small_files():
    """The tensors of a small file of each family."""
    return {name: models.checkpoint(name, width=2) for name in ("sd1", "sd2", "sdxl")}


XL_OF_SD = dict(zip(models.XL_BLOCKS, models.SD_BLOCKS, strict=False))


def their_block(name, record, xl):
    """The block that supermerger looks up, or None where it does not merge; XL's by their own names."""
    recent = xl or {"Off", "Include", "Exclude"} & set(record)
    if recent and not ("weight" in name or "bias" in name):
        return None
    if xl and ("label_emb" in name or "time_embed" in name):
        return None
    if "time_embed" in name:
        return "OUT11" if recent else "IN00"
    return models.block_of(name, xl=xl)


def their_words(text, names):
    """Names that a list of blocks means: any that has one of the words in it."""
    words = []
    for word in text.lstrip().split(" "):
        if "-" in word:
            first, last = sorted(names.index(end) for end in word.split("-"))
            words += names[first : last + 1]
        else:
            words.append(word)
    return words


def meant(words, text):
    if words[0] == "NOT":
        return not any(word in text for word in words[1:])
    return any(word in text for word in words)


def their_alpha(name, record, xl):
    """The alpha of a tensor by supermerger's own rules, None where it leaves it as in A."""
    block = their_block(name, record, xl)
    if block is None:
        return None
    for how in ("Include", "Exclude"):
        if how in record and record[how] != [""]:
            chosen = record[how]
            turns = [block in chosen, "VAE" in chosen and "first_stage_model" in name]
            ends = (".input_blocks.0.0.weight", ".input_blocks.0.0.bias", "model.out.0.weight", "model.out.0.bias")
            turns.append("Adjust" in chosen and name.endswith((*ends, "model.out.2.weight", "model.out.2.bias")))
            turns += [
                word in name for word in chosen if word and word not in (*models.SD_BLOCKS, "BASE", "VAE", "Adjust")
            ]
            if (sum(turns) % 2 == 1) == (how == "Exclude"):
                return None
    own = models.XL_BLOCKS if xl else models.SD_BLOCKS
    alpha = record["weights_alpha"][own.index(block)] if record["mbw"] and block != "BASE" else record["base_alpha"]
    names = ["BASE", *models.SD_BLOCKS]
    alias = XL_OF_SD.get(block, block) if xl else block
    for rule in record["elemental_merge"]:
        if rule.count(":") == 2:
            blocks, elements, ratio = rule.split(":")
            if meant(their_words(blocks, names), alias) and meant(elements.split(" "), name + alias):
                alpha = float(ratio)
    return alpha


def our_alpha(path, found):
    """The alpha of each tensor in the recovered recipe, None where it leaves the tensor as in A."""
    layout = detect(open_model(path).tensors)
    names = [name for name, place in layout.places.items() if place.role == Role.weight]
    steps = recipe_from_data(found.data, folder=path.parent).steps
    alpha = steps["merge"].parameters["alpha"].resolve(layout, names)
    kept = steps["kept"].parameters["alpha"].resolve(layout, names) if "kept" in steps else dict.fromkeys(names, 1.0)
    assert set(kept.values()) <= {0.0, 1.0}
    return {name: alpha[name] if kept[name] else None for name in names}


NUMBERS = [round(index / 32, 3) for index in range(25)]
MBW = {"mbw": True, "weights_alpha": NUMBERS}
RECORDS = {
    "plain": {},
    "blocks": MBW,
    "an element": {"elemental_merge": ["OUT03-OUT05:attn1 attn2:0.7"]},
    "several, the last wins": MBW | {"elemental_merge": ["IN04-M00:attn:0.5", " NOT BASE:norm proj:0", "M00::1"]},
    "all but": {"elemental_merge": ["NOT OUT04-IN07:NOT attn:0.9", ":bias:0.1"]},
    "an older version": MBW | {"Off": None, "elemental_merge": ["OUT11:time_embed:1", "IN00:time_embed.0:0.9"]},
    "time_embed by the name of its block": {"elemental_merge": ["OUT11::0.9"]},
    "time_embed by parts": {"elemental_merge": ["OUT11:time_embed.0:0.9", "IN00:time_embed.2:0.8"]},
    "parts of names of blocks": {"elemental_merge": ["OUT0:attn:0.9", "IN M:norm:0.1"]},
    "blanks that mean all": {"elemental_merge": ["OUT03 :attn:0.9", "M00: attn:0.1", " IN04:attn:0.7", "NOT:to_k:0.6"]},
    "no rules": {"elemental_merge": ["", "x", "IN04:attn"]},
    "no tensor": {"elemental_merge": ["IN04:nothing:0.5", "NOT M00:NOT :0.3", "OUT11:attn:0.5"]},
    "base": {"elemental_merge": ["BASE:first_stage_model:0", "BASE-IN01:weight:0.9"]},
    "Exclude blocks": MBW | {"Exclude": ["BASE", "IN04", "OUT11", ""]},
    "Exclude elements": {"Exclude": ["attn2", " norm"]},
    "Exclude both": {"Exclude": ["M00", "OUT03", "attn2"]},
    "Exclude what is adjusted and the VAE": {"Exclude": ["Adjust", "VAE", "BASE", ""]},
    "Include blocks": MBW | {"Include": ["IN04", "IN05", ""], "elemental_merge": ["IN05:attn:1"]},
    "Include elements": {"Include": ["attn2", "net.0"]},
    "Include both": {"Include": ["M00", "IN00", "norm"]},
    "Include the VAE": {"Include": ["VAE", "print", ""]},
    "Include nothing that is there": {"Include": ["print", ""]},
    "Exclude nothing": {"Exclude": ["print", ""]},
    "off": {"Include": [""]},
}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("name", RECORDS)
def test_every_tensor_has_the_weight_that_supermerger_gave_it(tmp_path, small_files, family, name):
    record = SUPERMERGER | RECORDS[name]
    if record["mbw"] and family == "sdxl":
        record["weights_alpha"] = [*NUMBERS[:19], 0]
    if any(key in record for key in ("Include", "Exclude")) or record["Off"] is None:
        del record["Off"]
    found = recovered(tmp_path, record, small=small_files[family])
    ours = our_alpha(tmp_path / "merged.safetensors", found)
    theirs = {each: their_alpha(each, record, family == "sdxl") for each in ours}
    left = {each for each, alpha in theirs.items() if alpha is None}
    assert {each for each in left if ours[each]} == set()
    assert {each: ours[each] for each in ours if each not in left} == {
        each: alpha for each, alpha in theirs.items() if alpha is not None
    }


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_recipe_makes_the_file(tmp_path, small_files, family):
    record = SUPERMERGER | {"elemental_merge": ["OUT00:attn:0.75"], "Exclude": ["IN01", "to_k"]}
    del record["Off"]
    recovered(
        tmp_path, record | {"model_a": "one.safetensors", "model_b": "other.safetensors"}, small=small_files[family]
    )
    a, b = (models.checkpoint(family, seed, width=2) for seed in (1, 2))
    models.write(tmp_path / "one.safetensors", a)
    models.write(tmp_path / "other.safetensors", b)
    found = mk.recover(tmp_path / "merged.safetensors")
    (tmp_path / "r.toml").write_text(mk.recipe_text(found.data), encoding="utf-8")
    mk.run(tmp_path / "r.toml", force=True)
    result = models.read(tmp_path / "merged.safetensors")
    for name in (name for name in a if not models.is_carried(name)):
        alpha = their_alpha(name, record, family == "sdxl")
        oracle = models.f64(a[name]) + (alpha or 0.0) * (models.f64(b[name]) - models.f64(a[name]))
        assert models.error_in_steps(result[name], oracle) < 0.6, name


@pytest.mark.parametrize("calculation", CALCULATIONS)
def test_the_recipe_of_every_calculation_runs(tmp_path, small_files, calculation):
    names = {f"model_{slot}": f"{slot}.safetensors" for slot in "abc"}
    more = {"mode": CALCULATIONS[calculation][0], "calcmode": calculation, "elemental_merge": ["M00:attn1:0.75"]}
    found = recovered(tmp_path, SUPERMERGER | names | more, small=small_files["sdxl"])
    for seed, slot in enumerate("abc"):
        models.write(tmp_path / f"{slot}.safetensors", models.checkpoint("sdxl", seed, width=2))
    (tmp_path / "r.toml").write_text(mk.recipe_text(found.data), encoding="utf-8")
    mk.run(tmp_path / "r.toml", force=True)
    a, result = models.read(tmp_path / "a.safetensors"), models.read(tmp_path / "merged.safetensors")
    left = [name for name in a if not models.is_carried(name) and their_alpha(name, SUPERMERGER | more, True) is None]
    assert len(left) > 5
    assert all(models.same(a[name], result[name]) for name in left)
    merged = [name for name in a if models.UNET in name and name not in left and "to_q" in name]
    assert sum(models.same(a[name], result[name]) for name in merged) < len(merged) / 2


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(("calculation", "alone"), [("self", 1.0), ("plus random", 0.0)])
def test_what_self_and_plus_random_leave_alone(tmp_path, small_files, family, calculation, alone):
    rules = {"elemental_merge": ["IN04:attn1:0", "M00::1.2"]}
    record = SUPERMERGER | rules | {"calcmode": calculation, "base_alpha": 1.01}
    found = recovered(tmp_path, record, small=small_files[family])
    for name, alpha in our_alpha(tmp_path / "merged.safetensors", found).items():
        theirs = their_alpha(name, record, family == "sdxl")
        if not theirs or any(word in name for word in ("to_out", "proj_out", "norm")):
            theirs = alone
        assert alpha == theirs


@pytest.mark.parametrize("calculation", ["extract", "cosineA"])
def test_where_no_alpha_leaves_a_tensor_alone_a_second_step_does(tmp_path, small_files, calculation):
    record = SUPERMERGER | {"mode": CALCULATIONS[calculation][0], "calcmode": calculation}
    found = recovered(tmp_path, record, small=small_files["sdxl"])
    assert found.data["steps"]["merge"]["alpha"] == 0.4
    assert found.data["steps"]["kept"]["a"] == "a"
    assert found.data["steps"]["kept"]["b"] == "merge"
    assert found.data["outputs"]["output"]["model"] == "kept"
    ours = our_alpha(tmp_path / "merged.safetensors", found)
    assert ours == {name: their_alpha(name, record, True) for name in ours}
    found = recovered(tmp_path, record, small=small_files["sd1"])
    assert list(found.data["steps"]) == ["merge"]


def test_both_weights_leave_a_tensor_alone(tmp_path, small_files):
    found = recovered(tmp_path, SUPERMERGER | {"mode": "Triple sum"}, small=small_files["sdxl"])
    step = found.data["steps"]["merge"]
    assert step["alpha"]["*.label_emb.*"] == step["beta"]["*.label_emb.*"] == 0
    assert step["beta"]["default"] == 0.2


def test_what_is_said_of_the_weights(tmp_path, small_files):
    def notes(more, family="sd1"):
        record = SUPERMERGER | more
        if "Exclude" in more or "old" in more:
            del record["Off"]
        return " ".join(recovered(tmp_path, record, small=small_files[family]).notes)

    assert "by SD1's names" in notes({"elemental_merge": ["OUT00::1"]}, "sdxl")
    assert "by SD1's names" not in notes({"elemental_merge": ["IN08:attn:1", ":ff:1"]}, "sdxl")
    assert "by SD1's names" not in notes({"elemental_merge": ["OUT00::1"]})
    assert "time_embed" in notes(MBW | {"old": True})
    assert "time_embed" not in notes(MBW)
    assert "time_embed" not in notes({"old": True})
    assert "undoes" in notes({"Exclude": ["attn", "attn2"]})
    assert "undoes" not in notes({"Exclude": ["attn1", "attn2"]})


def test_ratios_beyond_one(tmp_path, small_files):
    found = recovered(tmp_path, SUPERMERGER | {"elemental_merge": ["M00::1.5"]}, small=small_files["sd1"])
    assert found.data["steps"]["merge"]["extrapolate"] is True


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (A1111 | {"interp_method": "Train difference"}, '"Train difference"'),
        (A1111 | {"interp_method": None}, '"None"'),
        (A1111 | {"secondary_model_hash": None}, "which file model b was"),
        (A1111 | {"multiplier": "x\x1b"}, "cannot be used"),
        (A1111 | {"multiplier": None}, "cannot be used"),
        (SUPERMERGER | {"mode": "Swap\x1b"}, "mode Swap\\x1b"),
        (SUPERMERGER | {"calcmode": "slerp"}, "supermerger, calculation slerp."),
        (SUPERMERGER | {"calcmode": "normal "}, "calculation normal "),
        (SUPERMERGER | {"mode": "Swap", "calcmode": "slerp"}, "mode Swap, calculation slerp"),
        (SUPERMERGER | {"calcmode": "smoothAdd"}, "mode Weight sum with calculation smoothAdd"),
        (SUPERMERGER | {"mode": "Add difference", "calcmode": "tensor"}, "mode Add difference with calculation tensor"),
        (SUPERMERGER | {"elemental_merge": ["OUT05:attn:R"]}, 'elemental rule "OUT05:attn:R"'),
        (SUPERMERGER | {"elemental_merge": ["out05:attn:\x1b"]}, "out05:attn:\\x1b"),
        (SUPERMERGER | {"elemental_merge": ["out05:attn:1"]}, 'elemental rule "out05:attn:1"'),
        (SUPERMERGER | {"model_b": ""}, "which file model b was"),
        (SUPERMERGER | {"base_alpha": "much"}, "no weights in base_alpha"),
        (SUPERMERGER | {"mbw": True, "weights_alpha": [0.5] * 24}, "24 block weights in weights_alpha"),
        (SUPERMERGER | {"mbw": True, "weights_alpha": None}, "no weights in weights_alpha"),
        (SUPERMERGER | {"mbw": True, "weights_alpha": [[]]}, "no weights in weights_alpha"),
    ],
)
def test_records_without_a_counterpart_are_refused_by_name(tmp_path, monkeypatch, shell, record, said):
    monkeypatch.chdir(tmp_path)
    metadata = {"sd_merge_recipe": json.dumps(record), "sd_merge_models": json.dumps(KNOWN)}
    models.write(tmp_path / "x.safetensors", {"t": models.torch.ones(2)}, metadata)
    error = shell.refused("NoRecipe", 3, "recover", "x.safetensors")
    _, err = shell("recover", "x.safetensors", code=3)
    assert said in err
    assert "\x1b" not in err
    assert error["hint"]
