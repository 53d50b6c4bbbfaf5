"""Recipes: which rule takes which layer, and every fault of a recipe named together with its fix."""

from __future__ import annotations

import pytest

from engines.errors import UserError
from exporter import recipe
from exporter.checkpoint import open_checkpoint
from exporter.formats.fp import Format as Fp
from exporter.formats.int import Format as Int
from exporter.plan import plan_of
from exporter.recipe import CalibrationSpec, WeightSpec
from exporter.specs import LayerFacts

BLOCKS = ["blocks.0", "blocks.1", "blocks.10"]
LAYERS = [
    "pos_embed.proj",
    *[f"{block}.{leaf}" for block in BLOCKS for leaf in ("norm1.emb.linear_1", "attn1.to_q", "ff.net.2")],
    "proj_out",
]
LINEAR, CONV = LayerFacts(False, 128, False, weights=16384), LayerFacts(True, 64, False, weights=36864)
DIT = dict.fromkeys(LAYERS, LINEAR) | {"pos_embed.proj": LayerFacts(True, 4, False, weights=1024)}
UNET = {
    "conv_in": LayerFacts(True, 3, False, weights=1728),
    "blocks.0.conv": CONV,
    "blocks.0.narrow": LayerFacts(True, 8, False, weights=4608),
    "blocks.1.grouped": LayerFacts(True, 64, grouped=True, weights=4608),
    "blocks.1.to_q": LINEAR,
    "blocks.10.small": LayerFacts(False, 8, False, weights=8192),
}
REST = '[[rule]]\nlayers = "*"\nkeep = "float"\n'
INT8 = '{ format = "int", bits = 8 }'


WEIGHT = f'layers = "*"\nweight = {INT8}\n'


def rule(text: str) -> str:
    return f"[[rule]]\n{text}\n"


def weight(spec: str) -> str:
    return rule(f'layers = "*"\nweight = {{ {spec} }}')


def activation(spec: str) -> str:
    return rule(f"{WEIGHT}activation = {{ {spec} }}")


def method(spec: str) -> str:
    return rule(f"{WEIGHT}method = {{ {spec} }}")


def calibration(line: str) -> str:
    return f"[calibration]\n{line}\n{REST}"


@pytest.fixture
def load(tmp_path):
    """Loads a recipe from its text."""

    def load(text: str, name: str = "mine.toml") -> recipe.Recipe:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return recipe.load(str(path))

    return load


@pytest.mark.parametrize("name", recipe.names())
def test_shipped_recipes_cover_a_dit(name):
    shipped = recipe.load(name)
    assert shipped.name == name
    rules = shipped.assign(DIT, BLOCKS)
    assert list(rules) == LAYERS
    assert rules["pos_embed.proj"].weight is None
    assert rules["proj_out"].weight is None


def test_shipped_recipes_say_what_their_names_say():
    assert {"fp16", "fp8", "int4", "int8", "fp4-fp8"} <= set(recipe.names())
    layers = {name: recipe.load(name).assign(DIT, BLOCKS)["blocks.0.attn1.to_q"] for name in recipe.names()}
    assert layers["fp16"].weight is None
    assert layers["fp8"].weight == WeightSpec(Fp(4, 3), "channel")
    assert layers["fp8"].activation.format == Fp(4, 3)
    assert layers["int8"].weight == WeightSpec(Int(8), "channel")
    assert layers["int8"].method.name == "smoothquant"
    assert layers["int8"].method.options.alpha == 0.5
    assert layers["int8"].method.options.multiply is True
    assert layers["int4"].weight == WeightSpec(Int(4), "block", 64)
    assert layers["int4"].activation is None
    assert {fmt.bits for fmt in layers["fp4-fp8"].weight.candidates} == {4}
    assert layers["fp4-fp8"].activation.format == Fp(4, 3)
    assert layers["fp4-fp8"].method.name == "fp_search"


def test_the_first_matching_rule_wins(load):
    made = load(
        rule(f'layers = "blocks.*.attn1.*"\nweight = {INT8}')
        + rule('layers = "blocks.*"\nweight = { format = "int", bits = 4 }')
        + REST
    )
    rules = made.assign(DIT, BLOCKS)
    assert rules["blocks.1.attn1.to_q"].weight.format == Int(8)
    assert rules["blocks.1.ff.net.2"].weight.format == Int(4)
    assert rules["proj_out"].weight is None


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("blocks.1.*", 3),
        ("blocks.1*", 6),
        ("blocks.?.*", 6),
        ("blocks.[01].*", 6),
        ("*.to_q", 3),
        ("proj_out", 1),
        ("*", len(LAYERS)),
    ],
)
def test_patterns_match_whole_paths_as_a_shell_does(load, pattern, matched):
    rules = load(
        rule(f'layers = "{pattern}"\nweight = {INT8}') + REST.replace("[[rule]]\n", "[[rule]]\noptional = true\n")
    )
    assigned = rules.assign(DIT, BLOCKS)
    assert sum(r.weight is not None for r in assigned.values()) == matched


def test_patterns_tell_upper_from_lower_case(load):
    with pytest.raises(UserError, match="PROJ_OUT"):
        load(rule('layers = "PROJ_OUT"\nkeep = "float"') + REST).assign(DIT, BLOCKS)


@pytest.mark.parametrize(
    ("scope", "matched"),
    [
        ("all", set(LAYERS)),
        ("blocks", {path for path in LAYERS if path.startswith("blocks.")}),
        ("outside_blocks", {"pos_embed.proj", "proj_out"}),
    ],
)
def test_scope_says_which_part_of_the_model_a_rule_ranges_over(load, scope, matched):
    made = load(
        rule(f'layers = "*"\nscope = "{scope}"\nweight = {INT8}')
        + rule('layers = "*"\noptional = true\nkeep = "float"')
    )
    assert {p for p, r in made.assign(DIT, BLOCKS).items() if r.weight is not None} == matched


@pytest.mark.parametrize(
    ("words", "matched"),
    [
        ('type = "any"', set(UNET)),
        ('type = "conv"', {"conv_in", "blocks.0.conv", "blocks.0.narrow", "blocks.1.grouped"}),
        ('type = "linear"', {"blocks.1.to_q", "blocks.10.small"}),
        ("grouped = true", {"blocks.1.grouped"}),
        ("grouped = false", set(UNET)),
        ("narrower_than = 16", {"conv_in", "blocks.0.narrow", "blocks.10.small"}),
        ("narrower_than = 8", {"conv_in"}),
        ("fewer_weights_than = 8193", {"conv_in", "blocks.0.narrow", "blocks.1.grouped", "blocks.10.small"}),
        ('fewer_weights_than = 8193\ntype = "linear"', {"blocks.10.small"}),
        ('type = "conv"\nnarrower_than = 16', {"conv_in", "blocks.0.narrow"}),
        ('type = "conv"\nscope = "blocks"\nnarrower_than = 16', {"blocks.0.narrow"}),
        ('type = "linear"\ngrouped = true', set()),
    ],
)
def test_a_rule_takes_the_layers_that_all_its_conditions_fit(load, words, matched):
    made = load(
        rule(f'layers = "*"\noptional = true\n{words}\nweight = {INT8}')
        + rule('layers = "*"\noptional = true\nkeep = "float"')
    )
    assert {p for p, r in made.assign(UNET, BLOCKS).items() if r.weight is not None} == matched


def test_a_rule_whose_conditions_fit_no_layer_is_an_error(load):
    made = load(rule(f'layers = "blocks.1.to_q"\ntype = "conv"\nweight = {INT8}') + REST)
    with pytest.raises(UserError, match=r"rule 1: layers = 'blocks\.1\.to_q'"):
        made.assign(UNET, BLOCKS)


def test_a_model_without_layers_has_nothing_to_quantize(load):
    with pytest.raises(UserError, match="no Linear or Conv2d"):
        load(REST).assign({}, BLOCKS)


@pytest.mark.parametrize("name", sorted({*recipe.names()} - {"fp16"}))
def test_shipped_recipes_keep_convolutions_that_no_kernel_gains_from(name):
    rules = recipe.load(name).assign(UNET, BLOCKS)
    assert {p for p, r in rules.items() if r.weight is not None} == {
        "blocks.0.conv",
        "blocks.1.to_q",
        "blocks.10.small",
    }


@pytest.mark.parametrize("name", sorted(recipe.names()))
@pytest.mark.parametrize("model", ["digits-dit", "shapes-unet"])
def test_every_shipped_recipe_fits_every_shipped_model(name, model):
    checkpoint = open_checkpoint(model)
    specs = plan_of(checkpoint, recipe.load(name)).specs
    assert (len(specs) > 30) == (name != "fp16")


def test_shipped_recipes_split_skips_where_they_quantize_activations():
    rules = {name: recipe.load(name).assign(UNET, BLOCKS)["blocks.0.conv"] for name in recipe.names()}
    assert {n for n, found in rules.items() if found.split_skips} == {
        n for n, found in rules.items() if found.activation
    }
    assert rules["int4"].weight == WeightSpec(Int(4), "block", 32)


def test_a_block_is_not_taken_for_one_whose_number_begins_alike(load):
    made = load(rule(f'layers = "*"\nscope = "blocks"\nweight = {INT8}') + REST)
    rules = made.assign({"blocks.1.a": LINEAR, "blocks.10.a": LINEAR}, ["blocks.1"])
    assert [r.weight is not None for r in rules.values()] == [True, False]


def test_what_a_rule_leaves_out_has_a_default(load):
    made = load(rule(f'layers = "*"\nweight = {INT8}\nactivation = {INT8}'))
    (only,) = made.rules
    assert (only.scope, only.optional, only.method.name) == ("all", False, "rtn")
    assert (only.type, only.grouped, only.narrower_than, only.split_skips) == ("any", False, None, False)
    assert (only.weight.granularity, only.weight.block_size, only.activation.observer) == ("channel", 0, "absmax")
    assert made.calibration == CalibrationSpec(samples=64, record_steps=None)


def test_calibration_is_read_and_its_steps_are_put_in_order(load):
    made = load(calibration("samples = 3\nrecord_steps = [5, 0, 5, 2]"))
    assert made.calibration == CalibrationSpec(samples=3, record_steps=(0, 2, 5))


def test_ranges_may_be_taken_from_a_part_of_the_trajectories(load):
    made = load(calibration("samples = 3\nrange_samples = 2"))
    assert made.calibration == CalibrationSpec(samples=3, range_samples=2)


BAD = {
    # unknown names, at each level: the message has the name, the fix the close one
    "key of the file": (
        '[calibratoin]\nsamples = 1\n[[rule]]\nlayers = "*"\nkeep = "float"',
        "calibratoin",
        "'calibration'",
    ),
    "key of [calibration]": (calibration("sample = 1"), "'sample'", "'samples'"),
    "key of a rule": (rule('layer = "*"\nkeep = "float"'), "'layer'", "'layers'"),
    "key of a weight": (weight('format = "int", bitz = 8'), "'bitz'", "'bits'"),
    "key of an activation": (activation('format = "int", bits = 8, observr = "mse"'), "'observr'", "'observer'"),
    "key of a method": (method('name = "smoothquant", alhpa = 0.5'), "'alhpa'", "'alpha'"),
    "key of a method that has none": (method('name = "rtn", alpha = 0.5'), "'alpha'", "known: none"),
    "key of another format": (weight('format = "int", bits = 8, exponent_bits = 4'), "'exponent_bits'", "bits"),
    "granularity of an activation": (
        activation('format = "int", bits = 8, granularity = "channel"'),
        "'channel'",
        "step, tensor",
    ),
    "a zero point without steps": (
        activation('format = "int", bits = 8, zero_point = true'),
        "a zero point without a scale for every step",
        'granularity = "step"',
    ),
    "a zero point that is no truth value": (
        activation('format = "int", bits = 8, granularity = "step", zero_point = 3'),
        "zero_point = 3",
        "true or false",
    ),
    "percentiles by step": (
        activation('format = "int", bits = 8, granularity = "step", observer = "percentile"'),
        "observer 'percentile' has no ranges by step",
        "mse",
    ),
    "fp8 by step": (
        activation('format = "fp", exponent_bits = 4, mantissa_bits = 3, granularity = "step"'),
        "a scale for every step beside fp8",
        "use int",
    ),
    "format": (weight('format = "itn", bits = 8'), "'itn'", "'int'"),
    "no format": (weight("bits = 8"), "format ''", "fp, int"),
    "observer": (activation('format = "int", bits = 8, observer = "msee"'), "'msee'", "'mse'"),
    "observer of another type": (activation('format = "int", bits = 8, observer = ["mse"]'), "observer", "mse"),
    "method": (method('name = "smoothqaunt"'), "'smoothqaunt'", "'smoothquant'"),
    "no method name": (method("alpha = 0.5"), "method ''", "rtn"),
    "granularity": (weight('format = "int", bits = 8, granularity = "chanel"'), "'chanel'", "'channel'"),
    "scope": (rule('layers = "*"\nscope = "outside_block"\nkeep = "float"'), "'outside_block'", "'outside_blocks'"),
    "keep": (rule('layers = "*"\nkeep = "flaot"'), "'flaot'", "'float'"),
    "type": (rule('layers = "*"\ntype = "convolution"\nkeep = "float"'), "'convolution'", "'conv'"),
    # what does not go together, or lacks its other half
    "keep and weight": (rule(WEIGHT + 'keep = "float"'), "weight", "drop one"),
    "keep and activation": (rule(f'layers = "*"\nkeep = "float"\nactivation = {INT8}'), "activation", "drop one"),
    "neither keep nor weight": (rule('layers = "*"'), "neither weight nor keep", "keep"),
    "activation alone": (rule(f'layers = "*"\nactivation = {INT8}'), "neither weight nor keep", "weight"),
    "no layers": (rule('keep = "float"'), "lacks layers", "layers ="),
    "layers of another type": (rule('layers = ["*"]\nkeep = "float"'), "layers", "layers ="),
    "block_size without block": (
        weight('format = "int", bits = 4, block_size = 64'),
        "block_size",
        'granularity = "block"',
    ),
    "block without block_size": (
        weight('format = "int", bits = 4, granularity = "block"'),
        "without block_size",
        "block_size = 64",
    ),
    "bits missing": (weight('format = "int"'), "lacks bits", "bits = "),
    "mantissa_bits missing": (weight('format = "fp", exponent_bits = 4'), "lacks mantissa_bits", "mantissa_bits = "),
    "no rules": ("", "no rules", "[[rule]]"),
    "rules that are none": ('rule = "all"', "no rules", "[[rule]]"),
    "rule as one table": ('[rule]\nlayers = "*"\nkeep = "float"', "no rules", "[[rule]]"),
    "rule that is a number": ("rule = [1]", "1 is not a table", "key = value"),
    "weight that is a word": (rule('layers = "*"\nweight = "int8"'), "'int8' is not a table", "key = value"),
    "method that is a word": (rule(WEIGHT + 'method = "rtn"'), "'rtn' is not a table", "key = value"),
    "calibration that is a number": ("calibration = 64\n" + REST, "64 is not a table", "key = value"),
    # absurd values
    "bits too many": (weight('format = "int", bits = 99'), "99", "2 … 8"),
    "bits too few": (weight('format = "int", bits = 1'), "1 bits", "2 … 8"),
    "bits below zero": (weight('format = "int", bits = -4'), "bits = -4", "whole number"),
    "bits as a word": (weight('format = "int", bits = "8"'), "bits = '8'", "whole number"),
    "bits as a fraction": (weight('format = "int", bits = 7.5'), "bits = 7.5", "whole number"),
    "bits as a truth value": (weight('format = "int", bits = true'), "bits = True", "whole number"),
    "fp of nine bits": (weight('format = "fp", exponent_bits = 4, mantissa_bits = 4'), "4 exponent", "at most 7"),
    "fp without exponent": (
        weight('format = "fp", exponent_bits = 0, mantissa_bits = 4'),
        "0 exponent",
        "exponent_bits",
    ),
    "samples of zero": (calibration("samples = 0"), "samples = 0", "at least 1"),
    "samples below zero": (calibration("samples = -1"), "samples = -1", "at least 1"),
    "ranges of none": (calibration("range_samples = 0"), "range_samples = 0", "at least 1"),
    "ranges of more than there are": (calibration("samples = 3\nrange_samples = 4"), "range_samples = 4", "at most"),
    "samples as a word": (calibration('samples = "many"'), "samples = 'many'", "whole number"),
    "no steps": (calibration("record_steps = []"), "record_steps", "[0, 5]"),
    "steps below zero": (calibration("record_steps = [-1]"), "record_steps", "[0, 5]"),
    "steps as words": (calibration('record_steps = ["first"]'), "record_steps", "[0, 5]"),
    "steps as truth values": (calibration("record_steps = [true]"), "record_steps", "[0, 5]"),
    "one step": (calibration("record_steps = 5"), "record_steps", "[0, 5]"),
    "block of zero": (
        weight('format = "int", bits = 4, granularity = "block", block_size = 0'),
        "block_size = 0",
        "whole number",
    ),
    "block below zero": (
        weight('format = "int", bits = 4, granularity = "block", block_size = -64'),
        "block_size = -64",
        "whole number",
    ),
    "optional as a word": (
        rule('layers = "*"\noptional = "yes"\nkeep = "float"'),
        "optional = 'yes'",
        "optional = true",
    ),
    "grouped as a word": (
        rule('layers = "*"\ngrouped = "yes"\nkeep = "float"'),
        "grouped = 'yes'",
        "grouped = true",
    ),
    "split_skips as a number": (
        rule(WEIGHT + "split_skips = 1"),
        "split_skips = 1",
        "split_skips = true",
    ),
    "narrower than one": (
        rule('layers = "*"\nnarrower_than = 1\nkeep = "float"'),
        "narrower_than = 1",
        "at least 2",
    ),
    "narrower_than as a word": (
        rule('layers = "*"\nnarrower_than = "16"\nkeep = "float"'),
        "narrower_than = '16'",
        "whole number",
    ),
    "narrower_than as a truth value": (
        rule('layers = "*"\nnarrower_than = true\nkeep = "float"'),
        "narrower_than = True",
        "whole number",
    ),
    "multiply as a number": (method('name = "smoothquant", multiply = 1'), "multiply = 1", "the default is true"),
    "alpha above one": (method('name = "smoothquant", alpha = 1.5'), "alpha = 1.5", "0 … 1"),
    "alpha below zero": (method('name = "smoothquant", alpha = -0.5'), "alpha = -0.5", "0 … 1"),
    "alpha that is no number": (method('name = "smoothquant", alpha = nan'), "alpha = nan", "0 … 1"),
    "alpha as a word": (method('name = "smoothquant", alpha = "half"'), "alpha = 'half'", "0.5"),
    "alpha as a truth value": (method('name = "smoothquant", alpha = true'), "alpha = true", "0.5"),
    # what is no TOML
    "broken TOML": ("[[rule]]\nlayers = \n", "not valid TOML", "mend the line"),
    "a key twice": (rule('layers = "*"\nlayers = "*"\nkeep = "float"'), "not valid TOML", "mend the line"),
    "brackets without end": ("rule = " + "[" * 50_000, "mine.toml", "mend"),
    "a number of 5000 digits": (calibration("samples = " + "9" * 5000), "mine.toml", ""),
    "too large": ("#" * (recipe.MAX_RECIPE_BYTES + 1), "larger than", "short text"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_is_named_with_its_fix(load, fault):
    text, named, fix = BAD[fault]
    with pytest.raises(UserError) as caught:
        load(text)
    assert named in caught.value.what
    assert caught.value.fix
    assert fix in caught.value.fix


@pytest.mark.parametrize("fault", ["key of a weight", "format", "granularity", "alpha as a word", "bits too many"])
def test_a_fault_in_a_rule_says_which_rule_it_is(load, fault):
    with pytest.raises(UserError, match=r"mine\.toml', rule 2"):
        load(REST + BAD[fault][0])


def test_a_layer_without_a_rule_is_named_and_the_rest_counted(load):
    made = load(rule(f'layers = "blocks.*"\nweight = {INT8}'))
    with pytest.raises(UserError, match=r"pos_embed\.proj.*1 more") as caught:
        made.assign(DIT, BLOCKS)
    assert 'layers = "*"' in caught.value.fix


def test_a_rule_that_matches_nothing_is_named_with_what_it_may_have_meant(load):
    made = load(REST + rule(f'layers = "blocks.0.attn1.to_p"\nweight = {INT8}'))
    with pytest.raises(UserError, match=r"rule 2: layers = 'blocks\.0\.attn1\.to_p'") as caught:
        made.assign(DIT, BLOCKS)
    assert "blocks.0.attn1.to_q" in caught.value.fix
    assert "optional = true" in caught.value.fix


def test_a_rule_that_matches_nothing_in_its_scope_is_an_error(load):
    made = load(rule(f'layers = "proj_out"\nscope = "blocks"\nweight = {INT8}') + REST)
    with pytest.raises(UserError, match=r"rule 1: layers = 'proj_out' \(scope 'blocks'\)"):
        made.assign(DIT, BLOCKS)


def test_an_optional_rule_may_match_nothing(load):
    made = load(rule(f'layers = "unet.*"\noptional = true\nweight = {INT8}') + REST)
    assert all(r.weight is None for r in made.assign(DIT, BLOCKS).values())


@pytest.mark.parametrize(
    ("name", "named", "fix"),
    [
        ("int9", "'int9'", "did you mean"),
        ("fp88", "'fp88'", "'fp8'"),
        ("", "''", "known:"),
        ("gone.toml", "gone.toml", "path"),
    ],
)
def test_a_recipe_that_is_not_there_is_named_with_a_fix(name, named, fix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        recipe.load(name)
    assert named in caught.value.what
    assert fix in caught.value.fix


def test_a_folder_in_place_of_a_recipe_is_named(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UserError, match=r"folder\.toml.*cannot be read"):
        recipe.load(str(tmp_path / "folder.toml"))


def test_bytes_that_are_no_text_are_an_error(tmp_path):
    (tmp_path / "raw.toml").write_bytes(b"\xff\xfe[[rule]]")
    with pytest.raises(UserError, match=r"raw\.toml.*byte 0 is not UTF-8"):
        recipe.load(str(tmp_path / "raw.toml"))


ORIGINAL = f"""
[calibration]
samples = 8
[[rule]]
layers = "*"
weight = {INT8}
method = {{ name = "smoothquant", alpha = 0.5 }}
"""
REWRITTEN = """
# the same, written differently
[[rule]]
method.alpha = 0.5
method.name = "smoothquant"
layers = '*' # every layer
[rule.weight]
bits = 0x8
format = "int"

[calibration]
samples = 8
"""


def test_the_digest_ignores_comments_the_order_of_keys_and_the_files_name(load):
    assert load(ORIGINAL).digest == load(REWRITTEN, "other.toml").digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("samples = 8", "samples = 9"),
        ('"*"', '"a*"'),
        ("bits = 8", "bits = 4"),
        ("0.5", "0.6"),
        ("[[rule]]", '[[rule]]\nlayers = "b"\nkeep = "float"\n[[rule]]'),
    ],
)
def test_the_digest_changes_with_what_the_recipe_says(load, old, new):
    assert old in ORIGINAL
    assert load(ORIGINAL).digest != load(ORIGINAL.replace(old, new)).digest


def test_the_digest_changes_with_the_order_of_rules(load):
    first, second = rule('layers = "a"\nkeep = "float"'), rule('layers = "b"\nkeep = "float"')
    assert load(first + second).digest != load(second + first).digest


@pytest.mark.parametrize("name", recipe.names())
def test_shipped_recipes_have_digests_of_their_own(name):
    others = {recipe.load(other).digest for other in recipe.names() if other != name}
    assert recipe.load(name).digest not in others


@pytest.mark.parametrize(
    ("weight", "activation", "named", "fix"),
    [
        (INT8, '{ format = "fp", exponent_bits = 5, mantissa_bits = 2 }', "fp8_e5m2", "4 exponent and 3 mantissa"),
        (INT8, '{ format = "fp", exponent_bits = 4, mantissa_bits = 3 }', "int8 weights beside fp8", "for both"),
        (
            '{ format = "fp", exponent_bits = 2, mantissa_bits = 1 }',
            '{ format = "int", bits = 8 }',
            "fp4 weights beside int8",
            "for both",
        ),
        (
            '{ format = "int", bits = 8, granularity = "block", block_size = 64 }',
            '{ format = "int", bits = 8 }',
            "scaled in blocks",
            'granularity "channel"',
        ),
    ],
)
def test_formats_that_no_matmul_takes_together_are_refused_when_the_recipe_is_read(
    weight, activation, named, fix, load
):
    with pytest.raises(UserError) as caught:
        load(rule(f'layers = "*"\nweight = {weight}\nactivation = {activation}'))
    assert named in caught.value.what
    assert "rule 1" in caught.value.what
    assert fix in caught.value.fix
