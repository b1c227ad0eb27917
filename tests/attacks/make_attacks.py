#!/usr/bin/env python3
"""Writes the hostile checkpoints beside this script, each described in README.md.

Only the standard library is needed. The output is the same on every run: the files are kept in the
repository, and this script shows what is in them.
"""
import json
import os
import pathlib
import shutil
import struct

HERE = pathlib.Path(__file__).resolve().parent


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors(header, data=b"", length=None):
    """`header` is text, bytes or a dict; `length` is what the file claims, if not the truth."""
    if isinstance(header, dict):
        header = json.dumps(header, separators=(",", ":"))
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def floats(*values):
    return struct.pack("<%df" % len(values), *values)


def pickle_that_runs_a_command():
    return b"\x80\x02cposix\nsystem\nX\x10\x00\x00\x00touch /tmp/pwned\x85R."


def write(path, content):
    path = HERE / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def link(path, target):
    path = HERE / path
    path.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, path)


def write_files():
    one = {"w": tensor("U8", [4], 0, 4)}
    files = {
        "empty": b"",
        "seven_bytes": b"\x02\0\0\0\0\0\0",
        "length_max": safetensors("{}", length=2**64 - 1),
        "length_wraps": safetensors("{}", length=2**64 - 8),
        "length_over_limit": safetensors("{}", length=100_000_001),
        "length_longer_than_file": safetensors("{}", length=1000),
        "deep_arrays": safetensors('{"w":' + "[" * 20_000),
        "deep_objects": safetensors('{"w":' * 5_000),
        "nul_hides_text": safetensors(b"{}\0" + b'{"w":1}'),
        "not_utf8": safetensors(b'{"\xff\xfe":1}'),
        "byte_order_mark": safetensors(b"\xef\xbb\xbf{}"),
        "terminal_escape_in_name": safetensors('{"\\u001b]0;pwned\\u0007":1}'),
        "long_name": safetensors({"x" * 30_000: 1}),
        "tensor_twice": safetensors(
            '{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            '"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"ab"),
        "dtype_twice": safetensors(
            '{"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"a"),
        "metadata_is_nested": safetensors('{"__metadata__":{"a":{"b":"c"}}}'),
        "shape_product_wraps_to_zero": safetensors({"w": tensor("U8", [2**32, 2**32], 0, 0)}),
        "byte_size_wraps_to_zero": safetensors({"w": tensor("F64", [2**61], 0, 0)}),
        "offset_wraps": safetensors({"w": tensor("U8", [4], 2**64 - 4, 2**64)}, b"data"),
        "end_over_int64": safetensors({"w": tensor("U8", [4], 0, 2**63)}, b"data"),
        "negative_dimensions": safetensors({"w": tensor("U8", [-2, -2], 0, 4)}, b"data"),
        "nine_dimensions": safetensors({"w": tensor("U8", [1] * 9, 0, 1)}, b"d"),
        "long_shape": safetensors({"w": tensor("U8", [1] * 10_000, 0, 1)}, b"d"),
        "same_bytes_1000_times": safetensors(
            {"w%d" % i: tensor("U8", [4], 0, 4) for i in range(1000)}, b"data"),
        "hole_with_payload": safetensors(
            {"a": tensor("U8", [1], 0, 1), "b": tensor("U8", [1], 9, 10)}, b"a#!hidden#b"[:10]),
        "payload_after_the_end": safetensors(one, b"dataPK\x05\x06" + b"\0" * 18),
        "truncated": safetensors({"w": tensor("F32", [1000], 0, 4000)}, b"\0" * 3999),
        "pickle": pickle_that_runs_a_command(),
        "huge_but_empty": safetensors({"w": tensor("F32", [0, 2**40], 0, 0)}),
        "control_in_good_file": safetensors(
            {"a\u001b[31m/../\"b": tensor("U8", [1], 0, 1)}, b"d"),
    }
    for name, content in files.items():
        write("files/%s.safetensors" % name, content)


def write_folders():
    shard = safetensors({"w": tensor("U8", [4], 0, 4)}, b"data")

    def folder(name, index=None, **files):
        write("folders/%s/config.json" % name, "{}")
        if index is not None:
            if not isinstance(index, str):
                index = json.dumps({"weight_map": index})
            write("folders/%s/model.safetensors.index.json" % name, index)
        for file, content in files.items():
            write("folders/%s/%s" % (name, file.replace("__", ".")), content)

    write("folders/secret.safetensors", shard)
    folder("index_leads_up", {"w": "../secret.safetensors"})
    folder("index_is_absolute", {"w": "/etc/passwd"})
    folder("index_backslash", {"w": "..\\secret.safetensors"})
    folder("index_nul", '{"weight_map":{"w":"a\\u0000b"}}')
    folder("index_deep", '{"metadata":' + "[" * 20_000)
    folder("index_tensor_twice", '{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}',
           a__safetensors=shard, b__safetensors=shard)
    folder("index_shard_missing", {"w": "a.safetensors"})
    folder("index_tensor_missing", {"w": "a.safetensors", "v": "a.safetensors"},
           a__safetensors=shard)
    folder("index_hides_a_tensor", {}, a__safetensors=shard)
    folder("index_lacks_a_tensor", {"v": "a.safetensors"}, a__safetensors=safetensors(
        {"v": tensor("U8", [2], 0, 2), "w": tensor("U8", [2], 2, 4)}, b"data"))
    folder("same_tensor_in_two_shards", {"w": "a.safetensors", "v": "b.safetensors"},
           a__safetensors=shard, b__safetensors=safetensors(
               {"v": tensor("U8", [2], 0, 2), "w": tensor("U8", [2], 2, 4)}, b"data"))
    folder("pickle_only", pytorch_model__bin=pickle_that_runs_a_command())
    folder("weights_are_a_device")
    link("folders/weights_are_a_device/model.safetensors", "/dev/zero")
    folder("weights_are_a_loop")
    link("folders/weights_are_a_loop/model.safetensors", "model.safetensors")
    folder("weights_are_a_folder")
    write("folders/weights_are_a_folder/model.safetensors/x", "")


def write_adapters():
    """Adapters of base/, which has one tensor: w.weight, F32 [2, 3]."""
    write("base/config.json", "{}")
    write("base/model.safetensors",
          safetensors({"w.weight": tensor("F32", [2, 3], 0, 24)}, floats(1, 2, 3, 4, 5, 6)))

    def factors(rank, a=True, b=True, module="w"):
        header, data = {}, b""
        if a:
            header["base_model.model.%s.lora_A.weight" % module] = tensor(
                "F32", [rank, 3], 0, 12 * rank)
            data += floats(*[1] * 3 * rank)
        if b:
            header["base_model.model.%s.lora_B.weight" % module] = tensor(
                "F32", [2, rank], len(data), len(data) + 8 * rank)
            data += floats(*[1] * 2 * rank)
        return safetensors(header, data)

    def adapter(name, weights=None, **config):
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config}
        write("adapters/%s/adapter_config.json" % name, json.dumps(config))
        if weights is not None:
            write("adapters/%s/adapter_model.safetensors" % name, weights)

    adapter("good", factors(1))
    adapter("rank_is_huge", factors(1), r=2**40)
    adapter("rank_is_zero", factors(1), r=0)
    adapter("rank_is_another", factors(1), r=2)
    adapter("rank_zero_factors", factors(0))
    adapter("alpha_is_infinite", factors(1))
    write("adapters/alpha_is_infinite/adapter_config.json",
          '{"peft_type":"LORA","r":1,"lora_alpha":1e999}')
    adapter("pattern_explodes", factors(1, module="a" * 40 + "!"),
            rank_pattern={"(a+)+": 2, "(a|a)*b": 3})
    adapter("pattern_is_huge", factors(1), rank_pattern={"((a{1,100}){1,100}){1,100}": 2})
    adapter("factor_missing", factors(1, b=False))
    adapter("module_unknown", factors(1, module="v"))
    adapter("dora", factors(1), use_dora=True)
    adapter("config_is_deep", factors(1))
    write("adapters/config_is_deep/adapter_config.json", '{"peft_type":' + "[" * 20_000)
    adapter("config_is_long", factors(1), task_type="x" * 300_000)
    adapter("pickle")
    write("adapters/pickle/adapter_model.bin", pickle_that_runs_a_command())


def main():
    for folder in ("files", "folders", "adapters", "base"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    write_files()
    write_folders()
    write_adapters()


if __name__ == "__main__":
    main()
