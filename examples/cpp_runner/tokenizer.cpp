#include "tokenizer.h"

#include <algorithm>
#include <fstream>
#include <iterator>

#include "failure.h"
#include "json.h"
#include "unicode_classes.h"

namespace {

const char* const kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|)"
    R"(\s*[\r\n]+|\s+(?!\S)|\s+)";
const char* const kQwen35 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|)"
    R"( ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

template <size_t N>
bool within(const uint32_t (&ranges)[N][2], uint32_t c) {
  const auto after = std::upper_bound(
      std::begin(ranges), std::end(ranges), c, [](uint32_t x, const auto& r) { return x < r[0]; });
  return after != std::begin(ranges) && c <= (*std::prev(after))[1];
}

bool space(uint32_t c) {
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
         c == 0x205f || c == 0x3000;
}

bool newline(uint32_t c) { return c == '\r' || c == '\n'; }

// The characters of UTF-8 text; throws Failure where it is none.
std::vector<uint32_t> characters(const std::string& text) {
  std::vector<uint32_t> found;
  for (size_t at = 0; at < text.size();) {
    const auto lead = static_cast<uint8_t>(text[at]);
    const size_t more = lead < 0x80 ? 0 : lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
    uint32_t c = more == 0 ? lead : lead & (0x3fu >> more);
    bool right = (lead < 0x80 || (lead >= 0xc2 && lead < 0xf5)) && at + more < text.size();
    for (size_t i = 1; right && i <= more; ++i) {
      const auto next = static_cast<uint8_t>(text[at + i]);
      right = (next & 0xc0) == 0x80;
      c = (c << 6) | (next & 0x3f);
    }
    if (!right) throw Failure("the text is not UTF-8 at byte " + std::to_string(at));
    found.push_back(c);
    at += more + 1;
  }
  return found;
}

// What stands in a byte-level vocabulary for each byte: itself if it is printable, else 256 + n.
const std::vector<std::string>& letters_of_bytes() {
  static const std::vector<std::string> known = [] {
    std::vector<std::string> found;
    uint32_t next = 256;
    for (uint32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      found.push_back(utf8(printable ? b : next++));
    }
    return found;
  }();
  return known;
}

std::string bytes_of(const std::string& token) {
  static const std::unordered_map<std::string, char> known = [] {
    std::unordered_map<std::string, char> found;
    for (int b = 0; b < 256; ++b) found[letters_of_bytes()[b]] = static_cast<char>(b);
    return found;
  }();
  std::string found;
  for (const uint32_t c : characters(token)) {
    const auto byte = known.find(utf8(c));
    if (byte == known.end()) return token;
    found.push_back(byte->second);
  }
  return found;
}

[[noreturn]] void refuse(const std::string& what) {
  throw Failure(what + "; only byte-level BPE of the kinds of GPT-2, Qwen2 and Qwen3.5 is read");
}

bool unset(const Json& object, const std::string& key) {
  if (!object.has(key)) return true;
  const Json& value = object[key];
  return value.null() || value.is_text("") || value.is_false();
}

}  // namespace

Tokenizer::Tokenizer(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Failure("--tokenizer: cannot read " + path);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  try {
    read(text);
  } catch (const Failure& error) {
    throw Failure("--tokenizer: " + path + ": " + error.what());
  } catch (const std::exception& error) {
    throw Failure("--tokenizer: " + path + " is not a tokenizer.json (" + error.what() + ")");
  }
}

void Tokenizer::read(const std::string& text) {
  const Json whole = Json::parse(text);
  const Json& model = whole["model"];
  if (!model["type"].is_text("BPE")) refuse("its model is not BPE");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"})
    if (!unset(model, key)) refuse(std::string("its model sets ") + key);
  whole_words_ = !unset(model, "ignore_merges");
  if (!unset(whole, "normalizer") && !whole["normalizer"]["type"].is_text("NFC"))
    refuse("it normalises text, and not to NFC");
  if (!unset(whole, "post_processor") && !whole["post_processor"]["type"].is_text("ByteLevel"))
    refuse("it has a post-processor");

  if (unset(whole, "pre_tokenizer")) refuse("it has no pre-tokenizer");
  const Json& before = whole["pre_tokenizer"];
  const Json* bytes = &before;
  if (before["type"].is_text("Sequence")) {
    const auto& parts = before["pretokenizers"].items();
    if (parts.size() != 2 || !parts[0]["type"].is_text("Split") ||
        !parts[0]["behavior"].is_text("Isolated") || !unset(parts[0], "invert") ||
        !parts[0]["pattern"].has("Regex") || !unset(parts[1], "use_regex"))
      refuse("it splits text in another way");
    const Json& pattern = parts[0]["pattern"]["Regex"];
    if (pattern.is_text(kQwen2)) split_ = Split::qwen2;
    else if (pattern.is_text(kQwen35)) split_ = Split::qwen3_5;
    else refuse("it splits text by another pattern");
    bytes = &parts[1];
  } else if (unset(before, "use_regex")) {
    refuse("it does not split text");
  }
  if (!(*bytes)["type"].is_text("ByteLevel")) refuse("it is not byte-level");
  if (!unset(*bytes, "add_prefix_space")) refuse("it adds a space in front");

  for (const auto& [token, id] : model["vocab"].members()) {
    ids_[token] = id.integer();
    bytes_[id.integer()] = bytes_of(token);
  }
  for (const Json& merge : model["merges"].items()) {
    std::pair<std::string, std::string> pair;
    if (merge.is_text()) {
      const std::string& line = merge.text();
      const size_t gap = line.find(' ');
      if (gap == std::string::npos) throw std::runtime_error("a merge is no pair");
      pair = {line.substr(0, gap), line.substr(gap + 1)};
    } else {
      pair = {merge.items().at(0).text(), merge.items().at(1).text()};
    }
    ranks_.emplace(std::move(pair), ranks_.size());
  }
  if (unset(whole, "added_tokens")) return;
  for (const Json& token : whole["added_tokens"].items()) {
    for (const char* key : {"lstrip", "rstrip", "single_word"})
      if (!unset(token, key)) refuse("an added token sets " + std::string(key));
    const std::string& content = token["content"].text();
    added_.emplace_back(content, token["id"].integer());
    bytes_[token["id"].integer()] = content;
  }
  std::sort(added_.begin(), added_.end(), [](const auto& a, const auto& b) {
    return a.first.size() > b.first.size();
  });
}

// A word ends where the first alternative of the pattern that fits does.
std::vector<std::string> Tokenizer::words(const std::string& text) const {
  const std::vector<uint32_t> c = characters(text);
  const size_t end = c.size();
  const bool gpt2 = split_ == Split::gpt2, marks = split_ == Split::qwen3_5;
  const auto letter = [&](uint32_t x) {
    return within(kLetters, x) || (marks && within(kMarks, x));
  };
  const auto number = [](uint32_t x) { return within(kNumbers, x); };
  const auto other = [&](uint32_t x) { return !space(x) && !letter(x) && !number(x); };
  const auto run = [&](size_t at, const auto& kind) {
    while (at < end && kind(c[at])) ++at;
    return at;
  };
  const auto contraction = [&](size_t at) -> size_t {
    if (c[at] != '\'') return at;
    for (const std::string tail : {"s", "t", "re", "ve", "m", "ll", "d"}) {
      size_t same = 0;
      while (same < tail.size() && at + 1 + same < end) {
        const uint32_t x = c[at + 1 + same];
        const uint32_t lower = !gpt2 && x >= 'A' && x <= 'Z' ? x + 32 : x;
        if (lower != static_cast<uint32_t>(tail[same])) break;
        ++same;
      }
      if (same == tail.size()) return at + 1 + same;
    }
    return at;
  };
  const auto word_end = [&](size_t at) -> size_t {
    if (const size_t found = contraction(at); found > at) return found;
    const size_t after_space = at + (c[at] == ' ' && at + 1 < end);
    if (gpt2) {
      if (letter(c[after_space])) return run(after_space, letter);
      if (number(c[after_space])) return run(after_space, number);
    } else {
      const bool before = !newline(c[at]) && !within(kLetters, c[at]) && !number(c[at]);
      if (before && at + 1 < end && letter(c[at + 1])) return run(at + 1, letter);
      if (letter(c[at])) return run(at, letter);
      if (number(c[at])) return at + 1;
    }
    if (other(c[after_space])) {
      const size_t found = run(after_space, other);
      return gpt2 ? found : run(found, newline);
    }
    const size_t blank = run(at, space);
    if (!gpt2)
      for (size_t i = blank; i > at; --i)
        if (newline(c[i - 1])) return i;
    return blank < end && blank - at > 1 ? blank - 1 : blank;
  };
  std::vector<std::string> found;
  for (size_t at = 0; at < end;) {
    const size_t next = word_end(at);
    found.emplace_back();
    for (; at < next; ++at) found.back() += utf8(c[at]);
  }
  return found;
}

void Tokenizer::append(const std::string& word, std::vector<int64_t>& found) const {
  std::vector<std::string> parts;
  std::string spelled;
  for (const char b : word) {
    parts.push_back(letters_of_bytes()[static_cast<uint8_t>(b)]);
    spelled += parts.back();
  }
  if (const auto whole = ids_.find(spelled); whole_words_ && whole != ids_.end())
    parts = {spelled};
  while (parts.size() > 1) {
    size_t best = ranks_.size(), where = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto rank = ranks_.find({parts[i], parts[i + 1]});
      if (rank != ranks_.end() && rank->second < best) best = rank->second, where = i;
    }
    if (best == ranks_.size()) break;
    parts[where] += parts[where + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(where) + 1);
  }
  for (const std::string& part : parts) {
    const auto id = ids_.find(part);
    if (id == ids_.end()) throw Failure("--prompt: the tokenizer has no token for a byte of it");
    found.push_back(id->second);
  }
}

std::vector<int64_t> Tokenizer::encode(const std::string& text) const {
  std::vector<int64_t> found;
  for (size_t at = 0; at < text.size();) {
    size_t next = text.size();
    const std::pair<std::string, int64_t>* token = nullptr;
    for (const auto& candidate : added_) {  // the longest goes first
      const size_t place = text.find(candidate.first, at);
      if (!candidate.first.empty() && place < next) next = place, token = &candidate;
    }
    for (const std::string& word : words(text.substr(at, next - at))) append(word, found);
    if (!token) break;
    found.push_back(token->second);
    at = next + token->first.size();
  }
  return found;
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids) const {
  std::string found;
  for (const int64_t id : ids)
    if (const auto token = bytes_.find(id); token != bytes_.end()) found += token->second;
  return found;
}
