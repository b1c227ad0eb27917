"""What a user of the pewter command line sees: results, messages, exit codes.

Needs Python, pytest, numpy and the binaries, in $PEWTER_BIN or build/bin.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("PEWTER_BIN", ROOT / "build/bin")).resolve()
PEWTER, PEWTERD = BIN / "pewter", BIN / "pewterd"
PATIENCE = 120  # seconds, for machines that have other work
DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "uint16": "BF16"}

DONE, FAILED, USAGE, NOT_FOUND, INTERRUPTED = 0, 1, 2, 3, 130


def write_safetensors(path, tensors):
    """`tensors`: name -> array; uint16 arrays are the bits of BF16."""
    header, offset = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(array.tobytes())


def read_safetensors(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    names = {value: key for key, value in DTYPES.items()}
    tensors = {}
    for name, info in header.items():
        begin, end = (8 + size + offset for offset in info["data_offsets"])
        tensors[name] = np.frombuffer(data[begin:end], names[info["dtype"]]).reshape(info["shape"])
    return tensors


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def llama_tensors(seed):
    random = np.random.default_rng(seed)
    hidden, inner, vocabulary = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (hidden // 2, hidden),
            prefix + "self_attn.v_proj.weight": (hidden // 2, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return {name: random.standard_normal(shape, "float32") for name, shape in shapes.items()}


def write_llama(folder, seed, shards=1):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    tensors = llama_tensors(seed)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return tensors
    names, index = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        index |= {name: file for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    )
    return tensors


def linear(*models, extra=""):
    lines = [f"  - model: {model}\n    parameters: {{weight: {i + 1}}}\n" for i, model in enumerate(models)]
    return f"merge_method: linear\nmodels:\n{''.join(lines)}{extra}"


def ties(base, *models, density=0.4):
    lines = [f"  - model: {model}\n    parameters: {{weight: 1, density: {density}}}\n" for model in models]
    return f"merge_method: ties\nbase_model: {base}\nmodels:\n{''.join(lines)}"


class Cli:
    """Runs pewter in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder

    def start(self, *arguments, **options):
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        environment.pop("PEWTER_SERVER", None)
        return subprocess.Popen(
            [PEWTER, *map(str, arguments)],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def __call__(self, *arguments, expect=DONE, input=None, **options):
        process = self.start(*arguments, **options)
        process.out, process.err = process.communicate(input, timeout=PATIENCE)
        assert process.returncode == expect, (arguments, process.returncode, process.out, process.err)
        if expect not in (DONE, FAILED) or (expect == FAILED and arguments[0] != "diff"):
            assert "error: " in process.err or '"error"' in process.err
        return process

    def recipe(self, text, name="recipe.yaml"):
        (self.folder / name).write_text(text)
        return name

    def hashes(self, folder):
        files = sorted((self.folder / folder).glob("*.safetensors"))
        assert files, f"no weights in {folder}"
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def cli(tmp_path):
    return Cli(tmp_path)


@pytest.fixture
def models(cli):
    """Folders a (one file) and b (three files) with their tensors."""
    return {"a": write_llama(cli.folder / "a", 1), "b": write_llama(cli.folder / "b", 2, shards=3)}


# Merging ----------------------------------------------------------------------------------------


def test_linear_gives_the_weighted_mean(cli, models):
    done = cli("merge", cli.recipe(linear("./a", "b")), "out")
    assert "Merged into out" in done.out and "from_pretrained('out')" in done.out
    merged = read_safetensors(cli.folder / "out/model.safetensors")
    assert sorted(merged) == sorted(models["a"])
    for name, tensor in merged.items():
        expected = (models["a"][name].astype("float64") + 2 * models["b"][name].astype("float64")) / 3
        assert np.abs(tensor - expected).max() < 1e-6, name


def test_a_recipe_from_standard_input_and_set(cli, models):
    cli("merge", "-", "out", "--set", "models.1.parameters.weight=0", "--set", "dtype=bfloat16", input=linear("a", "b"))
    merged = read_safetensors(cli.folder / "out/model.safetensors")
    for name, tensor in merged.items():
        assert tensor.dtype == np.uint16
        wide = (tensor.astype(np.uint32) << 16).view("float32")
        assert np.abs(wide - models["a"][name]).max() <= np.abs(models["a"][name]).max() / 256


def test_results_as_json_and_as_a_path(cli, models):
    recipe = cli.recipe(linear("a", "b"))
    result = json.loads(cli("merge", recipe, "out", "-o", "json").out)
    assert result["output"] == "out" and result["tensors"] == len(models["a"]) and result["shards"] == 1
    assert result["bytes_written"] > 0 and len(result["fingerprint"]) == 64
    assert cli("merge", recipe, "quiet", "-q").out == "quiet\n"


def test_the_manifest_tells_everything(cli, models):
    recipe = linear("a", "b")
    cli("merge", cli.recipe(recipe), "out", "--seed", "7")
    manifest = json.loads((cli.folder / "out/pewter_manifest.json").read_text())
    assert manifest["recipe"] == recipe and manifest["method"] == "linear" and manifest["seed"] == 7
    assert manifest["pewter_version"] in cli("--version").out
    assert [model["model"] for model in manifest["inputs"]] == ["a", "b"]
    assert [len(model["files"]) for model in manifest["inputs"]] == [1, 3]
    named = {file["name"]: file for file in manifest["files"]}
    written = {path.name for path in (cli.folder / "out").iterdir()} - {"pewter_manifest.json"}
    assert set(named) == written
    for name, file in named.items():
        data = (cli.folder / "out" / name).read_bytes()
        assert file["bytes"] == len(data) and file["sha256"] == hashlib.sha256(data).hexdigest(), name
    assert {"config.json", "mergekit_config.yml", "README.md", "tokenizer_config.json"} <= written


def test_what_not_to_write(cli, models):
    cli("merge", cli.recipe(linear("a", "b")), "out", "--no-copy-tokenizer", "--no-write-model-card")
    written = {path.name for path in (cli.folder / "out").iterdir()}
    assert "README.md" not in written and "tokenizer_config.json" not in written


def test_shard_size(cli, models):
    cli("merge", cli.recipe(linear("a", "b")), "out", "--shard-size", "20kB")
    index = json.loads((cli.folder / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(models["a"])
    assert len(cli.hashes("out")) > 2
    message = cli("merge", "recipe.yaml", "out2", "--shard-size", "5B", expect=USAGE).err
    assert "5GB" in message  # mergekit's 5B is five billion


def test_the_result_loads(cli, models):
    """In transformers where it is installed, else with the safetensors package."""
    cli("merge", cli.recipe(linear("a", "b")), "out", "--shard-size", "20kB")
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        import torch
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(cli.folder / "out")
        with torch.no_grad():
            logits = model(torch.arange(8)[None]).logits
        assert logits.shape == (1, 8, CONFIG["vocab_size"]) and torch.isfinite(logits).all()
        weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    elif importlib.util.find_spec("safetensors"):
        from safetensors import safe_open

        weights = {}
        for file in (cli.folder / "out").glob("*.safetensors"):
            with safe_open(file, "numpy") as part:
                weights |= {name: part.get_tensor(name) for name in part.keys()}
    else:
        pytest.skip("neither transformers nor safetensors is installed")
    assert set(weights) == set(models["a"])
    for name, tensor in weights.items():
        assert np.allclose(tensor, (models["a"][name] + 2 * models["b"][name]) / 3, atol=1e-5), name


# Messages and exit codes ------------------------------------------------------------------------


def test_usage(cli):
    assert "merge" in cli("--help").out
    assert re.fullmatch(r"pewter \d+\.\d+\.\d+\n", cli("--version").out)
    assert 'did you mean "merge"' in cli("merg", "a", "b", expect=USAGE).err
    assert 'did you mean "--device"' in cli("merge", "r", "o", "--devise", "cpu", expect=USAGE).err
    assert "pewter merge --help" in cli("merge", "r", expect=USAGE).err
    assert "--memory" in cli("merge", "r", "o", "--memory", "lots", expect=USAGE).err
    error = json.loads(cli("merge", "nowhere.yaml", "out", "-o", "json", expect=NOT_FOUND).err)["error"]
    assert error["code"] == "NOT_FOUND" and "nowhere.yaml" in error["message"] and error["exit_code"] == 3
    assert json.loads(cli("mrege", "-o", "json", expect=USAGE).err)["error"]["exit_code"] == 2


def test_local_commands_start_fast(cli):
    """In CPU time, as tests share the machine; the best of ten counts."""
    times = []
    for _ in range(10):
        process = subprocess.Popen([PEWTER, "methods"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        times.append(usage.ru_utime + usage.ru_stime)
    assert min(times) < 0.03


@pytest.mark.parametrize(
    "recipe, code, words",
    [
        ("merge_method: tiess\nmodels: [{model: a}]\n", USAGE, ["recipe.yaml:1:15", "tiess", '"ties"']),
        ("merge_method: linear\nmodels: [{model: a}]\n", USAGE, ["weight"]),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: half}\n",
            USAGE,
            ["recipe.yaml:4:", "must be a number", "half"],
        ),
        (
            "merge_method: ties\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1, density: .inf}}]\n",
            USAGE,
            ["recipe.yaml:3:", "density", "finite"],
        ),
        ("merge_method: ties\nmodels: [{model: b, parameters: {weight: 1}}]\n", USAGE, ["base_model"]),
        ("merge_method: linear\nmodels: [\n", USAGE, ["recipe.yaml:"]),
        (linear("a", "nowhere"), NOT_FOUND, ["nowhere"]),
        (linear("a", "b", extra="dtype: float31\n"), USAGE, ["recipe.yaml:7", "float31"]),
    ],
)
def test_wrong_recipes(cli, models, recipe, code, words):
    path = cli.recipe(recipe)
    for command in (["plan", path], ["merge", path, "out"]):
        message = cli(*command, expect=code).err
        for word in words:
            assert word in message
    assert not (cli.folder / "out").exists()


def test_strict_takes_warnings_as_errors(cli, models):
    path = cli.recipe(linear("a", "b", extra="densty: 1\n"))
    assert "warning: recipe.yaml:7" in cli("plan", path).err
    assert "densty" in cli("plan", path, "--strict", expect=USAGE).err


def test_the_output_exists(cli, models):
    path = cli.recipe(linear("a", "b"))
    cli("merge", path, "out")
    before = cli.hashes("out")
    assert "--overwrite" in cli("merge", path, "out", expect=FAILED).err
    assert cli.hashes("out") == before
    cli("merge", path, "out", "--overwrite", "--set", "models.0.parameters.weight=5")
    assert cli.hashes("out") != before


def test_the_output_is_not_writable(cli, models):
    path = cli.recipe(linear("a", "b"))
    if os.geteuid() != 0:
        (cli.folder / "locked").mkdir(mode=0o555)
        message = cli("merge", path, "locked/out", expect=NOT_FOUND).err
    else:  # root may write everywhere, so somebody else tries
        for part in [cli.folder, *cli.folder.parents]:
            if str(part).startswith("/tmp/") or part == cli.folder:
                part.chmod(part.stat().st_mode | 0o055)
        copy = cli.folder / "pewter"
        shutil.copy(PEWTER, copy)
        copy.chmod(0o755)
        run = subprocess.run(
            [copy, "merge", path, "out"], cwd=cli.folder, user=65534, group=65534, extra_groups=[],
            capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert run.returncode == NOT_FOUND, run.stderr
        message = run.stderr
    assert "error: " in message and "out" in message and "ermission denied" in message


def test_a_truncated_shard(cli, models):
    shard = cli.folder / "b/model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    path = cli.recipe(linear("a", "b"))
    for command in (["plan", path], ["merge", path, "out"]):
        assert shard.name in cli(*command, expect=FAILED).err
    assert not (cli.folder / "out").exists()


def test_not_a_number_in_an_input(cli, models):
    name = "model.layers.1.mlp.up_proj.weight"
    models["a"][name][3, 5] = np.nan
    write_safetensors(cli.folder / "a/model.safetensors", models["a"])
    path = cli.recipe(linear("a", "b"))
    message = cli("merge", path, "out", expect=FAILED).err
    assert name in message and "--allow-nonfinite" in message
    assert not (cli.folder / "out/pewter_manifest.json").exists()
    done = cli("merge", path, "out", "--allow-nonfinite", "--overwrite")
    assert "warning: " in done.err and name in done.err
    merged = read_safetensors(cli.folder / "out/model.safetensors")
    assert np.isnan(merged[name][3, 5]) and np.isnan(merged[name]).sum() == 1


def test_the_disk_is_full(cli):
    random = np.random.default_rng(3)
    for model in "ab":
        tensors = {f"t{i}": random.standard_normal(1 << 18, "float32") for i in range(8)}
        write_safetensors(cli.folder / f"{model}.safetensors", tensors)
    small = cli.folder / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        path = cli.recipe(linear("a.safetensors", "b.safetensors"))
        arguments = ["merge", path, "small/out", "--shard-size", "1MB"]
        message = cli(*arguments, expect=FAILED).err
        assert "small/out" in message and "full" in message
        assert not (small / "out/pewter_manifest.json").exists()
        assert not list(small.glob("out/*.safetensors")), "it is refused before any work"
        # Room is made.
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        cli(*arguments, "--resume")
        cli("merge", path, "whole", "--shard-size", "1MB")
        assert cli.hashes("small/out") == cli.hashes("whole")
    finally:
        subprocess.run(["umount", "-l", small], check=True)


# Interruptions and sameness ---------------------------------------------------------------------

SHARDS = 12


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base and three siblings of 96 MiB, merged once without interruption."""
    cli = Cli(tmp_path_factory.mktemp("large"))
    random = np.random.default_rng(4)
    base = {f"layer.{i:02}.weight": random.standard_normal((1024, 2048), "float32") for i in range(SHARDS)}
    write_safetensors(cli.folder / "base.safetensors", base)
    for model in "abc":
        tensors = {name: tensor + random.standard_normal(tensor.shape, "float32") for name, tensor in base.items()}
        write_safetensors(cli.folder / f"{model}.safetensors", tensors)
    cli.recipe(ties("base.safetensors", *(f"{model}.safetensors" for model in "abc")))
    cli.arguments = ["--shard-size", "8MiB", "--threads", "2"]
    cli("merge", "recipe.yaml", "whole", *cli.arguments)
    cli.whole = cli.hashes("whole")
    assert len(cli.whole) == SHARDS
    return cli


def start_and_wait_for_shards(cli, output, count):
    process = cli.start("merge", "recipe.yaml", output, *cli.arguments)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if len(list((cli.folder / output).glob("model-*.safetensors"))) >= count:
            return process
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    raise AssertionError("no finished shard")


def test_killed_and_resumed(large):
    process = start_and_wait_for_shards(large, "killed", 2)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the merge was over before it could be killed"
    assert not (large.folder / "killed/pewter_manifest.json").exists()
    message = large("merge", "recipe.yaml", "killed", *large.arguments, expect=FAILED).err
    assert "--resume" in message
    result = json.loads(large("merge", "recipe.yaml", "killed", *large.arguments, "--resume", "-o", "json").out)
    assert 1 <= result["shards_reused"] < SHARDS
    assert large.hashes("killed") == large.whole


def test_interrupted_and_resumed(large):
    process = start_and_wait_for_shards(large, "interrupted", 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == INTERRUPTED, (out, err)
    assert "--resume" in err and not out
    other = [*large.arguments, "--seed", "5", "--set", "parameters.lambda=0.5"]
    assert "--overwrite" in large("merge", "recipe.yaml", "interrupted", *other, "--resume", expect=FAILED).err
    large("merge", "recipe.yaml", "interrupted", *large.arguments, "--resume")
    assert large.hashes("interrupted") == large.whole


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory", ["96MiB", "256MiB", "2GiB"])
def test_same_bytes_for_threads_and_memory(large, threads, memory):
    output = f"same-{threads}-{memory}"
    large("merge", "recipe.yaml", output, "--shard-size", "8MiB", "--threads", threads, "--memory", memory)
    assert large.hashes(output) == large.whole
    shutil.rmtree(large.folder / output)


# Stages -----------------------------------------------------------------------------------------

STAGES = f"name: half\n{linear('a', 'b')}---\n{linear('half', 'a', extra='dtype: bfloat16')}"


def test_stages(cli, models):
    path = cli.recipe(STAGES)
    assert "Merged into out" in cli("merge", path, "out").out
    assert not (cli.folder / "out.stages").exists()
    cli("merge", cli.recipe(linear("a", "b"), "first.yaml"), "half")
    second = linear("./half", "a", extra="dtype: bfloat16")
    cli("merge", cli.recipe(second, "second.yaml"), "alone")
    shutil.rmtree(cli.folder / "half")
    assert cli.hashes("out") == cli.hashes("alone")
    assert (cli.folder / "out/mergekit_config.yml").read_text() == STAGES + "\n"

    cli("merge", path, "kept", "--keep-stages")
    stage = cli.folder / "kept.stages/half/model.safetensors"
    before = stage.stat().st_mtime_ns
    cli("merge", path, "kept", "--keep-stages", "--overwrite", "--set", "dtype=float16")
    assert stage.stat().st_mtime_ns == before
    cli("merge", path, "kept", "--keep-stages", "--overwrite", "--set", "half/dtype=float16")
    assert stage.stat().st_mtime_ns != before
    cli("merge", path, "more", "-I", "stages")
    assert cli("inspect", "stages/half").out


def test_stages_are_planned_before_the_first_is_merged(cli, models):
    path = cli.recipe(STAGES)
    text = cli("plan", path).out
    assert text.index("Stage 1 of 2: half") < text.index("Stage 2 of 2: the output")
    plan = json.loads(cli("plan", path, "-o", "json").out)
    assert [stage["name"] for stage in plan["stages"]] == ["half"]
    assert plan["stages"][0]["models"][0]["model"] == "a" and plan["models"][0]["model"] == "half"
    wrong = cli.recipe(STAGES.replace("model: half", "model: hlaf"), "wrong.yaml")
    assert "wrong.yaml:11:12" in cli("merge", wrong, "out", expect=NOT_FOUND).err
    circle = cli.recipe(STAGES.replace("model: b", "model: half"), "circle.yaml")
    assert "circle.yaml:6:12: error: documents depend on each other in a circle" in cli("merge", circle, "out", expect=USAGE).err
    assert not (cli.folder / "out").exists() and not (cli.folder / "out.stages").exists()


# Mixtures of experts ----------------------------------------------------------------------------


MIXTURE = "base_model: ./a\ngate_mode: random\nexperts: [{source_model: ./a}, {source_model: ./b}]\n"


def test_moe_stacks_the_experts(cli, models):
    recipe = cli.recipe(MIXTURE)
    assert "MixtralForCausalLM" in cli("moe", recipe, "mix", "--dry-run").out
    plan = json.loads(cli("moe", recipe, "mix", "--dry-run", "-o", "json").out)
    assert not (cli.folder / "mix").exists()
    tensors = {tensor["name"]: tensor for tensor in plan["tensors"]}
    fused = tensors["model.layers.1.mlp.experts.gate_up_proj"]["inputs"]
    assert [(i["model"], i["tensor"].split(".")[-2]) for i in fused] == [
        ("./a", "gate_proj"),
        ("./a", "up_proj"),
        ("./b", "gate_proj"),
        ("./b", "up_proj"),
    ]
    assert tensors["model.layers.1.mlp.gate.weight"]["inputs"][0]["model"] is None
    cli("moe", recipe, "mix")
    made = read_safetensors(cli.folder / "mix/model.safetensors")
    up = [models[name]["model.layers.1.mlp.up_proj.weight"] for name in "ab"]
    gate = [models[name]["model.layers.1.mlp.gate_proj.weight"] for name in "ab"]
    expected = np.stack([np.concatenate(pair) for pair in zip(gate, up)])
    np.testing.assert_array_equal(made["model.layers.1.mlp.experts.gate_up_proj"], expected)
    config = json.loads((cli.folder / "mix/config.json").read_text())
    assert config["model_type"] == "mixtral" and config["num_local_experts"] == 2
    assert (cli.folder / "mix/pewter_manifest.json").exists()
    assert (cli.folder / "mix/mergekit_moe_config.yml").read_text() == MIXTURE
    assert "`./a`, `./b`" in (cli.folder / "mix/README.md").read_text()
    cli("moe", recipe, "one", "--separate-experts", "--load-in-4bit")
    made = read_safetensors(cli.folder / "one/model.safetensors")
    np.testing.assert_array_equal(made["model.layers.1.block_sparse_moe.experts.1.w3.weight"], up[1])


def test_moe_says_what_it_cannot_do(cli, models):
    recipe = cli.recipe(MIXTURE.replace("random", "hidden"))
    message = cli("moe", recipe, "mix", expect=USAGE).err
    assert "recipe.yaml:3:11" in message and "positive_prompts" in message
    recipe = cli.recipe(
        "base_model: ./a\ngate_mode: cheap_embed\nexperts:\n"
        "  - {source_model: ./a, positive_prompts: [x]}\n"
        "  - {source_model: ./b, positive_prompts: [y]}\n"
    )
    message = cli("moe", recipe, "mix", expect=FAILED).err
    assert "recipe.yaml:4:5" in message and "positive_prompt_ids" in message


# The other commands -----------------------------------------------------------------------------


def test_plan(cli, models):
    path = cli.recipe(linear("a", "b"))
    text = cli("plan", path).out
    for word in ("LlamaForCausalLM", "model.layers.*.mlp.up_proj.weight", "weight=1,2", "Peak memory", "cpu"):
        assert word in text
    assert "model.layers.1.mlp.up_proj.weight" in cli("plan", path, "--tensors").out
    plan = json.loads(cli("plan", path, "-o", "json").out)
    assert {tensor["name"] for tensor in plan["tensors"]} == set(models["a"])
    tensor = plan["tensors"][0]
    assert tensor["method"] == "linear" and [source["model"] for source in tensor["inputs"]] == ["a", "b"]
    assert [source["parameters"]["weight"] for source in tensor["inputs"]] == [1, 2]
    assert sum(tensor["bytes"] for tensor in plan["tensors"]) <= plan["write_bytes"]
    assert plan["peak_bytes"] <= plan["memory_bytes"]
    assert cli("plan", path, "-q").out.strip() == plan["fingerprint"]
    assert json.loads(cli("merge", path, "out", "--dry-run", "-o", "json").out) == plan
    assert not (cli.folder / "out").exists()


def test_methods(cli):
    names = cli("methods", "-q").out.split()
    assert {"linear", "slerp", "passthrough", "task_arithmetic", "ties", "dare_linear", "dare_ties"} <= set(names)
    table = cli("methods").out
    listed = json.loads(cli("methods", "-o", "json").out)
    assert [method["name"] for method in listed] == names
    for method in listed:
        assert method["name"] in table
        text = cli("methods", method["name"]).out
        for parameter in method["parameters"]:
            assert parameter["name"] in text
        assert method["example"].startswith(f"merge_method: {method['name']}\n")
    assert '"slerp"' in cli("methods", "slurp", expect=USAGE).err


def write_models_of(cli, recipe):
    """The models that an example recipe names, as tiny fine-tunes of one base."""
    if "./tokens.safetensors" in recipe:
        ids = np.random.default_rng(2).integers(0, CONFIG["vocab_size"], (16, 16))
        write_safetensors(cli.folder / "tokens.safetensors", {"input_ids": ids.astype(np.int64)})
    for i, name in enumerate(sorted(set(re.findall(r"\./[\w-]+\b(?!\.safetensors)", recipe)))):
        tensors = write_llama(cli.folder / name, seed=30 + i)
        if f"{name}.statistics.safetensors" in recipe:
            write_statistics(cli.folder / f"{name}.statistics.safetensors", tensors)


def write_statistics(path, tensors):
    """What fisher takes of a model, a number for each of its weights, or regmean: Gram matrices of its layers' inputs."""
    statistics = {name: np.abs(array).astype(np.float32) for name, array in tensors.items()}
    for name, array in tensors.items():
        if name.endswith("_proj.weight"):
            inputs = np.random.default_rng(1).normal(size=(64, array.shape[1]))
            statistics[name.removesuffix(".weight") + ".gram.0.0"] = (inputs.T @ inputs).astype(np.float32)
            statistics[name.removesuffix(".weight") + ".count"] = np.array([64])
    write_safetensors(path, statistics)


@pytest.mark.parametrize("method", json.loads(subprocess.run([PEWTER, "methods", "-o", "json"], capture_output=True, check=True).stdout),
                         ids=lambda method: method["name"])  # fmt: skip
def test_the_example_of_every_method_runs(cli, method):
    write_models_of(cli, method["example"])
    result = json.loads(cli("merge", cli.recipe(method["example"]), "out", "--strict", "--set", "dtype=float32", "-o", "json").out)
    assert result["method"] == method["name"] and result["tensors"] == len(llama_tensors(0))
    assert result["warnings"] == []


def test_the_schema_takes_what_the_parser_takes(cli):
    jsonschema = pytest.importorskip("jsonschema")
    yaml = pytest.importorskip("yaml")
    schema = json.loads(cli("methods", "--schema").out)
    jsonschema.Draft7Validator.check_schema(schema)
    validator = jsonschema.Draft7Validator(schema)
    for method in json.loads(cli("methods", "-o", "json").out):
        validator.validate(yaml.safe_load(method["example"]))
    good = yaml.safe_load(
        "merge_method: ties\nbase_model: {model: {path: a}, lora: b}\ndtype: bfloat16\n"
        "slices:\n- sources:\n  - {model: a, layer_range: [0, 2], parameters: {density: [0.1, 0.5]}}\n"
        "parameters: {weight: [{filter: mlp, value: [0, 1]}, {value: 0.5}], normalize: false}\n"
    )
    validator.validate(good)
    wrong = [
        {**good, "merge_method": "tiess"},
        {**good, "models": [{"model": "a"}]},
        {**good, "densty": 1},
        {**good, "parameters": {"normalize": 3}},
        {**good, "parameters": {"t": 0.5}},
        {**good, "dtype": "int8"},
    ]
    for recipe in wrong:
        assert list(validator.iter_errors(recipe)), recipe


def test_plan_explains(cli, models):
    recipe = (
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 2]}]\n"
        "  - sources: [{model: b, layer_range: [1, 2], parameters: {scale: [{filter: mlp, value: 0.5}]}}]\n"
    )
    path = cli.recipe(recipe)
    text = cli("plan", path).out
    assert re.search(r"model\.layers\.2 +b 1\n", text), text
    name = "model.layers.2.mlp.up_proj.weight"
    text = cli("plan", path, "--tensor", name).out
    assert text.splitlines()[0].startswith(name) and "model.layers.1.mlp.up_proj.weight" in text
    assert 'scale=0.5 (model, recipe:4:' in text and 'filter "mlp"' in text
    several = cli("plan", path, "--tensor", "model.layers.[01].mlp.*", "--tensor", "lm_head.weight").out
    assert several.count("\n    ") == 7
    assert "did you mean" in cli("plan", path, "--tensor", name + "s", expect=NOT_FOUND).err
    plan = json.loads(cli("plan", path, "-o", "json").out)
    (tensor,) = [tensor for tensor in plan["tensors"] if tensor["name"] == name]
    assert tensor["layer"] == 2 and tensor["inputs"][0]["layer"] == 1
    assert tensor["inputs"][0]["parameter_origins"]["scale"]["level"] == "model"
    assert tensor["inputs"][0]["parameter_origins"]["scale"]["line"] == 4
    cli("merge", path, "out", "--set", "dtype=bfloat16")
    manifest = json.loads((cli.folder / "out/pewter_manifest.json").read_text())
    assert set(manifest["decisions"]) == {"defaults", "tensors", "absent_tensors"}
    cli("merge", cli.recipe(linear("a", "b")), "mean")
    manifest = json.loads((cli.folder / "mean/pewter_manifest.json").read_text())
    assert manifest["decisions"]["defaults"] == {"normalize": True}


def test_options_of_mergekit(cli, models):
    path = cli.recipe(linear("a", "b"))
    done = cli(
        "merge", path, "out", "--no-cuda", "--copy-tokenizer", "--write-model-card", "--safe-serialization",
        "--lora-merge-cache", "cache", "--lazy-unpickle", "--low-cpu-memory", "--trust-remote-code",
        "--clone-tensors", "--async-write", "--write-threads", "4", "--random-seed", "7", "-v", "-v",
        "--out-shard-size", "20K", "--allow-crimes", "-j", "1",
    )  # fmt: skip
    for word in ("--lora-merge-cache", "--lazy-unpickle", "--low-cpu-memory", "--trust-remote-code", "--write-threads"):
        assert f"note: {word} changes nothing: " in done.err
    assert len(cli.hashes("out")) > 1 and not (cli.folder / "cache").exists()
    for file in (cli.folder / "out").glob("*.safetensors"):
        assert sum(array.nbytes for array in read_safetensors(file).values()) <= 20_000
    assert "--no-cuda" in cli("merge", "--help").out
    assert "is not a size" in cli("merge", path, "more", "--out-shard-size", "5G", expect=USAGE).err
    cli("merge", path, "one", "--out-shard-size", "0", "--quiet")
    assert list(cli.hashes("one")) == ["model.safetensors"]


def test_shuffle_layers(cli, models):
    draw = ["-m", "./a", "-w", "1", "-m", "./b", "-w", "1"]
    first = cli("shuffle-layers", "out", *draw, "--seed", "3", "--print-yaml", "--dry-run").out
    assert "merge_method: passthrough" in first and not (cli.folder / "out").exists()
    assert cli("shuffle-layers", "out", *draw, "--seed", "3", "--print-yaml", "--dry-run").out == first
    cli("shuffle-layers", "out", *draw, "--seed", "3", "--write-yaml", "drawn.yaml")
    assert (cli.folder / "drawn.yaml").read_text() == first
    cli("merge", "drawn.yaml", "again")
    assert cli.hashes("again") == cli.hashes("out")
    tensors = read_safetensors(cli.folder / "out/model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert any((tensors[name] == models[model][name]).all() for model in models)
    full = cli("shuffle-layers", "full", *draw, "--full-random", "--fp16", "--print-yaml").out
    assert full.count("sources:") == 4 and "float16" in full
    assert json.loads((cli.folder / "full/config.json").read_text())["num_hidden_layers"] == 4
    assert "one --weight for each" in cli("shuffle-layers", "x", "-m", "a", "-m", "b", "-w", "1", expect=USAGE).err


def test_bakllama(cli, models):
    path = cli.recipe(
        "layer_slices:\n  - {model: a, start: 0, end: 2}\n  - {model: b, start: 0, end: 1, scale: 0.5}\n"
        "embedding_source: b\n"
    )
    cli("merge", path, "out")
    tensors = read_safetensors(cli.folder / "out/model.safetensors")
    down = "model.layers.{}.mlp.down_proj.weight"
    assert (tensors["model.embed_tokens.weight"] == models["b"]["model.embed_tokens.weight"]).all()
    assert (tensors[down.format(1)] == models["a"][down.format(1)]).all()
    assert (tensors[down.format(2)] == models["b"][down.format(0)] / 2).all()


def test_inspect(cli, models):
    text = cli("inspect", "b").out
    for word in ("LlamaForCausalLM", "F32", "model-00003-of-00003.safetensors"):
        assert word in text
    facts = json.loads(cli("inspect", "b", "-t", "-o", "json").out)
    assert facts["parameters"] == sum(tensor.size for tensor in models["b"].values())
    assert {tensor["name"]: tensor["shape"] for tensor in facts["tensors"]} == {
        name: list(tensor.shape) for name, tensor in models["b"].items()
    }
    assert facts["dtypes"]["F32"]["tensors"] == len(models["b"]) and facts["manifest"] is None
    cli("merge", cli.recipe(linear("a", "b")), "out")
    assert json.loads(cli("inspect", "out", "-o", "json").out)["manifest"]["method"] == "linear"
    assert "merge_method: linear" in cli("inspect", "out").out
    assert "a/model.safetensors" in cli("inspect", "a/model.safetensors").out  # raw
    assert "nowhere" in cli("inspect", "nowhere", expect=NOT_FOUND).err


def test_inspect_an_adapter(cli, models):
    folder = cli.folder / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "a"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    factors = {prefix + "lora_A.weight": np.ones((4, 32), "float32"), prefix + "lora_B.weight": np.ones((32, 4), "float32")}
    write_safetensors(folder / "adapter_model.safetensors", factors)
    facts = json.loads(cli("inspect", "adapter", "-o", "json").out)
    assert facts["kind"] == "adapter" and facts["config"]["r"] == 4 and facts["tensor_count"] == 2
    adapted = json.loads(cli("inspect", "a+adapter", "-o", "json").out)
    assert adapted["adapted_tensors"] == 1 and adapted["tensor_count"] == len(models["a"])


def test_diff(cli, models):
    assert "21 of 21 tensors equal" in cli("diff", "a", "a").out
    shutil.copytree(cli.folder / "a", cli.folder / "c")
    changed = dict(models["a"])
    changed["lm_head.weight"] = changed["lm_head.weight"] + 0.5
    changed["extra"] = np.zeros(3, "float32")
    del changed["model.norm.weight"]
    write_safetensors(cli.folder / "c/model.safetensors", changed)
    text = cli("diff", "a", "c", expect=FAILED).out
    assert "19 of 22 tensors equal" in text and "only in A" in text and "only in B" in text
    result = json.loads(cli("diff", "a", "c", "-o", "json", expect=FAILED).out)
    by_name = {tensor["name"]: tensor for tensor in result["tensors"]}
    assert set(by_name) == {"lm_head.weight", "extra", "model.norm.weight"} and not result["equal"]
    assert by_name["lm_head.weight"]["max_abs"] == pytest.approx(0.5, abs=1e-5)
    assert by_name["lm_head.weight"]["equal_elements"] == 0
    assert cli("diff", "a", "c", "-q", expect=FAILED).out == ""
    cli("diff", "a", "nowhere", expect=NOT_FOUND)
    shard = cli.folder / "b/model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    cli("diff", "a", "b", expect=2)  # 1 would say "different"


def test_completion(cli):
    script = cli("completion", "bash").out

    def complete(*words):
        program = script + (
            f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _pewter; printf "%s\\n" "${{COMPREPLY[@]}}"'
        )
        run = subprocess.run(["bash", "-c", program], cwd=cli.folder, capture_output=True, text=True, check=True)
        return run.stdout.split()

    (cli.folder / "recipe.yaml").touch()
    assert complete("pewter", "me") == ["merge", "methods"]
    assert complete("pewter", "methods", "ti") == ["ties", "ties_svd"]
    assert complete("pewter", "merge", "--over") == ["--overwrite"]
    assert complete("pewter", "merge", "rec") == ["recipe.yaml"]
    assert complete("pewter", "merge", "-o", "''") == ["text", "json"]
    assert complete("pewter", "jobs", "ca") == ["cancel"]
    assert complete("pewter", "jobs", "list", "--state", "ru") == ["running"]
    for shell in ("zsh", "fish"):
        script = cli("completion", shell).out
        assert "overwrite" in script
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=script, text=True, check=True)
    assert "bash, zsh and fish" in cli("completion", "ksh", expect=USAGE).err


def test_remote_commands_need_a_server(cli, models):
    path = cli.recipe(linear("a", "b"))
    assert "PEWTER_SERVER" in cli("jobs", "list", expect=USAGE).err
    message = cli("submit", path, "out", "--server", "127.0.0.1:1", expect=FAILED).err
    assert "127.0.0.1:1" in message


# Remote jobs ------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path_factory):
    """The address of a pewterd."""
    data = tmp_path_factory.mktemp("server")
    with open(data / "log", "wb") as log:
        process = subprocess.Popen(
            [PEWTERD, "serve", "--listen", "127.0.0.1:0", "--data", data / "data"],
            stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    address = process.stdout.readline().split()[-1]
    yield address
    process.kill()
    process.wait()


def test_submit_from_here_merges_here(cli, models, server):
    recipe = cli.recipe("# relative paths, as for a local merge\n" + linear("./a", "b"))
    cli("merge", recipe, "local")
    done = cli("submit", recipe, "remote", "--server", server, "--wait", "-l", "team=nlp")
    for word in ("PLANNING", "RUNNING", "SUCCEEDED", f"Merged into {cli.folder}/remote"):
        assert word in done.out
    assert cli.hashes("remote") == cli.hashes("local")
    (job,) = cli("jobs", "list", "-q", "-s", server, "-l", "team=nlp").out.split()
    assert cli("jobs", "list", "-q", "-s", server, "-l", "team=vision").out == ""
    assert cli("jobs", "list", "-q", "-s", server, "--state", "failed").out == ""
    assert '"succeeded"' in cli("jobs", "list", "-s", server, "--state", "suceeded", expect=USAGE).err
    table = cli("jobs", "list", "-s", server).out.splitlines()
    assert table[0].split() == ["ID", "STATE", "DONE", "AGE", "DURATION", "DESTINATION", "LABELS"]
    assert table[1].split()[:3] == [job, "SUCCEEDED", "100%"] and "team=nlp" in table[1]
    text = cli("jobs", "get", job, "-s", server).out
    assert f"model: {cli.folder}/a" in text and "# relative paths" in text
    assert cli("jobs", "watch", job, "-s", server, "-q").out == f"{cli.folder}/remote\n"
    assert "deleted" in cli("jobs", "delete", job, "-s", server).out
    assert job in cli("jobs", "get", job, "-s", server, expect=NOT_FOUND).err


def test_a_server_merges_stages(cli, models, server):
    recipe = cli.recipe(STAGES)
    cli("merge", recipe, "local")
    cli("submit", recipe, "remote", "--server", server, "--wait")
    assert cli.hashes("remote") == cli.hashes("local")
    assert not (cli.folder / "remote.stages").exists()
    manifest = json.loads((cli.folder / "remote/pewter_manifest.json").read_text())
    assert [stage["name"] for stage in manifest["stages"]] == ["half"]
    assert manifest["stages"][0]["inputs"][0]["model"] == str(cli.folder / "a")


def test_a_failed_job_has_the_exit_code_of_a_local_merge(cli, models, server):
    shard = cli.folder / "b/model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    recipe = cli.recipe(linear("a", "b"))
    local = cli("merge", recipe, "out", expect=FAILED).err
    remote = cli("submit", recipe, "out", "-s", server, "--wait", expect=FAILED).err
    assert shard.name in local and shard.name in remote
    missing = cli.recipe(linear("a", "./nowhere"), "missing.yaml")
    assert "nowhere" in cli("submit", missing, "out", "-s", server, "--wait", expect=NOT_FOUND).err
    wrong = cli.recipe("merge_method: linear\nmodels: [\n", "wrong.yaml")
    assert "wrong.yaml:" in cli("submit", wrong, "out", "-s", server, expect=USAGE).err


def test_interrupting_the_wait_leaves_the_job(large, server):
    process = large.start("submit", "recipe.yaml", "waited", *large.arguments, "--server", server, "--wait")
    for line in process.stdout:
        if "RUNNING" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == INTERRUPTED, err
    (job,) = large("jobs", "list", "-q", "--server", server).out.split()
    assert f"pewter jobs watch {job} --server {server}" in err
    assert "SUCCEEDED" in large("jobs", "watch", job, "--server", server).out
    assert large.hashes("waited") == large.whole
