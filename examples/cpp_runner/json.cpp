#include "json.h"

#include <cctype>
#include <cstdlib>
#include <stdexcept>

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Json whole() {
    Json value = parse(0);
    skip();
    if (at_ != text_.size()) fail();
    return value;
  }

 private:
  static constexpr int kDeepest = 64;
  const std::string& text_;
  size_t at_ = 0;

  [[noreturn]] void fail() const {
    throw std::runtime_error("not JSON at byte " + std::to_string(at_));
  }

  void skip() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }

  char peek() {
    skip();
    if (at_ >= text_.size()) fail();
    return text_[at_];
  }

  void expect(char wanted) {
    if (peek() != wanted) fail();
    ++at_;
  }

  bool take(char wanted) {
    if (peek() != wanted) return false;
    ++at_;
    return true;
  }

  Json parse(int depth) {
    if (depth > kDeepest) fail();
    Json value;
    switch (peek()) {
      case '{':
        value.kind_ = Json::Kind::object;
        ++at_;
        if (take('}')) return value;
        do {
          std::string key = string();
          expect(':');
          value.members_[key] = parse(depth + 1);
        } while (take(','));
        expect('}');
        return value;
      case '[':
        value.kind_ = Json::Kind::array;
        ++at_;
        if (take(']')) return value;
        do {
          value.items_.push_back(parse(depth + 1));
        } while (take(','));
        expect(']');
        return value;
      case '"':
        value.kind_ = Json::Kind::string;
        value.text_ = string();
        return value;
      default:
        return word();
    }
  }

  Json word() {
    Json value;
    for (const char* name : {"null", "true", "false"}) {
      const std::string spelled(name);
      if (text_.compare(at_, spelled.size(), spelled) == 0) {
        at_ += spelled.size();
        value.kind_ = spelled == "null" ? Json::Kind::null : Json::Kind::boolean;
        value.number_ = spelled == "true";
        return value;
      }
    }
    const char* start = text_.c_str() + at_;
    char* end = nullptr;
    value.kind_ = Json::Kind::number;
    value.number_ = std::strtod(start, &end);
    if (end == start) fail();
    at_ += static_cast<size_t>(end - start);
    return value;
  }

  std::string string() {
    expect('"');
    std::string found;
    while (at_ < text_.size() && text_[at_] != '"') {
      const char c = text_[at_++];
      if (c == '\\') escape(found);
      else found.push_back(c);
    }
    if (at_ >= text_.size()) fail();
    ++at_;
    return found;
  }

  void escape(std::string& found) {
    static const std::string names = "nrtbf\"\\/", meant = "\n\r\t\b\f\"\\/";
    if (at_ >= text_.size()) fail();
    const char c = text_[at_++];
    if (const size_t which = names.find(c); which != std::string::npos) {
      found.push_back(meant[which]);
      return;
    }
    if (c != 'u') fail();
    uint32_t code = four_digits();
    if (code >= 0xd800 && code < 0xdc00) {
      if (text_.compare(at_, 2, "\\u") != 0) fail();
      at_ += 2;
      const uint32_t low = four_digits();
      if (low < 0xdc00 || low > 0xdfff) fail();
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    found += utf8(code);
  }

  uint32_t four_digits() {
    if (at_ + 4 > text_.size()) fail();
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = text_[at_++];
      if (!std::isxdigit(static_cast<unsigned char>(c))) fail();
      code = code * 16 + static_cast<uint32_t>(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    }
    return code;
  }
};

std::string utf8(uint32_t c) {
  if (c < 0x80) return {static_cast<char>(c)};
  const int more = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
  std::string found{static_cast<char>((0xff00 >> (more + 1)) | (c >> (6 * more)))};
  for (int i = more - 1; i >= 0; --i)
    found.push_back(static_cast<char>(0x80 | ((c >> (6 * i)) & 0x3f)));
  return found;
}

Json Json::parse(const std::string& text) { return Parser(text).whole(); }

const Json& Json::operator[](const std::string& key) const {
  const auto found = members_.find(key);
  if (found == members_.end()) throw std::runtime_error("no field '" + key + "'");
  return found->second;
}

const std::vector<Json>& Json::items() const {
  if (kind_ != Kind::array) throw std::runtime_error("a list was expected");
  return items_;
}

const std::map<std::string, Json>& Json::members() const {
  if (kind_ != Kind::object) throw std::runtime_error("an object was expected");
  return members_;
}

const std::string& Json::text() const {
  if (kind_ != Kind::string) throw std::runtime_error("a text was expected");
  return text_;
}

int64_t Json::integer() const {
  if (kind_ != Kind::number) throw std::runtime_error("a number was expected");
  return static_cast<int64_t>(number_);
}

std::vector<int64_t> Json::integers() const {
  std::vector<int64_t> found;
  for (const Json& item : items()) found.push_back(item.integer());
  return found;
}
