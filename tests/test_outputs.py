"""What an output holds: dtypes, overflow, VAE, EMA, junk, position_ids, prediction, and what each refuses."""

from __future__ import annotations

import models
import pytest
import torch
from models import DTYPES, bits, error_in_steps, f64, is_carried, recipe, same

import mergekit_sd as mk
from mergekit_sd.errors import DtypeOverflow, MissingTensors, NonFiniteResult, RecipeError, ShapeMismatch

IDS = models.POSITION_IDS["sd1"]


def make(folder, names, steps=None, *, options=None, **output):
    """Run one output, and read it."""
    last = [*names, *(steps or {})][-1] if "model" not in output else output.pop("model")
    outputs = {"out": {"model": last, "file": "out.safetensors", **output}}
    files = {name: f"{name}.safetensors" if isinstance(name, str) else name for name in names}
    files |= names if isinstance(names, dict) else {}
    report = mk.run(recipe(folder, files, steps, outputs), **(options or {}))
    return models.read(folder / "out.safetensors"), report


def refused(folder, error, names, steps=None, **rest):
    """The refusal; the folder is as it was but for the recipe."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(error) as caught:
        make(folder, names, steps, **rest)
    after = {path: path.read_bytes() for path in folder.iterdir() if path.name != "r.toml"}
    assert after == {path: data for path, data in before.items() if path.name != "r.toml"}
    return caught.value


SUM = {"m": {"op": "weighted_sum", "a": "a", "b": "b", "alpha": 0.3}}


def put(folder, **each):
    for name, tensors in each.items():
        models.write(folder / f"{name}.safetensors", tensors)
    return list(each)


# --- dtype ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "fp8_e4m3fn", "fp8_e5m2"])
def test_dtype_of_merged_and_cast(tmp_path, dtype):
    a, b = models.checkpoint("sd1", 1, "fp32"), models.checkpoint("sd1", 2, "fp16")
    names = put(tmp_path, a=a, b=b)
    table = {"default": 0.3, "vae": 0.0}  # the VAE is only cast
    made, report = make(tmp_path, names, {"m": {**SUM["m"], "alpha": table}}, dtype=dtype)
    for key, tensor in made.items():
        if is_carried(key):
            assert same(tensor, a[key]), key
        elif key.startswith(models.VAE):
            assert same(tensor, a[key].to(DTYPES[dtype])), key
        else:
            assert tensor.dtype == DTYPES[dtype]
            oracle = 0.7 * f64(a[key]) + 0.3 * f64(b[key])
            if dtype == "fp32":  # the arithmetic's own precision
                assert abs(f64(tensor) - oracle).max() <= 3e-8, key
            else:
                assert error_in_steps(tensor, oracle, dtype) <= 0.6, key
    vae = sum(key.startswith(models.VAE) for key in a)
    assert report.outputs[0].counts["copied" if dtype == "fp32" else "cast"] >= vae


def test_keep_is_the_first_operands_dtype_tensor_by_tensor(tmp_path):
    a, b = models.checkpoint("sd1", 1), models.checkpoint("sd1", 2, "fp32")
    kinds = [torch.float16, torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
    a = {k: v if is_carried(k) else v.to(kinds[n % 5]) for n, (k, v) in enumerate(a.items())}
    made, _ = make(tmp_path, put(tmp_path, a=a, b=b), SUM, dtype="keep")
    assert {key: each.dtype for key, each in made.items()} == {key: each.dtype for key, each in a.items()}


def test_dtype_by_component(tmp_path):
    a, b = models.checkpoint("sd1", 1, "fp32"), models.checkpoint("sd1", 2)
    dtype = {"default": "bf16", "unet": "fp16", "vae": "fp32", "text_encoder": "keep"}
    b = {key: each if is_carried(key) else each.half() for key, each in b.items()}
    made, _ = make(tmp_path, put(tmp_path, b=b, a=a), {"m": {**SUM["m"], "a": "b", "b": "a"}}, dtype=dtype)
    for key, each in made.items():
        if is_carried(key):
            continue
        wanted = torch.float32 if key.startswith(models.VAE) else torch.float16
        assert each.dtype == wanted, key


def test_same_dtype_is_a_copy_to_the_bit(tmp_path):
    a = models.checkpoint("sd1", 1)
    strange = models.UNET + "time_embed.0.bias"
    a[strange] = torch.tensor([float("nan"), -0.0, float("inf"), 6e-8]).half()
    made, report = make(tmp_path, put(tmp_path, a=a))
    assert all(same(made[key], a[key]) for key in a)
    counts = report.outputs[0].counts
    assert counts["merged"] == counts["cast"] == 0


# --- overflow ------------------------------------------------------------------------------------------

LARGEST = {"fp16": 65504.0, "bf16": 3.3895313892515355e38, "fp8_e4m3fn": 448.0, "fp8_e5m2": 57344.0}


def boundary(dtype):
    """float32 values about the end of a dtype: each with its two neighbours, both signs."""
    largest = LARGEST[dtype]
    step = models.PRECISION[dtype][0]
    half = largest * (1 + 2.0 ** -(step + 1) / (2 - 2.0**-step)) if dtype != "fp8_e4m3fn" else 464.0
    values = [largest, half, largest * 0.99]
    around = [torch.tensor(v, dtype=torch.float32) for v in values]
    ends = [torch.tensor(s * torch.inf) for s in (1, -1)]
    near = [each for v in around for each in (v, torch.nextafter(v, ends[0]), torch.nextafter(v, ends[1]))]
    return torch.stack(near + [-each for each in near])


@pytest.mark.parametrize("dtype", sorted(LARGEST))
def test_overflow_is_where_torch_casts_to_infinity(tmp_path, dtype):
    values = boundary(dtype)
    over = ~torch.isfinite(values.to(DTYPES[dtype]).float())
    if dtype == "fp8_e4m3fn":  # some versions of torch saturate; 464 is the last that rounds to 448
        over = values.abs() > 464
    assert 2 <= int(over.sum()) < len(values) - 2, "the values lie on both sides"
    names = put(tmp_path, a={"bad": values, "good": values[~over], "fine": torch.ones(70)})
    error = refused(tmp_path, DtypeOverflow, names, dtype=dtype)
    assert error.exit_code == 3
    largest = f"{float(values.abs().max()):.6g}"
    assert error.details == (f"bad: {int(over.sum())} elements, largest {largest}",)
    assert "clamp" in error.hint
    made, report = make(tmp_path, names, dtype=dtype, overflow="clamp")
    assert report.outputs[0].clamped == {"bad": int(over.sum())}
    limit = torch.tensor(LARGEST[dtype])
    assert same(made["bad"], values.clamp(-limit, limit).to(DTYPES[dtype]))
    assert same(made["good"], values[~over].to(DTYPES[dtype]))


def test_overflow_lists_every_tensor(tmp_path):
    big = torch.full((300_000,), 1e5)
    names = put(tmp_path, a={"x": big, "y": -2 * big, "z": torch.ones(3)})
    error = refused(tmp_path, DtypeOverflow, names)
    assert error.details == ("x: 300,000 elements, largest 100000", "y: 300,000 elements, largest 200000")


def test_clamp_leaves_infinity_to_its_own_refusal(tmp_path):
    names = put(tmp_path, a={"x": torch.tensor([1e6, float("inf"), float("nan"), 1.0])})
    error = refused(tmp_path, NonFiniteResult, names, overflow="clamp")
    assert error.details == ("x: 2 elements",)
    made, report = make(tmp_path, names, overflow="clamp", options={"allow_nonfinite": True})
    assert made["x"][0] == 65504
    assert torch.isinf(made["x"][1])
    assert torch.isnan(made["x"][2])
    assert (report.outputs[0].clamped, report.outputs[0].nonfinite) == ({"x": 1}, {"x": 2})


# --- VAE -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", models.VAE])
@pytest.mark.parametrize("dtype", ["fp16", "keep"])
def test_bake_a_vae_file(tmp_path, prefix, dtype):
    a, vae = models.checkpoint("sd1", 1), models.vae_file(9, "fp32", prefix=prefix)
    extras = {"loss.logvar": torch.ones(1), "model_ema.decay": torch.tensor(0.9), "loss.discriminator.x": torch.ones(2)}
    names = put(tmp_path, a=a, vae=vae | extras)
    made, _ = make(tmp_path, names, model="a", vae="vae", dtype=dtype)
    assert set(made) == set(a)
    for key, tensor in made.items():
        if key.startswith(models.VAE):
            source = vae[prefix + key.removeprefix(models.VAE)]
            assert same(tensor, source if dtype == "keep" else source.half()), key
        else:
            assert same(tensor, a[key]), key


def test_bake_from_a_checkpoint_and_from_a_step(tmp_path):
    a, b = models.checkpoint("sd1", 1), models.checkpoint("sd1", 2)
    names = put(tmp_path, a=a, b=b)
    made, _ = make(tmp_path, names, model="a", vae="b")
    assert all(same(made[key], (b if key.startswith(models.VAE) else a)[key]) for key in a)
    made, _ = make(tmp_path, names, SUM, model="a", vae="m", options={"force": True})
    for key in a:
        if key.startswith(models.VAE):
            assert error_in_steps(made[key], 0.7 * f64(a[key]) + 0.3 * f64(b[key])) <= 0.6
        else:
            assert same(made[key], a[key])


def test_bake_refuses_what_does_not_fit(tmp_path):
    a, vae = models.checkpoint("sd1", 1), models.vae_file()
    lost = "decoder.conv_out.weight"
    wide = {key: torch.zeros(5, *each.shape[1:]) if key == lost else each for key, each in vae.items()}
    unet = {key: each for key, each in a.items() if key.startswith(models.UNET)}
    lacking = {key: each for key, each in vae.items() if key != lost}
    put(tmp_path, a=a, lacking=lacking, wide=wide, unet=unet, vae=vae)
    error = refused(tmp_path, MissingTensors, ["a", "lacking"], model="a", vae="lacking")
    assert error.details == (models.VAE + lost,)
    assert "lacking" in error.message
    error = refused(tmp_path, ShapeMismatch, ["a", "wide"], model="a", vae="wide")
    assert error.key == models.VAE + lost
    assert '"unet" has no VAE' in refused(tmp_path, MissingTensors, ["a", "unet"], model="a", vae="unet").message
    assert (
        "has no VAE to replace" in refused(tmp_path, MissingTensors, ["unet", "vae"], model="unet", vae="vae").message
    )
    assert error.exit_code == 3


# --- EMA -----------------------------------------------------------------------------------------------


def test_ema_is_dropped_kept_or_used(tmp_path):
    plain = models.checkpoint("sd1", 1)
    full = models.with_ema(plain)
    ema = {key for key in full if key.startswith("model_ema.")}
    names = put(tmp_path, a=full)
    made, report = make(tmp_path, names)
    assert set(made) == set(plain)
    assert report.outputs[0].dropped == {"ema": len(ema)}
    made, _ = make(tmp_path, names, ema="keep", options={"force": True})
    assert set(made) == set(full)
    for key in ema - {"model_ema.decay", "model_ema.num_updates"}:
        assert same(made[key], full[key].half())
    assert made["model_ema.decay"].dtype == torch.float32  # in float16 it would be 1
    assert made["model_ema.num_updates"] == 7
    used = {"file": "a.safetensors", "weights": "ema"}
    made, _ = make(tmp_path, {"a": used}, options={"force": True})
    assert set(made) == set(plain)
    for key in plain:
        twin = "model_ema." + key.removeprefix("model.").replace(".", "")
        assert same(made[key], full[twin].half() if key.startswith(models.UNET) else plain[key]), key


def test_ema_after_a_merge_is_stale(tmp_path):
    names = put(tmp_path, a=models.with_ema(models.checkpoint("sd1", 1)), b=models.checkpoint("sd1", 2))
    error = refused(tmp_path, RecipeError, names, SUM, ema="keep")
    assert "stale" in error.message
    assert (error.exit_code, error.key) == (2, "outputs.out.ema")
    assert error.line
    # The UNet of another model, whole, is no better; a merged text encoder is no matter.
    swap = {"m": {**SUM["m"], "alpha": {"default": 0, "unet": 1}}}
    assert "stale" in refused(tmp_path, RecipeError, names, swap, ema="keep").message
    encoder = {"m": {**SUM["m"], "alpha": {"default": 0, "text_encoder": 0.5}}}
    made, _ = make(tmp_path, names, encoder, ema="keep")
    assert "model_ema.decay" in made


def test_ema_weights_that_are_not_there(tmp_path):
    tensors = models.with_ema(models.checkpoint("sd1", 1))
    gone = "model_ema.diffusion_modelinput_blocks00weight"
    put(tmp_path, a={key: each for key, each in tensors.items() if key != gone}, b=models.checkpoint("sd1"))
    error = refused(tmp_path, MissingTensors, {"a": {"file": "a.safetensors", "weights": "ema"}})
    assert error.details == (models.CONV_IN,)
    assert error.file.endswith("a.safetensors")
    error = refused(tmp_path, MissingTensors, {"b": {"file": "b.safetensors", "weights": "ema"}})
    assert len(error.details) == 686


# --- junk, position_ids --------------------------------------------------------------------------------------


def test_junk(tmp_path):
    plain = models.checkpoint("sd1", 1)
    junk = {"optimizer.step": torch.ones(3), "cond_stage_model.transformer.text_projection": torch.ones(2, 2)}
    names = put(tmp_path, a=plain | junk)
    made, report = make(tmp_path, names)
    assert set(made) == set(plain)
    assert report.outputs[0].dropped == {"junk": 2}
    made, report = make(tmp_path, names, junk="keep", options={"force": True})
    assert set(made) == set(plain) | set(junk)
    assert report.outputs[0].dropped == {}


RIGHT = torch.arange(77).reshape(1, 77)


@pytest.mark.parametrize(
    "stored",
    [RIGHT, RIGHT.float() * 0.96, RIGHT.clone().index_fill(1, torch.tensor([4, 9]), 3), RIGHT.half(), RIGHT[0]],
    ids=["good", "corrupt float", "corrupt", "float16", "flat"],
)
def test_position_ids(tmp_path, stored):
    a = models.checkpoint("sd1", 1) | {IDS: stored}
    names = put(tmp_path, a=a)
    made, _ = make(tmp_path, names)
    assert same(made[IDS], RIGHT)
    made, _ = make(tmp_path, names, position_ids="keep", dtype="fp32", options={"force": True})
    assert same(made[IDS], stored)


def test_position_ids_that_are_missing_stay_missing(tmp_path):
    a = models.checkpoint("sd1", 1)
    del a[IDS]
    made, _ = make(tmp_path, put(tmp_path, a=a))
    assert IDS not in made


def test_merged_position_ids_never_rot(tmp_path):
    a, b = models.checkpoint("sd1", 1), models.checkpoint("sd1", 2)
    b[IDS] = RIGHT.float() * 0.9
    made, _ = make(tmp_path, put(tmp_path, a=a, b=b), {"m": {**SUM["m"], "alpha": 0.04}}, position_ids="keep")
    assert same(made[IDS], RIGHT)


# --- prediction ------------------------------------------------------------------------------------------------

V = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}


def xl(seed, *, v=False):
    return models.checkpoint("sdxl", seed) | (V if v else {})


def test_parents_that_disagree_are_refused(tmp_path):
    names = put(tmp_path, a=xl(1), b=xl(2, v=True))
    error = refused(tmp_path, RecipeError, names, SUM)
    for word in ('"a" epsilon', '"b" v'):
        assert word in error.message
    assert (error.exit_code, error.key) == (2, "outputs.out")
    assert "prediction" in error.hint


@pytest.mark.parametrize("said", ["v", "epsilon"])
@pytest.mark.parametrize("first_is_v", [True, False])
def test_said_prediction_sets_the_markers(tmp_path, said, first_is_v):
    names = put(tmp_path, a=xl(1, v=first_is_v), b=xl(2, v=not first_is_v))
    made, _ = make(tmp_path, names, SUM, prediction=said)
    assert ("v_pred" in made) == (said == "v")
    assert ("ztsnr" in made) == (said == "v" and first_is_v)
    assert models.metadata(tmp_path / "out.safetensors")["modelspec.prediction_type"] == said


@pytest.mark.parametrize("b_is_v", [True, False])
def test_markers_go_with_the_unet(tmp_path, b_is_v):
    """The UNet of b, whole, in a's file: what it predicts comes with it."""
    names = put(tmp_path, a=xl(1, v=not b_is_v), b=xl(2, v=b_is_v))
    swap = {"m": {**SUM["m"], "alpha": {"default": 0.3, "unet": 1.0}}}
    made, _ = make(tmp_path, names, swap)
    assert models.metadata(tmp_path / "out.safetensors")["modelspec.prediction_type"] == ("v" if b_is_v else "epsilon")
    assert {key for key in made if key in V} == (set(V) if b_is_v else set())


def test_prediction_of_a_baked_vae_is_no_matter(tmp_path):
    names = put(tmp_path, a=xl(1), b=xl(2, v=True))
    make(tmp_path, names, model="a", vae="b")
    assert models.metadata(tmp_path / "out.safetensors")["modelspec.prediction_type"] == "epsilon"


@pytest.mark.parametrize(("spread", "predicts", "named"), [(0.2, "v", "768-v"), (0.02, "epsilon", "512")])
def test_sd2_is_told_by_its_last_norm(tmp_path, spread, predicts, named):
    a = models.checkpoint("sd2", 1, "bf16")
    telltale = models.UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    a[telltale] = torch.tensor([-1.0, 1.0, -1.0, 1.0]).bfloat16() * spread
    make(tmp_path, put(tmp_path, a=a))
    found = models.metadata(tmp_path / "out.safetensors")
    assert found["modelspec.prediction_type"] == predicts
    assert named in found["modelspec.architecture"]


# --- mixed VAEs ------------------------------------------------------------------------------------------------


def test_warning_of_mixed_vaes(tmp_path):
    a, b, c = (models.checkpoint("sd1", seed) for seed in range(3))
    vae = {key: each for key, each in a.items() if key.startswith(models.VAE)}
    put(tmp_path, a=a, b=b, c=c, twin=c | vae, fp32=c | {key: each.float() for key, each in vae.items()})
    put(tmp_path, vae=models.vae_file())

    def warned(first, second, op="weighted_sum", third=None, alpha=0.5, **output):
        names = {each: f"{each}.safetensors" for each in ("a", "b", "c", "twin", "fp32", "vae")}
        step = {"op": op, "a": first, "b": second, "alpha": alpha} | ({"c": third} if third else {})
        outputs = {"out": {"model": "m", "file": "out.safetensors", **output}}
        where = recipe(tmp_path, names, {"m": step}, outputs)
        return any("mixes the different VAEs" in each for each in mk.plan(where).warnings)

    assert warned("a", "b")
    assert not warned("a", "twin")
    assert not warned("a", "fp32")
    assert not warned("a", "b", alpha={"default": 0.5, "vae": 0})
    assert not warned("a", "b", alpha={"default": 0.5, "vae": 1})
    assert not warned("a", "b", vae="vae")
    assert not warned("b", "a", "add_difference", "twin")
    assert warned("a", "b", "add_difference", "c")


# --- scan ----------------------------------------------------------------------------------------------------------


def test_copied_tensors_are_looked_at_with_scan_only(tmp_path):
    a = {"x": torch.tensor([1.0, float("nan")]).half(), "y": torch.ones(3).half(), "n": torch.arange(3)}
    names = put(tmp_path, a=a)
    made, _ = make(tmp_path, names)
    assert bits(made["x"]) == bits(a["x"])
    (tmp_path / "out.safetensors").unlink()
    (tmp_path / "r.lock").unlink()
    error = refused(tmp_path, NonFiniteResult, names, options={"scan": True})
    assert error.details == ("x: 1 element",)
    assert error.exit_code == 3
    made, report = make(tmp_path, names, options={"scan": True, "allow_nonfinite": True})
    assert report.outputs[0].nonfinite == {"x": 1}


def test_scan_of_large_float64_numbers(tmp_path):
    names = put(tmp_path, a={"x": torch.tensor([1e300, -1.0], dtype=torch.float64)})
    made, _ = make(tmp_path, names, dtype="keep", options={"scan": True})
    assert made["x"].tolist() == [1e300, -1.0]
