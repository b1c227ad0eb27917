"""Checkpoints of PyTorch (.bin, .pt): merged and converted without running what is in them; raw checkpoints.

The files are written with Python's pickle and zipfile alone, as torch.save writes them; where torch is installed, by torch, too.
"""

import collections
import io
import json
import pathlib
import pickle
import shutil
import sys
import types
import zipfile

import numpy as np
import pytest
from cli_test import FAILED, NOT_FOUND, USAGE, cli, linear, models, read_safetensors  # noqa: F401
from cli_test import server, write_llama, write_safetensors  # noqa: F401

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage", "uint16": "BFloat16Storage"}


class Storage:
    def __init__(self, array):
        self.array = array


class TorchPickler(pickle._Pickler):
    """Pickles arrays as torch.save pickles tensors; `storages` receives what they are views of."""

    def __init__(self, file, protocol=2):
        super().__init__(file, protocol)
        self.storages = []

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        self.storages.append(value.array)
        kind = type_named("torch", STORAGES[value.array.dtype.name])
        return ("storage", kind, str(len(self.storages) - 1), "cpu", value.array.size)

    def reducer_override(self, value):
        if not isinstance(value, np.ndarray):
            return NotImplemented
        flat = Storage(np.ascontiguousarray(value).reshape(-1))
        strides, shape = [1], value.shape
        for extent in reversed(shape[1:]):
            strides.insert(0, strides[0] * extent)
        strides = tuple(strides[: len(shape)])
        rebuild = type_named("torch._utils", "_rebuild_tensor_v2")
        return rebuild, (flat, 0, shape, strides, False, collections.OrderedDict())


def type_named(module, name):
    """A class that pickles as module.name."""
    return getattr(sys.modules[module], name)


@pytest.fixture
def torch_names(monkeypatch):
    """Modules of torch's names, empty but for what a state dict's pickle names."""
    for module, names in {"torch": STORAGES.values(), "torch._utils": ["_rebuild_tensor_v2"]}.items():
        stub = types.ModuleType(module)
        for name in names:
            setattr(stub, name, type(name, (), {"__module__": module}))
        monkeypatch.setitem(sys.modules, module, stub)


def save(path, tensors, protocol=2, compression=zipfile.ZIP_STORED, extra=None):
    text = io.BytesIO()
    pickler = TorchPickler(text, protocol)
    pickler.dump({**collections.OrderedDict(tensors), **(extra or {})})
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", text.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(pickler.storages):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")


def save_llama(folder, seed, shards=1, **options):
    tensors = write_llama(folder, seed)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        save(folder / "pytorch_model.bin", tensors, **options)
        return tensors
    names, index = sorted(tensors), {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = names[shard::shards]
        save(folder / file, {name: tensors[name] for name in part}, **options)
        index |= {name: file for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return tensors


def equal(left, right):
    assert set(left) == set(right)
    for name in left:
        assert left[name].dtype == right[name].dtype and np.array_equal(left[name], right[name]), name


# Merging ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_same_bytes_as_from_safetensors(cli, models, torch_names, protocol):
    save_llama(cli.folder / "ta", 1, protocol=protocol)
    save_llama(cli.folder / "tb", 2, shards=3, protocol=protocol)
    cli("merge", cli.recipe(linear("a", "b")), "out")
    cli("merge", cli.recipe(linear("ta", "tb")), "torch")
    equal(read_safetensors(cli.folder / "out/model.safetensors"), read_safetensors(cli.folder / "torch/model.safetensors"))
    manifest = json.loads((cli.folder / "torch/pewter_manifest.json").read_text())
    files = [file for model in manifest["inputs"] for file in model["files"]]
    assert len(files) == 4 and all(len(file["crc32c"]) == 8 for file in files), "every byte of the files was read"


def test_safetensors_come_first(cli, models, torch_names):
    save(cli.folder / "a/pytorch_model.bin", {"other": np.ones(3, "float32")})
    cli("merge", cli.recipe(linear("a", "b")), "out")


def test_an_adapter(cli, models, torch_names):
    folder = cli.folder / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    module = "base_model.model.model.layers.0.self_attn.q_proj."
    save(folder / "adapter_model.bin", {
        module + "lora_A.weight": np.ones((1, 32), "float32"), module + "lora_B.weight": np.ones((32, 1), "float32")})
    cli("convert", "a+adapter", "out")
    merged = read_safetensors(cli.folder / "out/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(merged.pop(name), models["a"].pop(name) + np.float32(2))
    equal(merged, models["a"])
    assert "adapter_model.bin" in cli("inspect", "adapter").out


def test_what_is_no_tensor_is_warned_of(cli, torch_names):
    save(cli.folder / "x.pt", {"w": np.ones(3, "float32")}, extra={"epoch": 3, "note": "x"})
    done = cli("convert", "x.pt", "out")
    assert '"epoch", "note"' in done.err
    (warning,) = json.loads((cli.folder / "out/pewter_manifest.json").read_text())["warnings"]
    assert '"epoch", "note"' in warning
    cli("convert", "x.pt", "strict", "--strict", expect=USAGE)


class Attack:
    def __reduce__(self):
        return (eval, (f"open({str(self.canary)!r}, 'w')",))


def test_nothing_is_run(cli, torch_names):
    Attack.canary = cli.folder / "canary"
    save(cli.folder / "x.bin", {"w": np.ones(3, "float32")}, extra={"x": Attack()}, protocol=4)
    for command in (["convert", "x.bin", "out"], ["inspect", "x.bin"], ["diff", "x.bin", "x.bin"]):
        # 1 of diff says that there are differences.
        message = cli(*command, expect=USAGE if command[0] == "diff" else FAILED).err
        assert "refuses `builtins.eval`" in message and "nothing was run" in message
    with zipfile.ZipFile(cli.folder / "x.bin") as archive:
        assert not Attack.canary.exists()

        class Loads(pickle.Unpickler):  # that the attack is one
            def persistent_load(self, key):
                return None

            def find_class(self, module, name):
                return eval if name == "eval" else lambda *arguments: collections.OrderedDict()

        Loads(io.BytesIO(archive.read("archive/data.pkl"))).load()
    assert Attack.canary.exists()


def test_compressed_archives_are_refused_with_advice(cli, torch_names):
    save(cli.folder / "x.bin", {"w": np.ones(3, "float32")}, compression=zipfile.ZIP_DEFLATED)
    assert "zip -0" in cli("convert", "x.bin", "out", expect=FAILED).err


# Converting -------------------------------------------------------------------------------------


def test_converting_a_folder(cli, torch_names):
    tensors = save_llama(cli.folder / "a", 1, shards=2)
    # The architecture does not know it; a copy has it all the same.
    save(cli.folder / "a/pytorch_model.bin", {})
    extra = {"extra.weight": np.arange(6, dtype="int64")}
    index = json.loads((cli.folder / "a/pytorch_model.bin.index.json").read_text())
    index["weight_map"]["extra.weight"] = "extra.bin"
    save(cli.folder / "a/extra.bin", extra)
    (cli.folder / "a/pytorch_model.bin.index.json").write_text(json.dumps(index))
    done = cli("convert", "a", "out")
    assert "Converted into out" in done.out
    equal(read_safetensors(cli.folder / "out/model.safetensors"), tensors | extra)
    written = {path.name for path in (cli.folder / "out").iterdir()}
    assert written == {"config.json", "tokenizer_config.json", "model.safetensors", "pewter_manifest.json"}
    assert json.loads((cli.folder / "out/config.json").read_text()) == json.loads((cli.folder / "a/config.json").read_text())
    cli("convert", "a", "out", expect=FAILED)
    cli("convert", "a", "out", "--overwrite")
    cli("convert", "a", "shards", "--shard-size", "20kB")
    assert len(list((cli.folder / "shards").glob("model-*.safetensors"))) > 2


def test_converting_to_another_dtype(cli, torch_names):
    tensors = save_llama(cli.folder / "a", 1)
    cli("convert", "a", "out", "--dtype", "float16")
    equal(read_safetensors(cli.folder / "out/model.safetensors"), {n: t.astype("float16") for n, t in tensors.items()})
    assert json.loads((cli.folder / "out/config.json").read_text())["torch_dtype"] == "float16"
    cli("convert", "a", "other", "--dtype", "int4", expect=USAGE)


def test_converting_a_file(cli, torch_names):
    tensors = {"w": np.array([1, np.nan, np.inf], "float32"), "steps": np.array(3, "int64"), "none": np.ones((0, 4), "float16")}
    save(cli.folder / "x.pth", tensors)
    done = cli("convert", "x.pth", "out")
    assert "NaN" in done.err
    result = read_safetensors(cli.folder / "out/model.safetensors")
    assert result["w"].tobytes() == tensors.pop("w").tobytes()
    result.pop("w")
    equal(result, tensors)
    cli("convert", "nothing.bin", "other", expect=NOT_FOUND)


# Raw checkpoints --------------------------------------------------------------------------------


@pytest.fixture
def raw(cli, torch_names):
    """Two files that have `both`, and a tensor each that the other has not."""
    save(cli.folder / "a.bin", {"both": np.full(3, 1, "float32"), "a": np.full(2, 1, "float32")})
    write_safetensors(cli.folder / "b.safetensors", {"both": np.full(3, 4, "float32"), "b": np.full(2, 4, "float32")})
    return cli.recipe(linear("./a.bin", "./b.safetensors"))


def test_raw_names_that_differ(cli, raw):
    message = cli("merge", raw, "out", expect=FAILED).err
    assert "a.bin lacks b" in message and "b.safetensors lacks a" in message and "--tensor-union" in message
    cli("merge", raw, "out", "-i", "-u", expect=USAGE)


@pytest.mark.parametrize("option", ["--tensor-intersection", "-i"])
def test_raw_intersection(cli, raw, option):
    done = cli("merge", raw, "out", option)
    equal(read_safetensors(cli.folder / "out/model.safetensors"), {"both": np.full(3, 3, "float32")})
    assert done.err.count("left out") == 2


@pytest.mark.parametrize("option", ["--tensor-union", "-u"])
def test_raw_union(cli, raw, option):
    cli("merge", raw, "out", option)
    equal(read_safetensors(cli.folder / "out/model.safetensors"),
          {"both": np.full(3, 3, "float32"), "a": np.full(2, 1, "float32"), "b": np.full(2, 4, "float32")})


def test_a_base_that_is_not_listed_adds_no_names(cli, raw):
    save(cli.folder / "base.bin", {"both": np.zeros(3, "float32"), "a": np.zeros(2, "float32"), "z": np.zeros(2, "float32")})
    recipe = "merge_method: task_arithmetic\nbase_model: ./base.bin\nmodels: [{model: ./a.bin, parameters: {weight: 2}}]\n"
    done = cli("merge", cli.recipe(recipe), "out")
    equal(read_safetensors(cli.folder / "out/model.safetensors"),
          {"both": np.full(3, 2, "float32"), "a": np.full(2, 2, "float32")})
    assert "left out: z" in done.err


def test_raw_union_by_a_server(cli, raw, server):
    cli("submit", raw, "out", "--wait", "--server", server, "-u")
    assert set(read_safetensors(cli.folder / "out/model.safetensors")) == {"both", "a", "b"}
    cli("submit", raw, "other", "--wait", "--server", server, expect=FAILED)


# Files that torch writes ------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch(cli, zipped):
    torch = pytest.importorskip("torch")
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "whole": whole, "transposed": whole.t(), "part": whole[1:3, ::2], "scalar": torch.tensor(5.0),
        "half": whole.half(), "steps": torch.tensor([7]), "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0, 3), "bits": whole[0].bfloat16().view(torch.int16).view(torch.bfloat16),
    }
    torch.save(tensors, cli.folder / "x.bin", _use_new_zipfile_serialization=zipped)
    cli("convert", "x.bin", "out")
    result = read_safetensors(cli.folder / "out/model.safetensors")
    assert set(result) == set(tensors)
    for name, tensor in tensors.items():
        want = tensor.detach().contiguous()
        want = want.view(torch.int16).numpy().view("uint16") if want.dtype == torch.bfloat16 else want.numpy()
        assert result[name].shape == want.shape and result[name].tobytes() == want.tobytes(), name


def test_attacks_are_refused_by_the_command_line(cli):
    """Some of the repository's own corpus, as a user would meet them."""
    attacks = pathlib.Path(__file__).resolve().parents[1] / "attacks/torch"
    for name in ("os_system", "stack_global", "legacy_os_system", "torch_load_from_bytes"):
        shutil.copy(attacks / f"{name}.bin", cli.folder)
        assert "refuses" in cli("convert", f"{name}.bin", "out", expect=FAILED).err
    assert not pathlib.Path("/tmp/pewter_attack_canary").exists()
