#!/usr/bin/env python3
"""Writes the hostile checkpoints beside this script, each described in README.md.

Only the standard library is needed. The output is the same on every run: the files are kept in the
repository, and this script shows what is in them.
"""
import io
import json
import os
import pathlib
import shutil
import struct
import warnings
import zipfile
import zlib

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
    attack = checkpoint(beside_tensor(call(b"os", b"system", text(COMMAND))))
    folder("pickle_only", pytorch_model__bin=attack)
    folder("pickle_shards", pytorch_model__bin__index__json=json.dumps(
        {"weight_map": {"w": "../secret.safetensors"}}))
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
    write("adapters/pickle/adapter_model.bin",
          checkpoint(beside_tensor(call(b"os", b"system", text(COMMAND)))))


# --- files of torch.save ------------------------------------------------------------------------
# Pickles are written opcode by opcode. https://docs.python.org/3/library/pickletools.html

CANARY = b"/tmp/pewter_attack_canary"
COMMAND = b"touch " + CANARY


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


def integer(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def name(module, function):
    return b"c" + module + b"\n" + function + b"\n"


def tup(*items):
    return b"(" + b"".join(items) + b"t"


def call(module, function, *arguments):
    return name(module, function) + tup(*arguments) + b"R"


def storage(key=b"0", kind=b"FloatStorage", elements=4):
    return tup(text(b"storage"), name(b"torch", kind), text(key), text(b"cpu"), integer(elements)) + b"Q"


def view(shape=(4,), strides=(1,), offset=0, of=None, extra=b""):
    return call(b"torch._utils", b"_rebuild_tensor_v2", of or storage(), integer(offset),
                tup(*map(integer, shape)), tup(*map(integer, strides)), b"\x89",
                b"ccollections\nOrderedDict\n)R", extra)


def dictionary(*entries):
    return b"}(" + b"".join(key + value for key, value in entries) + b"u"


def state(*entries):
    return b"\x80\x02" + dictionary(*entries) + b"."


def of_tensor(tensor):
    return state((text(b"w"), tensor))


def beside_tensor(value):
    """An entry that is no tensor; the tensor shows whether it can be read all the same."""
    return state((text(b"x"), value), (text(b"w"), view()))


def archive(entries, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as packed:
        warnings.simplefilter("ignore")  # of names that are there twice
        for entry, content in entries:
            info = zipfile.ZipInfo(entry, (1980, 1, 1, 0, 0, 0))
            info.compress_type = compression
            packed.writestr(info, content)
    return file.getvalue()


def checkpoint(pickle, *more, data=floats(1, 2, 3, 4), **options):
    return archive([("archive/data.pkl", pickle), ("archive/data/0", data), *more], **options)


def legacy(pickle=None, machine=None, keys=None, data=struct.pack("<Q", 4) + floats(1, 2, 3, 4),
           protocol=b"\x80\x02M\xe9\x03."):
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    machine = machine or state((text(b"protocol_version"), b"M\xe9\x03"),
                               (text(b"little_endian"), b"\x88"))
    keys = keys or b"\x80\x02](" + text(b"0") + b"e."
    return magic + protocol + machine + (pickle or of_tensor(view())) + keys + data


def archive64(entries, bytes_=None, offset=None, field=True, end=None):
    """An archive whose numbers all stand in ZIP64's fields. What is given replaces the last entry's."""
    content, directory = b"", b""
    for i, (entry, data) in enumerate(entries):
        last = i + 1 == len(entries)
        size = len(data) if bytes_ is None or not last else bytes_
        at = len(content) if offset is None or not last else offset
        crc, entry, most = zlib.crc32(data), entry.encode(), 2**32 - 1
        sizes = struct.pack("<HHQQ", 1, 16, size, size)
        content += struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 45, 0, 0, 0, 33, crc, most, most,
                               len(entry), len(sizes)) + entry + sizes + data
        extra = struct.pack("<HHQQQ", 1, 24, size, size, at) if field or not last else b""
        directory += struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 45, 45, 0, 0, 0, 33, crc, most, most,
                                 len(entry), len(extra), 0, 0, 0, 0, most) + entry + extra
    end64 = len(content) + len(directory)
    return content + directory + struct.pack(
        "<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, len(entries), len(entries), len(directory),
        len(content)) + struct.pack("<4sIQI", b"PK\x06\x07", 0, end64 if end is None else end, 1) + struct.pack(
        "<4sHHHHIIH", b"PK\x05\x06", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)


def patched(content, old, new):
    assert content.count(old) == 1 and len(old) == len(new), (old, content.count(old))
    return content.replace(old, new)


def write_torch_files():
    # What a pickle may not name, however it does it.
    os_system = call(b"os", b"system", text(COMMAND))
    refused = {
        "os_system": os_system,
        "posix_system": call(b"posix", b"system", text(COMMAND)),
        "subprocess_popen": call(b"subprocess", b"Popen", text(b"touch"), text(CANARY)),
        "builtins_eval": call(b"builtins", b"eval", text(b"__import__('os').system('touch')")),
        "builtins_exec": call(b"builtins", b"exec", text(b"import os")),
        "python_2_eval": call(b"__builtin__", b"eval", text(b"1")),
        "builtins_getattr": call(b"builtins", b"getattr", name(b"torch", b"Size"), text(b"mro")),
        "runpy": call(b"runpy", b"_run_code", text(b"import os")),
        "importlib": call(b"importlib", b"import_module", text(b"os")),
        "functools_partial": call(b"functools", b"partial", name(b"torch", b"Size")),
        "operator_attrgetter": call(b"operator", b"attrgetter", text(b"system")),
        "copyreg": call(b"copyreg", b"_reconstructor", b"N", b"N", b"N"),
        "codecs": call(b"_codecs", b"encode", text(b"x"), text(b"latin1")),
        "numpy_reconstruct": call(b"numpy.core.multiarray", b"_reconstruct", b"N"),
        "torch_load": call(b"torch", b"load", text(b"other.bin")),
        "torch_hub_load": call(b"torch.hub", b"load", text(b"a/b"), text(b"c")),
        "torch_load_from_bytes": call(b"torch.storage", b"_load_from_bytes", b"C\x01x"),
        "torch_jit_load": call(b"torch.jit", b"load", text(b"other.pt")),
        "torch_sparse": call(b"torch._utils", b"_rebuild_sparse_tensor", b"N", b"N"),
        "torch_dotted": name(b"torch", b"_utils.os.system") + tup(text(COMMAND)) + b"R",
        "torch_dotted_dtype": name(b"torch", b"torch.float32"),
        "dict_method": name(b"collections", b"OrderedDict.fromkeys") + tup(text(b"x")) + b"R",
        "stack_global": text(b"os") + text(b"system") + b"\x93" + tup(text(COMMAND)) + b"R",
        "stack_global_dotted": text(b"builtins") + text(b"__import__.__self__.eval") + b"\x93",
        "inst": b"(" + text(COMMAND) + b"ios\nsystem\n",
        "obj": b"(" + name(b"torch", b"Size") + b"o",
        "newobj": name(b"torch", b"Size") + b")\x81",
        "newobj_ex": name(b"torch", b"Size") + b")}\x92",
        "ext1": b"\x82\x01",
        "ext2": b"\x83\x01\x01",
        "ext4": b"\x84\x01\x01\x01\x01",
        "persid": b"P0\n",
        "next_buffer": b"\x97",
        "terminal_escape_in_a_name": name(b"\x1b]0;pwned\x07", b"x"),
        "long_name_of_a_function": name(b"x" * 30_000, b"y"),
        "build_calls_setstate": view() + dictionary((text(b"x"), b"N")) + b"b",
        "negated": view(extra=dictionary((text(b"neg"), b"\x88"))),
        # Malformed.
        "reduce_of_a_dict": b"})R",
        "reduce_of_text": text(b"x") + b")R",
        "reduce_of_a_type": call(b"torch", b"FloatStorage", integer(4)),
        "type_of_another_kind": call(b"torch._tensor", b"_rebuild_from_type_v2",
                                     name(b"torch", b"Size"), name(b"torch", b"Tensor"),
                                     tup(tup()), b"N"),
        "type_of_itself": call(b"torch._tensor", b"_rebuild_from_type_v2",
                               name(b"torch._tensor", b"_rebuild_from_type_v2"),
                               name(b"torch", b"Tensor"), tup(), b"N"),
        "no_such_memo": b"h\x01",
        "text_is_huge": b"\x8d" + struct.pack("<Q", 2**62) + b"x",
        "text_size_wraps": b"\x8d" + struct.pack("<Q", 2**64 - 1) + b"x",
        "bytes_are_huge": b"\x8e" + struct.pack("<Q", 2**40) + b"x",
        "number_is_huge": b"\x8b" + struct.pack("<I", 2**31 - 1) + b"x",
        "frame_is_huge": b"\x95" + struct.pack("<Q", 2**62),
        "unknown_opcode": b"\xff",
        "text_opcode": b"I42\n",
        "items_for_a_number": b"K\x01" + text(b"x") + b"a",
        "dict_lacks_a_value": b"}(K\x01u",
        "no_mark": b"t",
        "pop_below_the_mark": b"(\x85",
        "no_storage": tup(text(b"module"), name(b"torch", b"Size"), text(b"0"), text(b"cpu"),
                          integer(4)) + b"Q",
        "deep_marks": b"(" * 2000,
        # A list of 1000 pairs, copied into 10 000 dicts.
        "dicts_of_one_list": b"](" + b"](K\x01K\x01e" * 1000 + b"eq\x00" +
        b"(" + (name(b"collections", b"OrderedDict") + b"q\x01" + b"h\x00\x85R") +
        b"h\x01h\x00\x85R" * 10_000 + b"t\x86",
    }
    for attack, value in refused.items():
        write("torch/%s.bin" % attack, checkpoint(beside_tensor(value)))

    # What is odd and harmless.
    bomb = b"](K\x01eq\x01" + b"".join(
        b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(1, 60))
    for attack, value in {
            "memo_bomb": b"(" + bomb + b"t",
            "deep_lists": b"]" * 900 + b"a" * 899,
            "list_in_itself": b"]q\x01h\x01a",
            "long_number": b"\x8a\xff" + b"\x01" * 255,
    }.items():
        write("torch/%s.bin" % attack, checkpoint(beside_tensor(value)))
    write("torch/good.bin", checkpoint(of_tensor(view())))
    write("torch/nested.bin", checkpoint(state((text(b"state_dict"), dictionary((text(b"w"), view()))),
                                               (text(b"epoch"), b"K\x01"))))
    write("torch/transposed.bin", checkpoint(of_tensor(view((2, 2), (1, 2)))))
    write("torch/huge_but_empty.bin", checkpoint(of_tensor(view((0, 2**40), (2**40, 1)))))

    # Views that are none of their storage.
    for attack, value in {
            "beyond_its_storage": view((5,)),
            "offset_beyond_its_storage": view((1,), offset=5),
            "offset_reaches_beyond": view((4,), offset=1),
            "strides_reach_beyond": view((2, 2), (3, 1)),
            "offset_overflows": view((1,), offset=2**62),
            "offset_is_negative": view((1,), offset=-1),
            "stride_overflows": view((4,), (2**62,)),
            "stride_is_negative": view((4,), (-1,), offset=3),
            "extent_is_negative": view((-4,)),
            "elements_overflow": view((2**32, 2**32), (2**32, 1)),
            "bytes_overflow": view((2**62,)),
            "same_element_4_times": view((4,), (0,)),
            "overlapping_rows": view((2, 2), (1, 1)),
            "nine_axes": view((1,) * 9, (1,) * 9),
            "more_axes_than_strides": view((2, 2), (1,)),
            "extent_is_no_number": call(b"torch._utils", b"_rebuild_tensor", storage(), integer(0),
                                        tup(text(b"4")), tup(integer(1))),
            "extent_is_a_long_number": call(b"torch._utils", b"_rebuild_tensor", storage(), integer(0),
                                            tup(b"\x8a\x09" + b"\x01" * 9), tup(integer(1))),
            "storage_is_missing": view(of=storage(b"1")),
            "storage_is_shorter": view(of=storage(elements=5)),
            "storage_is_longer": view(of=storage(elements=3)),
            "storage_overflows": view(of=storage(elements=2**62)),
            "storage_leads_up": view(of=storage(b"../0")),
    }.items():
        write("torch/%s.bin" % attack, checkpoint(of_tensor(value)))

    # Dicts.
    for attack, pickle in {
            "tensor_twice": state((text(b"w"), view()), (text(b"w"), view())),
            "name_is_no_text": state((b"K\x01", view())),
            "name_is_not_utf8": state((text(b"\xff"), view())),
            "terminal_escape_in_name": state((text(b"\x1b]0;pwned\x07"), view((5,)))),
            "two_state_dicts": state((text(b"model"), dictionary((text(b"w"), view()))),
                                     (text(b"state_dict"), dictionary((text(b"w"), view())))),
            "tensors_beside_a_state_dict": state(
                (text(b"w"), view()), (text(b"model"), dictionary((text(b"w"), view())))),
            "no_tensors": state((text(b"epoch"), b"K\x01")),
            "root_is_a_list": b"\x80\x02].",
            "no_stop": of_tensor(view())[:-1],
            "bytes_after_stop": of_tensor(view()) + b"cos\nsystem\n",
            "protocol_9": b"\x80\x09}.",
            "protocol_0": b"(dp0\n.",
    }.items():
        write("torch/%s.bin" % attack, checkpoint(pickle))

    # The archive.
    good = checkpoint(of_tensor(view()))
    write("torch/compressed.bin", checkpoint(of_tensor(view()), compression=zipfile.ZIP_DEFLATED))
    write("torch/zip_bomb.bin", checkpoint(of_tensor(view()), data=b"\0" * 10_000_000,
                                           compression=zipfile.ZIP_DEFLATED))
    write("torch/truncated.bin", good[:len(good) // 2])
    write("torch/something_before.bin", b"PK\x03\x04####" + good)
    write("torch/wrong_checksum.bin", patched(good, text(b"w"), text(b"v")))
    write("torch/pickle_twice.bin", checkpoint(of_tensor(view()), ("archive/data.pkl", os_system)))
    write("torch/two_archives.bin", checkpoint(of_tensor(view()), ("other/data.pkl", os_system)))
    write("torch/no_pickle.bin", archive([("archive/data/0", floats(1, 2, 3, 4))]))
    write("torch/torchscript.bin", checkpoint(of_tensor(view()), ("archive/constants.pkl", b"")))
    write("torch/big_endian.bin", checkpoint(of_tensor(view()), ("archive/byteorder", b"big")))
    for attack, entry in {
            "entry_leads_up": "archive/../../../tmp/pewter_attack_canary",
            "entry_is_absolute": "/tmp/pewter_attack_canary",
            "entry_with_backslash": "archive\\..\\x",
            "entry_elsewhere": "other/data/0",
    }.items():
        write("torch/%s.bin" % attack, checkpoint(of_tensor(view()), (entry, b"x")))
    # The first storage holds the second one's header and bytes.
    inner = archive([("archive/data/1", floats(1, 2, 3, 4))])
    inner = inner[:inner.index(b"PK\x01\x02")]
    two = checkpoint(of_tensor(view()), ("archive/data/1", floats(1, 2, 3, 4)), data=inner)
    record = two.rindex(b"archive/data/1") - 46
    write("torch/entries_overlap.bin",
          two[:record + 42] + struct.pack("<I", two.index(inner)) + two[record + 46:])
    write("torch/entry_of_another_name.bin", patched(good, b"archive/data/0PK", b"archive/data/1PK"))
    record = good.rindex(b"archive/data/0") - 46
    sizes = struct.pack("<II", 2**31, 2**31)
    begin = good.index(b"archive/data/0") - 30
    write("torch/entry_beyond_the_end.bin", good[:begin + 18] + sizes + good[begin + 26:record + 20] +
          sizes + good[record + 28:])
    write("torch/entry_of_two_sizes.bin",
          good[:record + 20] + struct.pack("<II", 8, 8) + good[record + 28:])
    end = good.rindex(b"PK\x05\x06")
    write("torch/directory_counts_too_many.bin", good[:end + 8] + b"\xff\x7f\xff\x7f" + good[end + 12:])
    write("torch/directory_beyond_the_end.bin", good[:end + 12] + b"\xff\xff\xff\x7f" * 2 + good[end + 20:])
    entries = [("archive/data.pkl", of_tensor(view())), ("archive/data/0", floats(1, 2, 3, 4))]
    for attack, options in {
            "zip64": {},
            "zip64_size_wraps": {"bytes_": 2**64 - 1},
            "zip64_offset_wraps": {"offset": 2**64 - 8},
            "zip64_number_missing": {"field": False},
            "zip64_end_beyond_the_end": {"end": 2**63},
    }.items():
        write("torch/%s.bin" % attack, archive64(entries, **options))
    write("torch/empty.bin", b"")
    write("torch/plain_pickle.bin", pickle_that_runs_a_command())
    write("torch/safetensors.bin", safetensors({"w": tensor("U8", [4], 0, 4)}, b"data"))

    # Before PyTorch 1.6.
    write("torch/legacy_good.bin", legacy())
    write("torch/legacy_os_system.bin", legacy(beside_tensor(os_system)))
    write("torch/legacy_machine.bin", legacy(machine=b"\x80\x02" + os_system + b"."))
    write("torch/legacy_protocol.bin", legacy(protocol=b"\x80\x02" + os_system + b"."))
    write("torch/legacy_keys.bin", legacy(keys=b"\x80\x02" + os_system + b"."))
    write("torch/legacy_truncated.bin", legacy()[:-1])
    write("torch/legacy_in_a_pickle.bin", legacy()[:60])
    write("torch/legacy_text_is_huge.bin", legacy(beside_tensor(refused["text_is_huge"])))
    write("torch/legacy_storage_is_huge.bin", legacy(data=struct.pack("<Q", 2**62) + b"x"))
    write("torch/legacy_storage_is_shorter.bin", legacy(data=struct.pack("<Q", 2) + floats(1, 2)))
    write("torch/legacy_storage_twice.bin", legacy(
        keys=b"\x80\x02](" + 2 * text(b"0") + b"e.", data=2 * (struct.pack("<Q", 4) + floats(1, 2, 3, 4))))
    write("torch/legacy_more_bytes.bin", legacy() + b"#")
    write("torch/legacy_big_endian.bin", legacy(machine=state((text(b"little_endian"), b"\x89"))))
    write("torch/legacy_storage_of_two_types.bin", legacy(state(
        (text(b"w"), view()), (text(b"v"), view(of=storage(kind=b"LongStorage"))))))


def main():
    for folder in ("files", "folders", "adapters", "torch", "base"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    write_files()
    write_folders()
    write_adapters()
    write_torch_files()


if __name__ == "__main__":
    main()
