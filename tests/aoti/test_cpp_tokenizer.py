"""The C++ runner's reader of tokenizer.json gives the ids and the text that `tokenizers` gives."""

from __future__ import annotations

import json
import random
import shutil
import subprocess

import packages
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN3_5

PROGRAM = """
#include <iostream>
#include <iterator>
#include "failure.h"
#include "tokenizer.h"
// Texts on standard input, each ended by a zero byte: a line of ids, and then the text again.
int main(int, char** given) {
  try {
    const Tokenizer tokenizer(given[1]);
    for (std::string text; std::getline(std::cin, text, '\\0');) {
      const auto ids = tokenizer.encode(text);
      for (const int64_t id : ids) std::cout << id << ' ';
      std::cout << '\\n' << tokenizer.decode(ids) << '\\0';
    }
  } catch (const Failure& error) {
    std::cerr << error.what() << '\\n';
    return 1;
  }
}
"""
KINDS = {"gpt2": None, "qwen2": QWEN2, "qwen3_5": QWEN3_5}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|im_end|>!")
TEXTS = [
    "", " ", "\n", "  \n\n  x", "a  b   c    ", "I'll say it's WE'RE 'Tis don'T",
    "12 345,6789 3.14",
    "x = [i**2 for i in range(10)]\r\n\treturn  x\n\n\n", "naïve café Ångström straße",
    "Привет, мир! 你好，世界。 こんにちは 한국어", "नमस्ते दुनिया",
    "e\u0301a\u0308 \u0301x \u0301\u0301",
    "\U0001f600\U0001f468\u200d\U0001f469 ok \u00a0\u2003\u3000y", "½ ٣ Ⅷ x²", "\x1c\x1f \x85z",
    "<|im_start|>user\nhi<|im_end|>!<|im_end|> <|im_end", "'", "a'", " '", "''s", " 's",
    "\u2028\u2029 a",
]  # fmt: skip


def trained(kind, size=700):
    tokenizer = Tokenizer(models.BPE())
    pattern = KINDS[kind]
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if pattern is None
        else pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )
    if pattern is not None:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if size > 256 else [],
    )  # fmt: skip
    sources = sorted((packages.ROOT / "docs").rglob("*.md"))
    corpus = [path.read_text() for path in sources] + TEXTS
    tokenizer.train_from_iterator(corpus if size > 256 else ["the cat sat on the mat"], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("c++ is not installed")
    folder, sources = tmp_path_factory.mktemp("tokenizer"), packages.ROOT / "examples/cpp_runner"
    (folder / "main.cpp").write_text(PROGRAM)
    command = ["c++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{sources}", "-o",
               str(folder / "program"), str(folder / "main.cpp"),
               str(sources / "tokenizer.cpp"), str(sources / "json.cpp")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "program"


def run(program, path, texts):
    given = "".join(f"{text}\0" for text in texts).encode()
    done = subprocess.run([str(program), str(path)], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [answer.split("\n", 1) for answer in done.stdout.decode().split("\0")[:-1]]
    return [([int(token) for token in ids.split()], text) for ids, text in answers]


def random_texts(count):
    random.seed(11)
    pieces = [*" \n\r\t'", "  ", "\n\n", "a", "Z", "é", "\u0301", "я", "你", "ि", "7", "٣", "½",
              "!", "…", "\U0001f600", "'s", "'LL", "<|im_end|>", "\u00a0", "\u0378"]  # fmt: skip
    return ["".join(random.choices(pieces, k=random.randint(1, 14))) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_tokenizers(tmp_path, program, kind):
    tokenizer = trained(kind)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    tokenizer.normalizer = normalizers.Sequence([])  # the runner takes text as it is
    texts = TEXTS + random_texts(2000)
    for text, (ids, again) in zip(texts, run(program, path, texts), strict=True):
        assert ids == tokenizer.encode(text).ids, repr(text)
        assert again == text


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t["model"].update(type="Unigram"), "its model is not BPE"),
        (lambda t: t["model"].update(byte_fallback=True), "sets byte_fallback"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalises text"),
        (lambda t: t.update(pre_tokenizer=None), "no pre-tokenizer"),
        (lambda t: t.update(pre_tokenizer={"type": "Metaspace"}), "split|byte-level"),
        (
            lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"),
            "another pattern",
        ),
        (lambda t: t.update(post_processor={"type": "TemplateProcessing"}), "post-processor"),
        (lambda t: t["added_tokens"][0].update(lstrip=True), "sets lstrip"),
        (lambda t: t.pop("model"), "not a tokenizer.json"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, program, change, message):
    path = tmp_path / "tokenizer.json"
    content = json.loads(trained("qwen2").to_str())
    change(content)
    path.write_text(json.dumps(content))
    done = subprocess.run([str(program), str(path)], input="", capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert any(part in done.stderr for part in message.split("|")), done.stderr


@pytest.mark.parametrize("content", [None, b"", b'{"model": ', b"\x00\x01"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, program, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    done = subprocess.run([str(program), str(path)], input="", capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 1
    assert str(path) in done.stderr and done.stderr.count("\n") == 1
