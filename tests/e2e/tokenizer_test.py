"""Tokenizers of merged models: ids, rows and files agree, and transformers reads the files.

The checks of the files need what cli_test.py needs; those of the loaded tokenizer need transformers and are skipped
without it.
"""

import json

import numpy as np
import pytest

from cli_test import CONFIG, cli, llama_tensors, read_safetensors, write_safetensors  # noqa: F401

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def added(token, index, special=True, **flags):
    entry = {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
    return entry | {"normalized": not special, "special": special} | flags


def bpe(extra=(), merges=(), tokens=()):
    """A byte-level BPE: letters, merges, further tokens of its own, then added ones."""
    vocabulary = ["<unk>", "<s>", "</s>", "\u0120", *ALPHABET, *("".join(m) for m in merges), *tokens]
    special = [added(token, i) for i, token in enumerate(vocabulary[:3])]
    special += [added(token, len(vocabulary) + i, *flags) for i, (token, *flags) in enumerate(extra)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(vocabulary)},
            "merges": [list(m) for m in merges],
        },
    }


def ids_of(tokenizer):
    ids = dict(tokenizer["model"]["vocab"])
    for token in tokenizer["added_tokens"]:
        ids[token["content"]] = token["id"]
    return ids


def write_model(folder, tokenizer, seed, style="new", vocabulary=None, **config):
    """Row i of the embeddings is all 1000 * seed + i."""
    size = vocabulary or max(ids_of(tokenizer).values()) + 1
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None} | config)
    )
    tensors = llama_tensors(seed)
    rows = (1000 * seed + np.arange(size, dtype="float32"))[:, None] * np.ones((1, CONFIG["hidden_size"]), "float32")
    tensors |= {"model.embed_tokens.weight": rows, "lm_head.weight": -rows}
    write_safetensors(folder / "model.safetensors", tensors)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64} | roles
    if style == "slow":
        settings["tokenizer_class"] = "GPT2Tokenizer"
        model = tokenizer["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in model["merges"]))
        extra = {t["content"]: t["id"] for t in tokenizer["added_tokens"] if t["content"] not in model["vocab"]}
        if extra:
            (folder / "added_tokens.json").write_text(json.dumps(extra))
    else:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    if style == "old":
        settings["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in tokenizer["added_tokens"]
        }
        (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


BASE = bpe([("<base>",)], [("a", "b")])
CHAT = bpe([("<|im_start|>",), ("<|im_end|>",), ("plainword", False)], [("c", "d"), ("cd", "e")])


def union(tokenizer="tokenizer_source: union", base="./base", others=("./chat",)):
    models = "".join(f"  - {{model: {m}, parameters: {{weight: 1}}}}\n" for m in (base, *others))
    return f"merge_method: linear\nbase_model: {base}\nmodels:\n{models}dtype: float32\n{tokenizer}\n"


def check_output(folder):
    """Sizes agree; returns ids and embeddings."""
    config = json.loads((folder / "config.json").read_text())
    ids = ids_of(json.loads((folder / "tokenizer.json").read_text()))
    tensors = read_safetensors(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert tensors[name].shape == (config["vocab_size"], CONFIG["hidden_size"])
    assert sorted(ids.values()) == list(range(len(ids)))
    assert len(ids) <= config["vocab_size"]
    return ids, tensors["model.embed_tokens.weight"]


def load(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def check_loaded(folder, ids, texts):
    """transformers agrees with the file about every id, and finds added tokens in text."""
    tokenizer = load(folder)
    assert tokenizer.get_vocab() == ids
    for text, tokens in texts.items():
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == [ids[token] for token in tokens], text
    return tokenizer


@pytest.mark.parametrize("style", ["new", "old"])
def test_union(cli, style):
    write_model(cli.folder / "base", BASE, 1, style)
    write_model(cli.folder / "chat", CHAT, 2, style)
    cli("merge", cli.recipe(union()), "out")
    ids, rows = check_output(cli.folder / "out")
    base, chat = ids_of(BASE), ids_of(CHAT)
    assert set(ids) == set(base) | set(chat)
    assert {token: ids[token] for token in base} == base
    assert [t for t in sorted(ids, key=ids.get) if t not in base] == [
        "cd",
        "cde",
        "<|im_start|>",
        "<|im_end|>",
        "plainword",
    ]
    for token, index in ids.items():
        of_base, of_chat = 1000 + base.get(token, 0), 2000 + chat.get(token, 0)
        if token not in base:
            of_base = of_chat
        if token not in chat:
            of_chat = of_base
        assert rows[index][0] == (of_base + of_chat) / 2, token
    check_loaded(
        cli.folder / "out",
        ids,
        {"<|im_start|>ab<|im_end|>": ["<|im_start|>", "ab", "<|im_end|>"], "a plainword": ["a", "\u0120", "plainword"]},
    )


def test_union_is_the_same_every_time(cli):
    write_model(cli.folder / "base", BASE, 1)
    write_model(cli.folder / "chat", CHAT, 2)
    recipe = cli.recipe(union("tokenizer: {pad_to_multiple_of: 16}"))
    cli("merge", recipe, "one", "--threads", 1)
    cli("merge", recipe, "two", "--threads", 4)
    assert cli.hashes("one") == cli.hashes("two")
    for file in ("tokenizer.json", "config.json"):
        assert (cli.folder / "one" / file).read_bytes() == (cli.folder / "two" / file).read_bytes()
    ids, rows = check_output(cli.folder / "one")
    assert len(rows) == 48 and len(ids) == 37
    mean = rows[: len(ids)].mean(axis=0, dtype="float64")
    assert np.abs(rows[len(ids) :] - mean).max() < 1e-3


def test_new_tokens_from_anywhere(cli):
    write_model(cli.folder / "base", BASE, 1, "old")
    write_model(cli.folder / "chat", CHAT, 2)
    cli(
        "merge",
        cli.recipe(
            union(
                "tokenizer:\n  source: base\n  tokens:\n"
                "    <|im_end|>: {source: ./chat}\n"
                "    <new>: {source: {kind: model_token, model: ./chat, token: cd}}\n"
                "    <zero>: {source: {kind: zero}}\n"
                "    a: {source: ./chat, force: true}\n"
            )
        ),
        "out",
    )
    ids, rows = check_output(cli.folder / "out")
    size = len(ids_of(BASE))
    assert [ids["<|im_end|>"], ids["<new>"], ids["<zero>"]] == [size, size + 1, size + 2]
    chat = ids_of(CHAT)
    assert list(rows[size:, 0]) == [2000 + chat["<|im_end|>"], 2000 + chat["cd"], 0]
    assert rows[ids["a"]][0] == 2000 + chat["a"]
    tokenizer = check_loaded(cli.folder / "out", ids, {"a<new>b<|im_end|>": ["a", "<new>", "b", "<|im_end|>"]})
    assert tokenizer.decode([ids["a"], ids["<|im_end|>"]], skip_special_tokens=True) == "a"


def test_files_without_tokenizer_json(cli):
    write_model(cli.folder / "base", bpe([], [("a", "b")]), 1, "slow")
    write_model(cli.folder / "chat", CHAT, 2)
    cli("merge", cli.recipe(union("tokenizer: {source: base, tokens: {<|im_end|>: {source: ./chat}}}")), "out")
    out = cli.folder / "out"
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 32
    assert json.loads((out / "added_tokens.json").read_text())["<|im_end|>"] == 31
    assert (out / "merges.txt").exists() and not (out / "tokenizer.json").exists()
    tokenizer = load(out)
    assert len(tokenizer) == 32
    assert tokenizer("ab<|im_end|>", add_special_tokens=False)["input_ids"] == [30, 31]


def test_tokens_without_rows_are_taken_out(cli):
    """A padding token that was added and never given a row, and ordinary tokens beyond the embeddings."""
    base = bpe([("<pad>",)], [("a", "b"), ("c", "d")])
    write_model(cli.folder / "base", base, 1, "old", vocabulary=len(ids_of(base)) - 2)
    path = cli.folder / "base/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<pad>"}))
    write_model(cli.folder / "chat", CHAT, 2)
    done = cli("merge", cli.recipe(union()), "out")
    assert "2 tokens have ids beyond" in done.err and "pad_token" in done.err
    ids, rows = check_output(cli.folder / "out")
    assert "<pad>" not in ids and ids["cd"] == 31
    assert rows[ids["cd"]][0] == 2000 + ids_of(CHAT)["cd"]
    tokenizer = check_loaded(cli.folder / "out", ids, {"ab": ["ab"]})
    assert tokenizer.pad_token is None


def test_ids_in_configurations_follow_their_tokens(cli):
    moved = bpe([("<|im_end|>",)])
    vocabulary = moved["model"]["vocab"]
    vocabulary["</s>"], vocabulary["a"] = vocabulary["a"], vocabulary["</s>"]
    moved["added_tokens"][2]["id"] = vocabulary["</s>"]
    moved["added_tokens"].sort(key=lambda token: token["id"])
    write_model(cli.folder / "base", BASE, 1)
    (cli.folder / "base/generation_config.json").write_text('{"eos_token_id": [2], "temperature": 0.5}')
    write_model(cli.folder / "chat", moved, 2)
    cli("merge", cli.recipe(union("tokenizer: {source: ./chat}")), "out")
    ids, _ = check_output(cli.folder / "out")
    assert ids["</s>"] == ids_of(BASE)["a"]
    config = json.loads((cli.folder / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, ids["</s>"])
    generation = json.loads((cli.folder / "out/generation_config.json").read_text())
    assert generation == {"eos_token_id": [ids["</s>"]], "temperature": 0.5}
    assert check_loaded(cli.folder / "out", ids, {}).eos_token_id == ids["</s>"]


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]

PROMPTS = {
    "alpaca": "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi</s>\n\n### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi[|endofturn|]\n[|user|]Bye\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHello [/INST] Hi</s>[INST] Bye [/INST]",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_known_chat_templates(cli, name):
    write_model(cli.folder / "base", BASE, 1)
    recipe = cli.recipe(
        f"merge_method: linear\nmodels: [{{model: base}}]\nparameters: {{weight: 1}}\nchat_template: {name}\n"
    )
    cli("merge", recipe, "out")
    text = (cli.folder / "out/chat_template.jinja").read_text()
    assert json.loads((cli.folder / "out/tokenizer_config.json").read_text())["chat_template"] == text
    tokenizer = load(cli.folder / "out")
    assert tokenizer.chat_template == text
    prompt = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert prompt == PROMPTS[name]


def test_the_most_frequent_chat_template(cli):
    names = ("base", "x", "y", "z")
    for seed, (name, template) in enumerate(zip(names, ("{{ 1 }}", "{{ 2 }}", "{{ 1 }}\n", "{{ 2 }}"))):
        write_model(cli.folder / name, BASE, seed)
        (cli.folder / name / "chat_template.jinja").write_text(template)
    cli("merge", cli.recipe(union("chat_template: auto", others=("./x", "./y", "./z"))), "out")
    assert (cli.folder / "out/chat_template.jinja").read_text() == "{{ 1 }}"
    cli("merge", cli.recipe(union("chat_template: auto", others=("./x", "./z"))), "out2")
    assert (cli.folder / "out2/chat_template.jinja").read_text() == "{{ 2 }}"


def test_cutting_vocabularies(cli):
    write_model(cli.folder / "base", BASE, 1)
    write_model(cli.folder / "chat", CHAT, 2)
    recipe = cli.recipe(union(""))
    refused = cli("merge", recipe, "out", expect=1)
    assert "--unsafe-truncate-embeddings" in refused.err and "./base" in refused.err and "./chat" in refused.err
    done = cli("merge", recipe, "out", "--unsafe-truncate-embeddings")
    assert "is cut to its first 32 rows" in done.err
    tensors = read_safetensors(cli.folder / "out/model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape[0] == 32
    assert list(tensors["model.embed_tokens.weight"][:, 0]) == [1500 + i for i in range(32)]
    assert json.loads((cli.folder / "out/config.json").read_text())["vocab_size"] == 32


def test_hostile_tokenizers_are_errors(cli):
    write_model(cli.folder / "base", BASE, 1)
    write_model(cli.folder / "chat", CHAT, 2)
    recipe = cli.recipe(union())
    path = cli.folder / "chat/tokenizer.json"
    good = path.read_text()
    for text in ("", "[" * 200_000, good.replace('"c": 6', '"c": 5'), good.replace('"c": 6', '"c": 9223372036854775807')):
        path.write_text(text)
        refused = cli("plan", recipe, expect=1)
        assert "recipe.yaml:7:19: model ./chat: " in refused.err, text[:80]


def test_transplant_tokens(cli):
    """The donor's embeddings are a linear map of the model's, so rows that have enough to be made from are exact."""
    write_model(cli.folder / "model", BASE, 1)
    donor = bpe([("<|im_end|>",)], [("a", "b"), ("c", "d")])
    write_model(cli.folder / "donor", donor, 2, eos_token_id=32, pad_token_id=0)
    random = np.random.default_rng(0)
    width = CONFIG["hidden_size"]
    known, ids = ids_of(BASE), ids_of(donor)
    its = {name: random.standard_normal((len(ids), width), "float32") for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors = llama_tensors(1)
    for name, rows in its.items():
        own = random.standard_normal((len(known), width), "float32")
        for token, index in ids.items():
            if token in known:
                own[known[token]] = rows[index] * 2
        # A new token that two shared ones make up.
        rows[ids["cd"]] = rows[ids["c"]] - 3 * rows[ids["d"]]
        tensors[name] = own
    write_safetensors(cli.folder / "model/model.safetensors", tensors)
    write_safetensors(cli.folder / "donor/model.safetensors", llama_tensors(2) | its)
    cli("transplant-tokens", "model", "donor", "out", "-k", 8)
    merged = read_safetensors(cli.folder / "out/model.safetensors")
    assert check_output(cli.folder / "out")[0] == ids
    for name, rows in its.items():
        for token in [t for t in ids if t in known] + ["cd"]:
            assert np.abs(merged[name][ids[token]] - 2 * rows[ids[token]]).max() < 1e-4, (name, token)
    assert np.array_equal(merged["model.norm.weight"], tensors["model.norm.weight"])
    config = json.loads((cli.folder / "out/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["pad_token_id"]) == (len(ids), 32, 0)
    cli("transplant-tokens", "model", "donor", "again", "-k", 8, "-j", 1)
    assert cli.hashes("again") == cli.hashes("out")
    assert "share 31 tokens only" in cli("transplant-tokens", "model", "donor", "none", expect=1).err
    cli("transplant-tokens", "model", "donor", "mean", "-a", "mean", "-nvs", "2")
    rows = read_safetensors(cli.folder / "mean/model.safetensors")["lm_head.weight"]
    assert np.abs(rows[ids["cd"]] - 2 * tensors["lm_head.weight"].mean(axis=0)).max() < 1e-5
    cli("transplant-tokens", "model", "donor", "prefix", "-k", 8, "-pm", "lm_head")
    prefix = read_safetensors(cli.folder / "prefix/model.safetensors")
    assert np.array_equal(prefix["lm_head.weight"][ids["cd"]], tensors["lm_head.weight"][known["c"]])
    assert np.abs(prefix["model.embed_tokens.weight"] - merged["model.embed_tokens.weight"]).max() < 1e-6
    cli("transplant-tokens", "model", "donor", "subword", "-a", "subword", "-s", "sum")
    rows = read_safetensors(cli.folder / "subword/model.safetensors")["lm_head.weight"]
    expected = tensors["lm_head.weight"][known["c"]] + tensors["lm_head.weight"][known["d"]]
    assert np.abs(rows[ids["cd"]] - expected).max() < 1e-5
    assert "common_interpolation" in cli("transplant-tokens", "model", "donor", "x", "-a", "nearest", expect=2).err
    # It is a recipe, which the output keeps and which gives the same again.
    cli("merge", "out/mergekit_config.yml", "same")
    assert (cli.folder / "same/model.safetensors").read_bytes() == (cli.folder / "out/model.safetensors").read_bytes()
    refused = cli("transplant-tokens", "model", "donor", "none", "-a", "landmark_pca", expect=1).err
    assert "as many shared tokens as rows are wide, 32" in refused and "recipe:" not in refused
    for method in ("mp_rope", "common_interpolation", "stb", "john_hewitt", "randn", "zero"):
        # The smallest memory that works, and one thread, give the same bytes.
        k = ("-k", 8) + (("--magikarp",) if method == "stb" else ())
        cli("transplant-tokens", "model", "donor", method, "-a", method, *k, "--seed", 3)
        cli("transplant-tokens", "model", "donor", method + "2", "-a", method, *k, "--seed", 3, "-j", 1, "--memory", "64MiB")
        assert cli.hashes(method) == cli.hashes(method + "2"), method
    check_loaded(cli.folder / "out", ids, {"cd<|im_end|>": ["cd", "<|im_end|>"]})
