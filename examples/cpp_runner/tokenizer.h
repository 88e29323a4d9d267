// Text to token ids and back, by a tokenizer.json of byte-level BPE.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

class Tokenizer {
 public:
  // Throws Failure for a file that is missing or damaged, and for tokenizers of another kind: it
  // reads byte-level BPE split as GPT-2, Qwen2 and Qwen3.5 do.
  explicit Tokenizer(const std::string& path);

  // Text is UTF-8 and not normalised. Added tokens ("<|im_end|>") in it are found.
  std::vector<int64_t> encode(const std::string& text) const;
  // Ids outside the vocabulary are left out; the bytes may end within a character.
  std::string decode(const std::vector<int64_t>& ids) const;

 private:
  enum class Split { gpt2, qwen2, qwen3_5 };
  Split split_ = Split::gpt2;
  bool whole_words_ = false;  // a word that is a token is not built from merges
  std::unordered_map<std::string, int64_t> ids_;
  std::unordered_map<int64_t, std::string> bytes_;
  std::map<std::pair<std::string, std::string>, size_t> ranks_;
  std::vector<std::pair<std::string, int64_t>> added_;

  void read(const std::string& text);
  std::vector<std::string> words(const std::string& text) const;
  void append(const std::string& word, std::vector<int64_t>& found) const;
};
